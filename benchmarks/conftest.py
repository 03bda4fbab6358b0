"""Fixtures for the benchmarks. Run: make bench."""

import os
from collections.abc import Iterator

import pytest

from vfiomig.fd import OwnedFd

STATE_BYTES = 256 << 20


@pytest.fixture(scope="session")
def state() -> Iterator[OwnedFd]:
    """A memfd of 256 MiB that is not zero, touched once: first touch costs seconds per GB."""
    block = os.urandom(1 << 20)
    with OwnedFd(os.memfd_create("state")) as fd:
        for _ in range(STATE_BYTES >> 20):
            os.write(fd.fileno(), block)
        yield fd
