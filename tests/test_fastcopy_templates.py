"""What stands around a chunk: heads, tails, padding, numbers, and the chain."""

import os
import struct
from itertools import pairwise

import pytest
import xxhash

from copying import EVERYTHING, Filled, whole
from vfiomig._fastcopy import Digest, FrameWriter, Template


def test_payloads_are_aligned_and_padded_with_zeros(filled: Filled) -> None:
    template = Template(b"head" + bytes(8), b"tail", align=64, length_at=4)
    with filled(b"x" * 4200) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.copy(src.fileno(), template, EVERYTHING)
        first = struct.pack("<4sQ52x", b"head", 4096) + b"x" * 4096 + b"tail"
        second = struct.pack("<4sQ52x", b"head", 104) + b"x" * 104 + bytes(24) + b"tail"
        assert whole(dst) == first + second
    assert writer.stream_bytes == len(first + second)


@pytest.mark.parametrize("head_bytes", [8, 64, 65, 127, 128])
@pytest.mark.parametrize("align", [1, 2, 64, 100, 4095, 4096])
def test_any_head_fits_before_any_alignment(filled: Filled, head_bytes: int, align: int) -> None:
    template = Template(b"\xaa" * head_bytes, b"\xbb" * 64, align=align, length_at=0)
    state = b"\xcc" * 4097
    with filled(state) as src, filled(b"") as dst:
        FrameWriter(dst.fileno(), 8192).copy(src.fileno(), template, EVERYTHING)
        head = struct.pack("<Q", len(state)).ljust(head_bytes, b"\xaa")
        head += bytes(-head_bytes % align)
        assert whole(dst) == head + state + bytes(-len(state) % align) + b"\xbb" * 64


def test_numbers_are_big_endian_where_the_template_says_so(filled: Filled) -> None:
    template = Template(
        bytes(32), length_at=0, sequence_at=8, checksum_at=16, chain_at=24, big_endian=True
    )
    digest = Digest()
    with filled(b"abc") as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.sequence = 2**40
        writer.copy(src.fileno(), template, EVERYTHING, digest)
        head = struct.pack(">QQQ", 3, 2**40, digest.value)
        assert writer.chain == xxhash.xxh3_64_intdigest(head)
        assert whole(dst) == head + struct.pack(">Q", writer.chain) + b"abc"
    assert writer.sequence == 2**40 + 1


def test_headers_are_chained_and_carry_the_running_digest(filled: Filled) -> None:
    template = Template(bytes(32), length_at=0, sequence_at=8, checksum_at=16, chain_at=24)
    state = os.urandom(9000)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.chain = link = 7
        writer.copy(src.fileno(), template, EVERYTHING, Digest())
        writer.put_frame(template, b"last")
        stream, ends = whole(dst), [0, 4096, 8192, 9000]
    expected = b""
    frames = [(state[a:b], xxhash.xxh3_64_intdigest(state[:b])) for a, b in pairwise(ends)]
    for number, (payload, checksum) in enumerate(
        [*frames, (b"last", xxhash.xxh3_64_intdigest(b"last"))]
    ):
        head = struct.pack("<QQQ", len(payload), number, checksum)
        link = xxhash.xxh3_64_intdigest(head, link)
        expected += head + struct.pack("<Q", link) + payload
    assert stream == expected
    assert writer.chain == link
    assert writer.device_bytes == 9000


@pytest.mark.parametrize(
    "fields",
    [
        {"head": b""},
        {"head": bytes(129)},
        {"tail": bytes(65)},
        {"align": 0},
        {"align": 4097},
        {"length_at": 57},
        {"sequence_at": 64},
        {"checksum_at": -2},
        {"chain_at": 2**31 - 8},
        {"kind_at": 64},
        {"kind_at": -2},
        {"zeros_kind": 3},
        {"kind_at": 0, "zeros_kind": 256},
        {"kind_at": 0, "zeros_kind": 3, "tail": b"tail"},
        {"kind_at": 0, "zeros_kind": 3, "align": 3},
        {"kind_at": 0, "zeros_kind": 3, "align": 4095},
        {"flags_at": 64},
        {"flags_at": -2},
        {"continued": 2},
        {"flags_at": 0, "continued": 256},
        {"flags_at": 0, "continued": -1},
    ],
)
def test_templates_that_do_not_fit_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"template|no room|no byte"):
        Template(**{"head": bytes(64), "length_at": 0, **fields})  # type: ignore[arg-type]
