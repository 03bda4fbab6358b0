"""Damaged native streams are refused with code 7, or 8 where they do not look like ours at all."""

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stream_oracle as oracle
from vfiomig._fastcopy import StreamReader
from vfiomig.errors import StreamError, StreamMismatchError
from vfiomig.fd import OwnedFd
from vfiomig.incoming import open_incoming

Filled = Callable[[bytes], OwnedFd]
GOLDEN = (Path(__file__).parent / "data" / "native-v1-config.vmig").read_bytes()
SOUND = [
    oracle.data(b"a" * 70, oracle.PRE_COPY),
    oracle.zeros(100),
    oracle.data(b"b" * 64),
    oracle.config(b"config"),
]
LENGTHS = [0, 2**31, 2**32, 2**63, 2**64 - 1]


def verdict(fd: int) -> int:
    """Read the stream in a file from its beginning: 0 when it is sound, or the error's code."""
    os.lseek(fd, 0, os.SEEK_SET)
    size = os.fstat(fd).st_size
    try:
        incoming = open_incoming(StreamReader(fd, 4096), 1 << 40)
        incoming.transfer(-1)
    except StreamError as err:
        return err.code if 0 <= err.offset <= size else -1
    except StreamMismatchError as err:
        return err.code
    return 0


def refused(filled: Filled, stream: bytes) -> StreamError:
    with filled(stream) as file, pytest.raises(StreamError) as failure:
        open_incoming(StreamReader(file.fileno(), 4096), 1 << 40).transfer(-1)
    with pytest.raises(oracle.Refused):
        oracle.read(stream)
    return failure.value


def frames_of(stream: bytes) -> list[bytes]:
    """Cut a stream of align 64 at its frames; the prologue is the first piece."""
    pieces, at = [stream[:64]], 64
    for frame in oracle.read(stream).frames:
        end = at + 64 + len(frame.payload) + -len(frame.payload) % 64
        pieces.append(stream[at:end])
        at = end
    assert b"".join(pieces) == stream
    return pieces


def test_every_truncation_is_refused(filled: Filled) -> None:
    with filled(GOLDEN) as file:
        assert verdict(file.fileno()) == 0
        for size in reversed(range(len(GOLDEN))):
            os.ftruncate(file.fileno(), size)
            assert verdict(file.fileno()) == 7, size


def test_every_flipped_bit_is_refused(filled: Filled) -> None:
    with filled(GOLDEN) as file:
        for at, byte in enumerate(GOLDEN):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                assert verdict(file.fileno()) == (7 if at >= 8 else 8), (at, bit)
            os.pwrite(file.fileno(), bytes([byte]), at)
        assert verdict(file.fileno()) == 0


@given(st.integers(0, len(GOLDEN) - 2), st.integers(2, 4096))
def test_bursts_are_refused(filled: Filled, at: int, size: int) -> None:
    damaged = GOLDEN[:at] + bytes(~b & 255 for b in GOLDEN[at : at + size]) + GOLDEN[at + size :]
    with filled(damaged) as file:
        assert verdict(file.fileno()) == (7 if at >= 8 else 8)


def test_frames_that_are_missing_twice_there_or_moved_are_refused(filled: Filled) -> None:
    pieces = frames_of(oracle.write(SOUND))
    count = len(pieces)
    for one in range(1, count):
        refused(filled, b"".join(pieces[:one] + pieces[one + 1 :]))
        refused(filled, b"".join(pieces[: one + 1] + pieces[one:]))
    for one, other in permutations(range(1, count), 2):
        swapped = list(pieces)
        swapped[one], swapped[other] = pieces[other], pieces[one]
        refused(filled, b"".join(swapped))


def test_frames_of_another_stream_do_not_fit(filled: Filled) -> None:
    mine, theirs = (
        frames_of(oracle.write(SOUND)),
        frames_of(oracle.write(SOUND, oracle.manifest(2))),
    )
    for at in range(2, len(mine)):
        assert "not the one that belongs here" in str(
            refused(filled, b"".join([*mine[:at], theirs[at], *mine[at + 1 :]]))
        )


@pytest.mark.parametrize("behind", [b"\0", b"x", bytes(64), oracle.write(SOUND), b"VMfr"])
def test_bytes_behind_the_trailer_are_refused(filled: Filled, behind: bytes) -> None:
    stream = oracle.write(SOUND)
    failure = refused(filled, stream + behind)
    assert "after the end" in str(failure)
    assert failure.offset == len(stream)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_lies_is_refused_before_anything_is_allocated(
    filled: Filled, kind: int, length: int
) -> None:
    stream = oracle.write([oracle.Frame(kind, b"x" * 64, length=length)])
    tracemalloc.start()
    try:
        failure = refused(filled, stream)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert f"frame of {length} bytes" in str(failure)


@pytest.mark.parametrize(
    ("kind", "most"), [(1, 64 << 10), (2, 128 << 20), (3, 128 << 20), (4, 64 << 10), (5, 4112)]
)
def test_a_length_above_the_limit_of_its_kind_is_refused(
    filled: Filled, kind: int, most: int
) -> None:
    stream = oracle.write([oracle.Frame(kind, b"x", length=most + 1)])
    assert f"frame of {most + 1} bytes" in str(refused(filled, stream))


def test_the_longest_frames_are_read(filled: Filled) -> None:
    frames = [oracle.zeros(128 << 20), oracle.config(b"c" * (64 << 10)), oracle.config(b"d")]
    with filled(oracle.write(frames)) as file:
        assert verdict(file.fileno()) == 0


def test_too_much_config_is_refused(filled: Filled) -> None:
    frames = [oracle.config(b"c" * (64 << 10))] * 256
    with filled(oracle.write(frames)) as file:
        assert verdict(file.fileno()) == 0
    assert "too large" in str(refused(filled, oracle.write([*frames, oracle.config(b"c")])))


@pytest.mark.parametrize("kind", [0, 6, 7, 127, 255])
def test_an_unknown_kind_is_refused(filled: Filled, kind: int) -> None:
    stream = oracle.write([oracle.Frame(kind, b"x")])
    assert f"unknown kind of frame {kind}" in str(refused(filled, stream))


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("kind", [2, 3, 4])
def test_reserved_flags_are_refused(filled: Filled, kind: int, bit: int) -> None:
    stream = oracle.write([oracle.Frame(kind, b"x" if kind != 3 else b"", 1 << bit, length=1)])
    if bit < 2 and kind in {oracle.DATA, oracle.ZEROS}:
        with filled(stream) as file:
            assert verdict(file.fileno()) == 0
    else:
        assert "reserved bits" in str(refused(filled, stream))


@pytest.mark.parametrize("at", range(24))
def test_reserved_bytes_are_refused(filled: Filled, at: int) -> None:
    reserved = bytes(at) + b"\x80" + bytes(23 - at)
    refused(filled, oracle.write([replace(SOUND[0], reserved=reserved)]))
    refused(filled, oracle.write([oracle.Frame(oracle.CONFIG, b"c", reserved=reserved)]))


@pytest.mark.parametrize("kind", [1, 4, 5])
def test_a_device_where_there_is_none_is_refused(filled: Filled, kind: int) -> None:
    refused(filled, oracle.write([oracle.Frame(kind, b"x", device=1)], oracle.manifest(2)))


def test_a_device_that_is_not_in_the_manifest_is_refused(filled: Filled) -> None:
    stream = oracle.write([oracle.data(b"x", device=1)])
    assert "device 1 is not in the manifest" in str(refused(filled, stream))


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence": 7},
        {"sequence": 2**64 - 1},
        {"checksum": 0},
        {"padding": b"\1" + bytes(57)},
        {"padding": bytes(57) + b"\1"},
        {"padding": b""},
    ],
)
@pytest.mark.parametrize("frame", SOUND)
def test_a_frame_that_says_something_wrong_is_refused(
    filled: Filled, frame: oracle.Frame, wrong: dict[str, int]
) -> None:
    if "padding" in wrong and frame.kind == oracle.ZEROS:
        pytest.skip("a ZEROS frame has no payload to pad")
    short = frame if frame.kind == oracle.ZEROS else replace(frame, payload=b"config")
    refused(filled, oracle.write([replace(short, **wrong)]))  # type: ignore[arg-type]


def test_a_stream_begins_with_its_manifest_and_has_only_one(filled: Filled) -> None:
    assert "DATA where the manifest" in str(refused(filled, oracle.write(SOUND, whole=False)))
    second = oracle.Frame(oracle.MANIFEST, b"{}")
    assert "second MANIFEST" in str(refused(filled, oracle.write([second])))


def test_totals_that_are_not_those_of_the_stream_are_refused(filled: Filled) -> None:
    frames = [oracle.Frame(oracle.MANIFEST, json.dumps(oracle.manifest()).encode())]
    frames.append(oracle.data(b"x"))
    right = oracle.read(oracle.write(frames[1:])).frames[-1].payload
    sound = oracle.write([*frames, oracle.Frame(oracle.TRAILER, right)], whole=False)
    assert oracle.read(sound).states == [b"x"]
    wrong = [right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :] for at in range(32)]
    for totals in (*wrong, right[:8], right[:16], right[:-1], right + bytes(16), bytes(4112)):
        stream = oracle.write([*frames, oracle.Frame(oracle.TRAILER, totals)], whole=False)
        assert "trailer" in str(refused(filled, stream))


@pytest.mark.parametrize(
    "start",
    [
        oracle.prologue(align=32),
        oracle.prologue(align=8192),
        oracle.prologue(align=96).ljust(96, b"\0"),
        oracle.prologue(align=65),
        oracle.prologue(align=0x100),
        oracle.prologue(flags=1),
        oracle.prologue(reserved=bytes(31) + b"\1"),
    ],
)
def test_a_prologue_that_says_something_wrong_is_refused(filled: Filled, start: bytes) -> None:
    refused(filled, oracle.write(SOUND, start=start))


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_a_stream_of_another_version_says_what_to_do(filled: Filled, version: int) -> None:
    stream = oracle.write(SOUND, start=oracle.prologue(version=version, flags=1))
    with filled(stream) as file, pytest.raises(StreamMismatchError) as failure:
        open_incoming(StreamReader(file.fileno(), 4096), 1 << 40)
    assert failure.value.code == 8
    assert f"version {version}" in str(failure.value)
    assert "load it with the version" in failure.value.hint


@pytest.mark.parametrize(
    "stream", [b"x", b"GIF89a", b"VMIG" * 100, GOLDEN[7::-1] + GOLDEN[8:], b"{}", bytes(5000)]
)
def test_what_is_no_stream_of_ours_is_called_so(filled: Filled, stream: bytes) -> None:
    with filled(stream) as file:
        assert verdict(file.fileno()) == 8


any_frame = st.builds(
    oracle.Frame,
    kind=st.integers(0, 6),
    payload=st.binary(max_size=100),
    flags=st.sampled_from([0, 0, 1, 2, 3, 4]),
    device=st.sampled_from([0, 0, 1, 2]),
    length=st.sampled_from([None, None, None, None, 1, 64, 100]),
    reserved=st.sampled_from([bytes(24)] * 7 + [bytes(23) + b"\1"]),
)


@given(st.lists(any_frame, max_size=4), st.sampled_from(["whole", "only these frames"]))
def test_the_oracle_and_we_refuse_the_same_streams(
    filled: Filled, frames: list[oracle.Frame], kind: str
) -> None:
    stream = oracle.write(frames, oracle.manifest(2), whole=kind == "whole")
    try:
        oracle.read(stream)
        expected = 0
    except oracle.Refused:
        expected = 7
    with filled(stream) as file:
        assert verdict(file.fileno()) == expected
