"""Runs of zeros inside chunks: frames of their own, or holes in a new file."""

import os
import struct
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stream_oracle
from copying import (
    EVERYTHING,
    PAGE,
    Filled,
    InChild,
    copied,
    counted,
    framed,
    pattern,
    reading,
    whole,
    written,
)
from devices import Simulated, into_pipe, no_leak
from stream_oracle import CONTINUED, DATA, ZEROS, Stream
from vfiomig import QemuFraming, SaveOptions, inspect, save
from vfiomig._fastcopy import FrameWriter, Outcome, Template
from vfiomig.fd import OwnedFd

RUN = 4 * PAGE
Part = tuple[str, int]


def parts_of(chunk: bytes) -> list[Part]:
    """How a chunk is to be split: whole pages, and what is left of the last one."""
    pages = (chunk[at : at + PAGE] for at in range(0, len(chunk), PAGE))
    parts: list[Part] = []
    for is_zero, group in groupby(pages, key=lambda page: not any(page)):
        size = sum(map(len, group))
        if is_zero and (size >= RUN or size == len(chunk)):
            parts.append(("Z", size))
        elif parts and parts[-1][0] == "D":
            parts[-1] = ("D", parts[-1][1] + size)
        else:
            parts.append(("D", size))
    return parts


def expected_stream(state: bytes, chunk_bytes: int, align: int) -> bytes:
    stream = b""
    for start in range(0, len(state), chunk_bytes):
        chunk = state[start : start + chunk_bytes]
        at, parts = 0, parts_of(chunk)
        for index, (kind, size) in enumerate(parts):
            goes_on = index < len(parts) - 1
            head = struct.pack("<cBQ", kind.encode(), 0x42 if goes_on else 0x40, size)
            stream += head + bytes(-len(head) % align)
            if kind == "D":
                stream += chunk[at : at + size] + bytes(-size % align)
            at += size
    return stream


def split(align: int = 1) -> Template:
    """Kind, flags (one is set already) and length."""
    more = {"kind_at": 0, "zeros_kind": ord("Z"), "flags_at": 1, "continued": 2}
    return Template(b"D\x40" + bytes(8), align=align, length_at=2, **more)  # type: ignore[arg-type]


def check(state: bytes, chunk_bytes: int, align: int = 1) -> None:
    stream = written(split(align), state, chunk_bytes)
    assert stream == expected_stream(state, chunk_bytes, align)
    with reading(stream) as reader:
        assert copied(reader, split(align)) == (Outcome.OTHER_FRAME, state)


PAGES = {
    "zero": bytes(PAGE),
    "full": b"\xff" * PAGE,
    "first": b"\1" + bytes(PAGE - 1),
    "last": bytes(PAGE - 1) + b"\1",
}
runs = st.tuples(st.sampled_from(sorted(PAGES)), st.integers(1, 6))
ends = st.tuples(st.sampled_from([b"\0", b"\1"]), st.integers(0, PAGE - 1))


@given(
    st.lists(runs, max_size=12),
    ends,
    st.sampled_from([RUN, RUN + 1, 5 * PAGE, 1 << 16, 70_001, 1 << 20]),
    st.sampled_from([1, 64, 512, 4096]),
)
def test_a_chunk_is_split_as_predicted(
    pages: list[tuple[str, int]], end: tuple[bytes, int], chunk_bytes: int, align: int
) -> None:
    state = b"".join(PAGES[name] * count for name, count in pages) + end[0] * end[1]
    check(state, chunk_bytes, align)


@pytest.mark.parametrize("before", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
@pytest.mark.parametrize("behind", [0, 1, PAGE, PAGE + 1])
def test_runs_around_the_shortest_one(before: int, behind: int) -> None:
    for size in [0, 1, PAGE, RUN - 1, RUN, RUN + 1, RUN + PAGE - 1, RUN + PAGE, 2 * RUN]:
        check(b"\1" * before + bytes(size) + b"\1" * behind, 1 << 16)


@pytest.mark.parametrize("size", [1, 100, PAGE - 1, PAGE, PAGE + 1, RUN - 1, RUN, 70_000])
def test_a_chunk_that_is_zero_is_one_frame_however_short(size: int) -> None:
    assert written(split(), bytes(size), 1 << 17) == struct.pack("<cBQ", b"Z", 0x40, size)


def test_no_frame_is_cut_for_a_run_that_does_not_pay() -> None:
    state = (bytes(3 * PAGE) + b"\1" * PAGE) * 4 + bytes(RUN - 1)
    assert written(split(), state, 1 << 17) == struct.pack("<cBQ", b"D", 0x40, len(state)) + state


def test_zeros_are_counted_and_so_are_frames(filled: Filled) -> None:
    state = bytes(RUN) + pattern(PAGE) + bytes(RUN + PAGE) + pattern(10)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 1 << 17)
        writer.copy(src.fileno(), split(), EVERYTHING)
        assert writer.stream_bytes == len(whole(dst)) == 4 * 10 + PAGE + 10
    assert (writer.frames, writer.sequence) == (4, 4)
    assert (writer.device_bytes, writer.zero_bytes) == (len(state), 2 * RUN + PAGE)


# Holes.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory on a file system that has holes."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 20)
    if (tmp_path / "hole").stat().st_blocks:
        pytest.skip("this file system has no holes")
    return tmp_path


def blocks(path: Path, state: bytes, template: Template, *, leave_holes: bool) -> int:
    """Write a state, and bytes behind it; check the counters. Returns st_blocks."""
    with OwnedFd(os.memfd_create("s")) as src, path.open("w+b", buffering=0) as file:
        os.pwrite(src.fileno(), state, 0)
        writer = FrameWriter(file.fileno(), 1 << 17, leave_holes=leave_holes)
        writer.put(b"in front")
        writer.copy(src.fileno(), template, EVERYTHING)
        writer.put(b"behind")
        assert writer.stream_bytes == path.stat().st_size
        os.fsync(file.fileno())
    return path.stat().st_blocks


def test_a_file_with_holes_is_the_same_file(place: Path) -> None:
    state = (pattern(3 * PAGE) + bytes(40 * PAGE)) * 5 + bytes(7)
    with_holes = blocks(place / "a", state, counted(), leave_holes=True)
    without = blocks(place / "b", state, counted(), leave_holes=False)
    expected = b"in front" + framed(state, 1 << 17) + b"behind"
    assert (place / "a").read_bytes() == (place / "b").read_bytes() == expected
    assert with_holes < without / 2


@given(st.lists(runs, max_size=12), ends)
def test_holes_change_no_byte(pages: list[tuple[str, int]], end: tuple[bytes, int]) -> None:
    state = b"".join(PAGES[name] * count for name, count in pages) + end[0] * end[1]
    with OwnedFd(os.memfd_create("s")) as src, OwnedFd(os.memfd_create("out")) as dst:
        os.pwrite(src.fileno(), state, 0)
        writer = FrameWriter(dst.fileno(), 1 << 16, leave_holes=True)
        writer.copy(src.fileno(), counted(), EVERYTHING)
        writer.put(b"behind")
        assert whole(dst) == framed(state, 1 << 16) + b"behind"
        assert writer.zero_bytes == sum(
            size
            for at in range(0, len(state), 1 << 16)
            for kind, size in parts_of(state[at : at + (1 << 16)])
            if kind == "Z"
        )


def test_the_most_holes_that_a_chunk_can_have(in_child: InChild) -> None:
    state = (bytes(RUN) + b"\1" * PAGE) * 51

    def job() -> None:  # a child: what is written behind the list of pieces is another's memory
        with OwnedFd(os.memfd_create("s")) as src, OwnedFd(os.memfd_create("out")) as dst:
            os.pwrite(src.fileno(), state, 0)
            writer = FrameWriter(dst.fileno(), 1 << 20, leave_holes=True)
            writer.copy(src.fileno(), counted(), EVERYTHING)
            assert whole(dst) == framed(state, 1 << 20)
            del writer

    in_child(job)


def test_frames_of_zeros_leave_no_holes(place: Path) -> None:
    state = (pattern(3 * PAGE) + bytes(40 * PAGE)) * 5
    for name, leave_holes in (("a", True), ("b", False)):
        blocks(place / name, state, split(), leave_holes=leave_holes)
    assert (place / "a").read_bytes() == (place / "b").read_bytes()
    assert (place / "a").stat().st_blocks >= (place / "a").stat().st_size // 512


# save(), with the reader that was written from the page.


def streams_of(device: Simulated, path: Path, options: SaveOptions) -> dict[str, bytes]:
    report = save(device, path, options)
    found = {"file": path.read_bytes(), "pipe": into_pipe(lambda fd: save(device, fd, options))}
    for stream in map(stream_oracle.read, found.values()):
        zeros = sum(frame.length or 0 for frame in stream.frames if frame.kind == ZEROS)
        assert zeros == report.zero_bytes
        # Of all frames, save() counts those of the manifest and the trailer too.
        assert len(stream.frames) == report.frames
    return found


def chunks_of(stream: Stream) -> list[list[Part]]:
    chunks: list[list[Part]] = [[]]
    for frame in stream.frames:
        if frame.kind in (DATA, ZEROS):
            chunks[-1].append(("Z" if frame.kind == ZEROS else "D", frame.length or 0))
            if not frame.flags & CONTINUED:
                chunks.append([])
    assert chunks.pop() == []
    return chunks


@pytest.mark.parametrize("zeros", [0, 30, 50, 95, 100])
def test_a_saved_state_is_split_as_predicted(tmp_path: Path, zeros: int) -> None:
    with no_leak(), Simulated(f"sim:?size=3000001&zeros={zeros}") as device:
        content = device.content()
        options = SaveOptions(buffer_bytes=300_000)
        for name, found in streams_of(device, tmp_path / "out", options).items():
            stream, at = stream_oracle.read(found), 0
            assert stream.states == [content], name
            for chunk in chunks_of(stream):
                size = sum(size for _, size in chunk)
                assert chunk == parts_of(content[at : at + size])
                at += size


def test_zeros_can_be_kept(tmp_path: Path) -> None:
    options = SaveOptions(elide_zeros=False)
    with no_leak(), Simulated("sim:?size=3000001&zeros=50") as device:
        for found in streams_of(device, tmp_path / "out", options).values():
            stream = stream_oracle.read(found)
            assert stream.states == [device.content()]
            assert not any(frame.kind == ZEROS or frame.flags for frame in stream.frames)


def test_sections_of_qemu_have_holes_in_a_new_file_only(place: Path) -> None:
    options = SaveOptions(framing=QemuFraming())
    with no_leak(), Simulated("sim:?size=3000001&zeros=95") as device:
        report = save(device, place / "new", options)
        assert report.zero_bytes > 1_000_000
        with (place / "open").open("w+b") as file:
            assert save(device, file, options).zero_bytes == 0
        assert inspect(place / "new").digest == report.digest
    assert (place / "new").read_bytes() == (place / "open").read_bytes()
    assert (place / "new").stat().st_blocks < (place / "open").stat().st_blocks / 2
