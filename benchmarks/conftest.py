"""What the benchmarks share. Run: make bench, or: pytest benchmarks --benchmark-only --quick."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vfiomig.fd import OwnedFd
from vfiomig.quantities import parse_size


@dataclass(frozen=True)
class Scale:
    """How much is copied, and how often it is measured."""

    state_bytes: int
    rounds: int


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quick: a quarter of the bytes, and fewer rounds; for trying, not for quoting."""
    parser.addoption("--quick", action="store_true", help="64 MiB instead of 256, 3 rounds, not 7")
    parser.addoption("--state", help="bytes of state instead: 4G")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    usual = Scale(64 << 20, 3) if request.config.getoption("--quick") else Scale(256 << 20, 7)
    given = request.config.getoption("--state")
    return Scale(parse_size(given), usual.rounds) if given else usual


@pytest.fixture(scope="session")
def state(scale: Scale) -> Iterator[OwnedFd]:
    """A memfd that is not zero, touched once: first touch costs seconds per GB."""
    block = os.urandom(1 << 20)
    with OwnedFd(os.memfd_create("state")) as fd:
        for _ in range(scale.state_bytes >> 20):
            os.write(fd.fileno(), block)
        yield fd
