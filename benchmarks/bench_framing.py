"""Headers: encoded by the loop, decoded in Python. Run: make bench."""

import os

from pytest_benchmark.fixture import BenchmarkFixture

from vfiomig._fastcopy import FrameWriter
from vfiomig.fd import OwnedFd
from vfiomig.framing import native
from vfiomig.framing.native import FrameKind


def test_decode_a_frame_header(benchmark: BenchmarkFixture) -> None:
    with OwnedFd(os.memfd_create("stream")) as stream:
        writer = FrameWriter(stream.fileno(), 4096)
        _, writer.chain = native.encode_prologue(64)
        chain = writer.chain
        writer.put_frame(native.template(FrameKind.MANIFEST, 64), b"x" * 64)
        header = os.pread(stream.fileno(), native.HEADER_BYTES, 0)
    found = benchmark(native.decode_header, header, 0, 0, chain)
    assert (found.kind, found.length) == (FrameKind.MANIFEST, 64)
