"""The copy loop, descriptor to descriptor, beside a loop in Python. Run: make bench."""

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import STATE_BYTES
from vfiomig._fastcopy import Digest, FrameWriter, Outcome
from vfiomig.fd import OwnedFd
from vfiomig.framing import native
from vfiomig.framing.native import FrameKind


@pytest.mark.parametrize("buffer_kib", [16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("hashing", ["xxh3", "plain"])
def test_copy_memfd_to_null(
    benchmark: BenchmarkFixture, state: OwnedFd, buffer_kib: int, hashing: str
) -> None:
    template = native.template(FrameKind.DATA, 64)
    with OwnedFd(os.open("/dev/null", os.O_WRONLY)) as sink:
        writer = FrameWriter(sink.fileno(), buffer_kib << 10)

        def copy() -> None:
            os.lseek(state.fileno(), 0, os.SEEK_SET)
            digest = Digest() if hashing == "xxh3" else None
            found = writer.copy(state.fileno(), template, STATE_BYTES + 1, digest)
            assert found is Outcome.END_OF_STREAM

        benchmark.pedantic(copy, rounds=7, warmup_rounds=1)
        assert writer.device_bytes == 8 * STATE_BYTES
    benchmark.extra_info["state_bytes"] = STATE_BYTES


def test_baseline_python_readinto_memfd_to_null(
    benchmark: BenchmarkFixture, state: OwnedFd
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

        assert benchmark.pedantic(copy, rounds=7, warmup_rounds=1) == STATE_BYTES
    benchmark.extra_info["state_bytes"] = STATE_BYTES
