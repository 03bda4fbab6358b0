"""Headers and frames: decoded in Python one by one, or checked by the loop in runs. make bench."""

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Scale
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader
from vfiomig.fd import OwnedFd
from vfiomig.framing import native
from vfiomig.framing.native import FrameKind

EVERYTHING = 1 << 62


def test_decode_a_frame_header(benchmark: BenchmarkFixture) -> None:
    with OwnedFd(os.memfd_create("stream")) as stream:
        writer = FrameWriter(stream.fileno(), 4096)
        _, writer.chain = native.encode_prologue(64)
        chain = writer.chain
        writer.put_frame(native.template(FrameKind.MANIFEST, 64), b"x" * 64)
        header = os.pread(stream.fileno(), native.HEADER_BYTES, 0)
    found = benchmark(native.decode_header, header, 0, 0, chain)
    assert (found.kind, found.length) == (FrameKind.MANIFEST, 64)


@pytest.mark.parametrize("zero_percent", [0, 50, 95, 100])
def test_check_frames(benchmark: BenchmarkFixture, scale: Scale, zero_percent: int) -> None:
    """Read back what the loop wrote, runs of 64 KiB of zeros in it, and write it to nowhere."""
    template = native.template(FrameKind.DATA, 64)
    with (
        OwnedFd(os.memfd_create("state")) as state,
        OwnedFd(os.memfd_create("stream")) as stream,
    ):
        run = os.urandom(64 << 10)
        for index in range(scale.state_bytes >> 16):
            is_zero = (index + 1) * zero_percent // 100 > index * zero_percent // 100
            os.write(state.fileno(), bytes(len(run)) if is_zero else run)
        os.lseek(state.fileno(), 0, os.SEEK_SET)
        written = Digest()
        writer = FrameWriter(stream.fileno(), 1 << 20)
        writer.copy(state.fileno(), template, EVERYTHING, written)
        assert writer.zero_bytes == scale.state_bytes * zero_percent // 100 >> 16 << 16

        def check() -> int:
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            reader, digest = StreamReader(stream.fileno(), 1 << 20), Digest()
            outcome = reader.copy(-1, template, EVERYTHING, digest)
            assert (outcome, reader.peek(1)) == (Outcome.OTHER_FRAME, b"")
            return digest.value

        found = benchmark.pedantic(check, rounds=scale.rounds, warmup_rounds=1)
    assert found == written.value
    benchmark.extra_info["state_bytes"] = scale.state_bytes
