"""StreamReader.copy(): how a run of frames ends, and that a writer and a reader agree."""

import errno
import struct
from threading import Thread

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from copying import (
    EVERYTHING,
    Filled,
    InChild,
    Refuse,
    checked,
    copied,
    counted,
    feed,
    framed,
    pattern,
    pipe,
    reading,
    whole,
    written,
)
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader, Template

O = Outcome  # noqa: E741  as in: O.LIMIT_REACHED
# Two frames of checked(): 4096 bytes, and 1000 with 24 bytes of padding.
STATE = pattern(5096)
SECOND = 64 + 4096


def test_so_many_frames_and_no_more_are_copied() -> None:
    state, digest = pattern(20_000), Digest()
    stream = written(checked(), state)
    with reading(stream) as reader:
        for frames, start, end in [(1, 0, 4096), (3, 4096, 16384), (1, 16384, 20_000)]:
            outcome, found = copied(reader, checked(), digest, frames=frames)
            assert (outcome, found) == (O.LIMIT_REACHED, state[start:end])
            assert reader.device_bytes == end
        assert (reader.sequence, reader.offset) == (5, len(stream))
        assert copied(reader, checked(), digest, frames=1) == (O.OTHER_FRAME, b"")


def test_a_deadline_ends_the_copy_inside_a_frame_and_the_next_goes_on() -> None:
    state, digest, outcome, found = pattern(30_000), Digest(), O.DEADLINE_REACHED, b""
    places = []
    with reading(written(checked(), state, 1 << 16)) as reader:
        while outcome is O.DEADLINE_REACHED:
            outcome, piece = copied(reader, checked(), digest, frames=1, deadline_ns=1)
            found += piece
            places.append((reader.device_bytes, reader.left_bytes, reader.sequence))
    assert (outcome, found) == (O.LIMIT_REACHED, state)
    assert len(places) > 30_000 // 4096
    assert all((done + left, count) == (30_000, 1) for done, left, count in places)


def test_a_deadline_to_come_ends_nothing() -> None:
    with reading(written(checked(), STATE)) as reader:
        assert copied(reader, checked(), deadline_ns=1 << 62) == (O.OTHER_FRAME, STATE)


def changed(stream: bytes, at: int, bits: int) -> bytes:
    return stream[:at] + bytes([stream[at] ^ bits]) + stream[at + 1 :]


def refuse_second(stream: bytes, template: Template, **more: int) -> None:
    """The first frame is copied; of the second nothing is taken."""
    with reading(stream) as reader:
        outcome, found = copied(reader, template, Digest(), **more)
        assert (outcome, found) == (O.OTHER_FRAME, STATE[:4096])
        assert (reader.offset, reader.sequence, reader.left_bytes) == (SECOND, 1, 0)
        assert reader.peek(4096) == stream[SECOND : SECOND + 4096]


@pytest.mark.parametrize("bits", [0x01, 0x02, 0x80, 0xFF])
def test_a_head_with_a_flipped_bit_is_another_frame(bits: int) -> None:
    stream = written(checked(), STATE)
    for at in range(SECOND, SECOND + 64):
        refuse_second(changed(stream, at, bits), checked())


def test_without_a_chain_every_byte_of_the_head_is_compared_still() -> None:
    template = checked(chain_at=-1, checksum_at=-1, zeros_kind=-1, continued=0)
    stream = written(template, STATE)
    for at in set(range(64)) - set(range(8, 16)):  # the length may be any
        refuse_second(changed(stream, SECOND + at, 0x01), template)


def linked(head: bytes, chain: int) -> bytes:
    """A head of 64 bytes with the link that belongs there."""
    return head[:32] + struct.pack("<Q", xxhash.xxh3_64_intdigest(head[:32], chain)) + head[40:]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"X"),  # kind
        (1, b"\1"),  # a flag that is not CONTINUED
        (1, b"\3"),  # and one beside it
        (7, b"?"),  # magic
        (8, bytes(8)),  # a length of nothing
        (8, b"\xff" * 8),  # longer than there is room for
        (16, b"\0"),  # the number of the frame before
        (16, b"\2"),  # the number of the frame behind
        (40, b"\1"),  # padding of the head
        (63, b"\x80"),
    ],
)
def test_a_wrong_field_under_a_right_link_is_another_frame(at: int, value: bytes) -> None:
    stream = written(checked(), STATE)
    head = stream[SECOND : SECOND + 64]
    (chain,) = struct.unpack_from("<Q", stream, 32)
    assert linked(head, chain) == head
    head = linked(head[:at] + value + head[at + len(value) :], chain)
    refuse_second(stream[:SECOND] + head + stream[SECOND + 64 :], checked())


def test_a_frame_longer_than_what_may_come_is_another_one() -> None:
    stream = written(checked(), STATE)
    refuse_second(stream, checked(), limit=5095)
    with reading(stream) as reader:
        assert copied(reader, checked(), limit=4095) == (O.OTHER_FRAME, b"")
        assert copied(reader, checked(), limit=5096) == (O.OTHER_FRAME, STATE)
    with reading(stream) as reader:
        assert copied(reader, checked(largest_bytes=4095)) == (O.OTHER_FRAME, b"")
        assert copied(reader, checked(largest_bytes=4096)) == (O.OTHER_FRAME, STATE)


def test_where_a_stream_is_cut_says_how_the_copy_ends() -> None:
    stream = written(checked(), STATE)
    for size in [0, 1, 63]:
        refuse_second(stream[: SECOND + size], checked())
    for size in [64, 65, 64 + 999, 64 + 1000, 64 + 1023]:
        with reading(stream[: SECOND + size]) as reader:
            outcome, found = copied(reader, checked(), Digest())
            payload = min(size - 64, 1000)
            assert (outcome, found) == (O.END_OF_STREAM, STATE[: 4096 + payload])
            assert (reader.frame_offset, reader.frame_bytes) == (SECOND, 1000)
            assert reader.left_bytes == 1000 - payload


@pytest.mark.parametrize("at", [0, 500, 999])
def test_damaged_payload_is_noticed_behind_it(at: int) -> None:
    stream = changed(written(checked(), STATE), SECOND + 64 + at, 0x10)
    with reading(stream) as reader:
        outcome, found = copied(reader, checked(), Digest())
        assert (outcome, found) == (O.DAMAGED, changed(STATE, 4096 + at, 0x10))
        assert (reader.frame_offset, reader.frame_bytes) == (SECOND, 1000)
    with reading(stream) as reader:  # nobody asked
        assert copied(reader, checked())[0] is O.OTHER_FRAME


def test_any_bit_in_the_padding_is_noticed() -> None:
    stream = written(checked(), STATE)
    for at in range(64 + 1000, 64 + 1024):
        with reading(changed(stream, SECOND + at, 0x80)) as reader:
            assert copied(reader, checked(), Digest()) == (O.PADDING_DAMAGED, STATE)
            assert (reader.frame_offset, reader.left_bytes) == (SECOND, 0)


def test_another_tail_ends_the_copy_before_it() -> None:
    template = Template(bytes(8), b"tail", align=8, length_at=0)
    stream, first = written(template, STATE), 8 + 4096 + 4
    for behind in [b"tail"[:size] + b"another" for size in range(4)]:
        other = stream[: first - 4] + behind + stream[first:]
        with reading(other) as reader:
            assert copied(reader, template) == (O.OTHER_TAIL, STATE[:4096])
            assert reader.take(7) == behind[:7]
    with reading(stream[:-1]) as reader:  # cut inside the last one
        assert copied(reader, template) == (O.OTHER_TAIL, STATE)


def test_a_run_of_zeros_is_written_without_travelling() -> None:
    state = pattern(4096) + bytes(300_000)
    stream = written(checked(), state, 1 << 20)
    assert len(stream) == 64 + 4096 + 64
    for digest in (Digest(), None):
        with reading(stream) as reader:
            assert copied(reader, checked(), digest, limit=304_096) == (O.OTHER_FRAME, state)
            assert (reader.device_bytes, reader.zero_bytes) == (304_096, 300_000)
            assert (reader.frame_bytes, reader.offset) == (300_000, len(stream))
    for other, limit in ((checked(zeros_kind=-1), EVERYTHING), (checked(), 304_095)):
        with reading(stream) as reader:
            assert copied(reader, other, limit=limit) == (O.OTHER_FRAME, state[:4096])


def test_the_digest_of_a_run_of_zeros_is_judged_too() -> None:
    stream = written(checked(chain_at=-1), bytes(300_000), 1 << 20)
    with reading(changed(stream, 24, 1)) as reader:
        assert copied(reader, checked(chain_at=-1), Digest())[0] is O.DAMAGED


def test_a_chunk_may_go_on_where_the_template_says_so() -> None:
    state = pattern(4096) + bytes(20_000)
    stream = written(checked(), state, 1 << 20)
    assert (stream[1], stream[SECOND + 1]) == (2, 0)
    with reading(stream) as reader:
        assert copied(reader, checked(), Digest()) == (O.OTHER_FRAME, state)
    with reading(stream) as reader:
        assert copied(reader, checked(continued=0), Digest()) == (O.OTHER_FRAME, b"")


def test_numbers_may_be_big_endian() -> None:
    stream = written(checked(big_endian=True), STATE)
    assert stream[8:24] == struct.pack(">QQ", 4096, 0)
    with reading(stream) as reader:
        assert copied(reader, checked(big_endian=True), Digest()) == (O.OTHER_FRAME, STATE)
    with reading(stream) as reader:
        assert copied(reader, checked(), Digest()) == (O.OTHER_FRAME, b"")


@pytest.mark.parametrize("damaged", ["payload", "nothing"])
def test_what_a_device_refused_can_be_judged(
    filled: Filled, refuse: Refuse, in_child: InChild, damaged: str
) -> None:
    stream = written(checked(), STATE)
    if damaged == "payload":
        stream = changed(stream, SECOND + 64 + 500, 1)

    def fail() -> None:
        reader, digest = StreamReader(src.fileno(), 4096), Digest()
        reader.copy(dst.fileno(), checked(), EVERYTHING, digest, frames=1)
        refuse("write", dst.fileno(), errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            reader.copy(dst.fileno(), checked(), EVERYTHING, digest)
        outcome = reader.copy(-1, checked(), EVERYTHING, digest, frames=1)
        assert outcome is (O.DAMAGED if damaged == "payload" else O.LIMIT_REACHED)
        assert (reader.frame_offset, reader.left_bytes) == (SECOND, 0)

    with filled(stream) as src, filled(b"") as dst:
        in_child(fail)


def test_nothing_that_lies_behind_is_lost() -> None:
    with reading(framed(STATE, 4096) + bytes(8) + b"behind") as reader:
        assert copied(reader, counted()) == (O.OTHER_FRAME, STATE)
        assert reader.take(100) == bytes(8) + b"behind"


pieces = st.one_of(
    st.binary(max_size=3000),
    st.integers(0, 40_000).map(bytes),
    st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 3000)).map(
        lambda it: it[0] * it[1]
    ),
)
contents = st.lists(pieces, max_size=8).map(b"".join)
buffers = st.sampled_from([4096, 5000, 16384, 65536, 70_001])


def through_a_pipe(stream: bytes, sizes: list[int], template: Template, buffer: int) -> bytes:
    source, near = pipe()
    with source:
        feeder = Thread(target=feed, args=(near, stream, sizes))
        feeder.start()
        reader = StreamReader(source.fileno(), buffer)
        outcome, found = copied(reader, template, Digest())
        assert (outcome, reader.offset) == (O.OTHER_FRAME, len(stream))
        assert reader.device_bytes == len(found)
        feeder.join()
    return found


@given(
    contents,
    buffers,
    buffers,
    st.integers(1, 4),
    st.sampled_from([2**power for power in range(13)]),
    st.lists(st.integers(1, 9000), max_size=20),
)
def test_what_is_written_is_read_back(
    filled: Filled, state: bytes, out: int, back: int, slots: int, align: int, sizes: list[int]
) -> None:
    template = checked(align=align)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), out, ring_slots=slots)
        assert writer.copy(src.fileno(), template, EVERYTHING, Digest()) is O.END_OF_STREAM
        stream = whole(dst)
    assert (writer.device_bytes, writer.stream_bytes) == (len(state), len(stream))
    assert through_a_pipe(stream, sizes, template, back) == state


@given(contents, st.integers(1, 4096), buffers, st.binary(max_size=64))
def test_any_alignment_and_tail_is_read_back(
    state: bytes, align: int, buffer: int, tail: bytes
) -> None:
    template = Template(bytes(9), tail, align=align, length_at=1)
    with reading(written(template, state, buffer)) as reader:
        assert copied(reader, template) == (O.OTHER_FRAME, state)
