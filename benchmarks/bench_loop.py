"""The copy loop, descriptor to descriptor, beside a loop in Python. Run: make bench."""

import os
import socket
import threading
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Scale
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader
from vfiomig.fd import OwnedFd
from vfiomig.framing import native
from vfiomig.framing.native import FrameKind

EVERYTHING = 1 << 62


def measured(benchmark: BenchmarkFixture, scale: Scale, copy: Callable[[], int]) -> None:
    """Measure copy, and check each time that it copied the whole state."""
    found = benchmark.pedantic(copy, rounds=scale.rounds, warmup_rounds=1)
    assert found == scale.state_bytes
    benchmark.extra_info["state_bytes"] = scale.state_bytes


def copied(writer: FrameWriter, state: OwnedFd, digest: Digest | None) -> int:
    os.lseek(state.fileno(), 0, os.SEEK_SET)
    before = writer.device_bytes
    template = native.template(FrameKind.DATA, 64)
    outcome = writer.copy(state.fileno(), template, EVERYTHING, digest)
    assert outcome is Outcome.END_OF_STREAM
    return writer.device_bytes - before


@pytest.mark.parametrize("buffer_kib", [4, 16, 64, 256, 1024, 4096, 16384])
@pytest.mark.parametrize("hashing", ["xxh3", "plain"])
def test_copy_memfd_to_null(
    benchmark: BenchmarkFixture, scale: Scale, state: OwnedFd, buffer_kib: int, hashing: str
) -> None:
    with OwnedFd(os.open("/dev/null", os.O_WRONLY)) as sink:
        writer = FrameWriter(sink.fileno(), buffer_kib << 10)
        measured(
            benchmark,
            scale,
            lambda: copied(writer, state, Digest() if hashing == "xxh3" else None),
        )


@pytest.mark.parametrize("ring_slots", [1, 2, 4, 8])
def test_copy_through_a_unix_socket(
    benchmark: BenchmarkFixture, scale: Scale, state: OwnedFd, ring_slots: int
) -> None:
    """Both ends in one process; what arrives is checked against its running digest."""

    def copy() -> int:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        reader, digest = StreamReader(far.fileno(), 1 << 20), Digest()
        template = native.template(FrameKind.DATA, 64)
        thread = threading.Thread(target=reader.copy, args=(-1, template, EVERYTHING, digest))
        with far:
            thread.start()
            with near:
                writer = FrameWriter(near.fileno(), 1 << 20, ring_slots=ring_slots)
                copied(writer, state, Digest())
                writer.close()
            thread.join()
        return reader.device_bytes

    measured(benchmark, scale, copy)


def test_baseline_python_readinto_memfd_to_null(
    benchmark: BenchmarkFixture, scale: Scale, state: OwnedFd
) -> None:
    buffer = bytearray(1 << 20)
    with OwnedFd(os.open("/dev/null", os.O_WRONLY)) as sink:

        def copy() -> int:
            os.lseek(state.fileno(), 0, os.SEEK_SET)
            total = 0
            while got := os.readv(state.fileno(), [buffer]):
                os.write(sink.fileno(), memoryview(buffer)[:got])
                total += got
            return total

        measured(benchmark, scale, copy)
