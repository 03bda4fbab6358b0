"""QEMU's sections: what QEMU 10.0 wrote is read, and written again byte for byte."""

import hashlib
import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vfiomig._fastcopy import FrameWriter, StreamReader
from vfiomig.errors import StreamError, StreamMismatchError, UsageError
from vfiomig.fd import OwnedFd
from vfiomig.framing.qemu import MAX_CONFIG_BYTES, Section, record_bytes
from vfiomig.incoming import Incoming, open_incoming
from vfiomig.incoming.checked import FrameInfo
from vfiomig.outgoing import QemuOutgoing

Filled = Callable[[bytes], OwnedFd]
DATA = Path(__file__).parent / "data"
GOLDEN = (DATA / "qemu-10.0-mtty-2.sections.bin").read_bytes()
FACTS = json.loads((DATA / "qemu-10.0-mtty-2.json").read_text())
STATE = bytes.fromhex(FACTS["device_state_hex"])
SECTION = Section(38, "0000:00:05.0/vfio")
AT = {section["section"]: section["offset"] for section in reversed(FACTS["sections"])}
BLOB = GOLDEN[AT["FULL"] + 31 + 8 : -13]
TAG = re.compile(rb"\xff{4}\xef\x10\x00")
END, CONFIG, SETUP, DATA_TAG, INIT_DATA_SENT, LOAD_READY = (
    bytes.fromhex(f"ffffffffef10000{number}") for number in range(1, 7)
)


def whole(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)


def transferred(filled: Filled, stream: bytes, limit: int = 1 << 40) -> tuple[Incoming, bytes]:
    with filled(stream) as src, filled(b"") as dst:
        incoming = open_incoming(StreamReader(src.fileno(), 4096), limit)
        incoming.transfer(dst.fileno())
        return incoming, whole(dst)


def refused(filled: Filled, stream: bytes, why: str) -> StreamError:
    with pytest.raises(StreamError, match=why) as failure:
        transferred(filled, stream)
    assert failure.value.code == 7
    assert 0 <= failure.value.offset <= len(stream)
    return failure.value


def written(filled: Filled, pre: list[bytes], stop: list[bytes], config: bytes = b"") -> bytes:
    """Let our side write the sections; an empty chunk in pre-copy is a read that found nothing."""
    with filled(b"".join(pre + stop)) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 1 << 16)
        outgoing = QemuOutgoing(writer, SECTION)
        outgoing.begin()
        for chunk in pre:
            if chunk:
                writer.copy(src.fileno(), outgoing.pre_copy, len(chunk))
            else:
                outgoing.drained()
        outgoing.begin_stop_copy()
        for chunk in stop:
            writer.copy(src.fileno(), outgoing.stop_copy, len(chunk))
        outgoing.end(config, None)
        return whole(dst)


def test_the_file_is_the_one_that_qemu_wrote() -> None:
    assert hashlib.sha256(GOLDEN).hexdigest() == FACTS["sha256"]
    assert len(GOLDEN) == FACTS["bytes"]
    assert [len(TAG.findall(GOLDEN)), len(STATE)] == [2 + 2 + 1 + 2 + 2, 96]


def test_what_qemu_wrote_is_read(filled: Filled) -> None:
    incoming, state = transferred(filled, GOLDEN)
    assert (incoming.framing, incoming.section, incoming.manifest) == ("qemu", SECTION, None)
    assert state == STATE
    assert incoming.device_bytes == sum(FACTS["device_state_pieces"])
    assert incoming.digest == xxhash.xxh3_64_intdigest(STATE)
    assert incoming.config == BLOB
    assert BLOB.startswith(b"\0\0\0\x02HCS2")


def test_we_write_what_qemu_wrote(filled: Filled) -> None:
    ours = written(filled, [STATE[:24], b""], [STATE[24:]], BLOB)
    for section in FACTS["sections"]:
        start, end = section["offset"], section["offset"] + section["bytes"]
        assert ours[start:end] == GOLDEN[start:end], section["section"]
    assert ours == GOLDEN
    assert written(filled, [STATE[:24], b""], [STATE[24:]]) == GOLDEN[: AT["FULL"]]


def test_a_stream_without_full_has_no_config(filled: Filled) -> None:
    incoming, state = transferred(filled, GOLDEN[: AT["FULL"]])
    assert (state, incoming.config) == (STATE, b"")


chunk_lists = st.lists(st.binary(max_size=200), max_size=6)
blobs = st.one_of(st.binary(max_size=300), st.just(END + SECTION.footer), st.just(END * 40))


@given(chunk_lists, chunk_lists, blobs)
def test_what_we_write_is_read(
    filled: Filled, pre: list[bytes], stop: list[bytes], config: bytes
) -> None:
    stop = [chunk for chunk in stop if chunk]
    incoming, state = transferred(filled, written(filled, pre, stop, config))
    assert state == b"".join(pre + stop)
    assert incoming.config == config
    assert incoming.frames == sum(map(bool, pre)) + len(stop)


def test_every_truncation_but_one_is_refused(filled: Filled) -> None:
    # Behind END the file looks whole: QEMU's sections have no total, and FULL may be missing.
    with filled(GOLDEN) as file:
        for size in reversed(range(len(GOLDEN))):
            os.ftruncate(file.fileno(), size)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            reader = StreamReader(file.fileno(), 4096)
            if size == AT["FULL"]:
                open_incoming(reader, 1 << 40).transfer(-1)
                continue
            with pytest.raises(StreamError) as failure:
                open_incoming(reader, 1 << 40).transfer(-1)
            assert failure.value.code == 7
            assert failure.value.offset <= size


@pytest.mark.parametrize("size", range(1, AT["PART"]))
def test_a_damaged_start_is_refused(filled: Filled, size: int) -> None:
    damaged = GOLDEN[: size - 1] + bytes([GOLDEN[size - 1] ^ 0xFF]) + GOLDEN[size:]
    with pytest.raises((StreamError, StreamMismatchError)):
        transferred(filled, damaged)


@pytest.mark.parametrize("ending", [END, INIT_DATA_SENT, LOAD_READY])
def test_a_section_ends_with_any_of_qemus_endings(filled: Filled, ending: bytes) -> None:
    part = b"\2" + GOLDEN[1:5] + ending + SECTION.footer
    end = b"\3" + GOLDEN[1:5] + ending + SECTION.footer
    full = SECTION.full(b"")[:31] + ending + SECTION.footer
    incoming, state = transferred(filled, SECTION.start() + part + end + full)
    assert (state, incoming.frames, incoming.config) == (b"", 0, b"")


@pytest.mark.parametrize(
    "tag", [bytes(8), b"\xff" * 8, END[:7] + b"\x07", END[:7] + b"\0", END[::-1]]
)
def test_an_unknown_tag_is_refused(filled: Filled, tag: bytes) -> None:
    at = AT["PART"] + 5
    failure = refused(filled, GOLDEN[:at] + tag + GOLDEN[at + 8 :], f"unknown tag {tag.hex()}")
    assert failure.offset == at
    at = AT["FULL"] + 31
    refused(filled, GOLDEN[:at] + tag + GOLDEN[at + 8 :], "unknown tag")


@pytest.mark.parametrize("tag", [SETUP, CONFIG])
def test_a_tag_where_it_does_not_belong_is_refused(filled: Filled, tag: bytes) -> None:
    at = AT["END"] + 5
    assert refused(filled, GOLDEN[:at] + tag + GOLDEN[at + 8 :], "in a END section").offset == at
    at = AT["FULL"] + 31
    refused(filled, GOLDEN[:at] + SETUP + GOLDEN[at + 8 :], "SETUP in a FULL section")


@pytest.mark.parametrize("length", [25, 2**31, 2**32, 2**40 + 1, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_refused_and_not_allocated(filled: Filled, length: int) -> None:
    at = AT["PART"] + 13
    tracemalloc.start()
    try:
        stream = GOLDEN[:at] + struct.pack(">Q", length) + GOLDEN[at + 8 :]
        refused(filled, stream, r"unknown tag|ends inside|may have here")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_state_has_a_limit(filled: Filled) -> None:
    assert transferred(filled, GOLDEN, 96)[1] == STATE
    with pytest.raises(StreamError, match="more than the 95 that a state may have"):
        transferred(filled, GOLDEN, 95)


@pytest.mark.parametrize("section", ["PART", "END", "FULL"])
def test_a_section_of_another_device_is_refused(filled: Filled, section: str) -> None:
    at = AT[section] + 4
    damaged = GOLDEN[:at] + b"\x27" + GOLDEN[at + 1 :]
    assert refused(filled, damaged, r"this device begins here|no FULL section").offset == at - 4


@pytest.mark.parametrize("section", ["PART", "END", "FULL"])
@pytest.mark.parametrize("back", range(5))
def test_a_wrong_footer_is_refused(filled: Filled, section: str, back: int) -> None:
    ends = {s["section"]: s["offset"] + s["bytes"] for s in FACTS["sections"]}
    at = ends[section] - 1 - back
    damaged = GOLDEN[:at] + bytes([GOLDEN[at] ^ 0x10]) + GOLDEN[at + 1 :]
    refused(filled, damaged, r"the footer is damaged|does not end where")


def test_a_missing_end_is_refused(filled: Filled) -> None:
    refused(filled, GOLDEN[: AT["END"]] + GOLDEN[AT["FULL"] :], "neither PART nor END")
    refused(filled, GOLDEN[: AT["END"]], "ends inside the device's sections, before the END")


def test_bytes_behind_the_last_section_are_refused(filled: Filled) -> None:
    refused(filled, GOLDEN + b"\0", "does not end where the stream does")
    refused(filled, GOLDEN[: AT["FULL"]] + b"\0" * 40, "are no FULL section")
    empty_full = SECTION.full(b"")[:31] + END + SECTION.footer
    refused(filled, GOLDEN[: AT["FULL"]] + empty_full + b"x", "after the end")


def test_too_much_config_is_refused(filled: Filled) -> None:
    stream = written(filled, [], [], bytes(MAX_CONFIG_BYTES))
    assert len(transferred(filled, stream)[0].config) == MAX_CONFIG_BYTES
    refused(filled, written(filled, [], [], bytes(MAX_CONFIG_BYTES + (1 << 17))), "too large")


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"QEVM\0\0\0\3", "of a whole QEMU machine"),
        (b"\1\0\0\0\x26\0" + bytes(58), "no section of a VFIO device"),
        (b"\1\0\0\0\x26\2\xff\xfe" + bytes(58), "no section of a VFIO device"),
        (b"\1\0\0\0\x26\3ram" + bytes(58), "of 'ram', and that is no VFIO device"),
        (b"\1\0\0\0\x26\4\x1b[2J" + bytes(58), r"of '\\x1b\[2J', and"),
        (b"\2\0\0\0\x26" + bytes(58), "neither a vfiomig stream nor"),
    ],
)
def test_what_is_no_vfio_section_is_called_so(filled: Filled, stream: bytes, why: str) -> None:
    with pytest.raises(StreamMismatchError, match=why) as failure:
        transferred(filled, stream)
    assert failure.value.code == 8


def test_the_end_of_each_record_is_told_once(filled: Filled) -> None:
    length, frames = (16 << 20) + 1, list[FrameInfo]()
    record = DATA_TAG + struct.pack(">Q", length) + b"x" * length
    stream = SECTION.start() + SECTION.head(3) + record + SECTION.end()  # type: ignore[arg-type]
    with filled(stream) as src:
        incoming = open_incoming(StreamReader(src.fileno(), 1 << 20), 1 << 40)
        incoming.transfer(-1, frames.append)
    assert [(f.kind, f.length_bytes) for f in frames] == [("END", 0), ("DATA", length)]


@pytest.mark.parametrize(
    ("stop_copy_length", "expected"),
    [
        (None, 1 << 20),
        (0, 64 << 10),
        (96, 64 << 10),
        (1000, 64 << 10),
        (64 << 10, 64 << 10),
        (100_000, 100_000),
        ((1 << 20) - 1, (1 << 20) - 1),
        (1 << 30, 1 << 20),
        (2**64 - 1, 1 << 20),
    ],
)
def test_a_record_is_as_long_as_qemus_but_sane(stop_copy_length: int | None, expected: int) -> None:
    assert record_bytes(stop_copy_length) == expected


@pytest.mark.parametrize(
    ("number", "idstr"), [(-1, "vfio"), (2**32, "vfio"), (1, ""), (1, "x" * 256)]
)
def test_a_section_that_cannot_be_written_is_refused(number: int, idstr: str) -> None:
    with pytest.raises(UsageError):
        Section(number, idstr)


@pytest.mark.parametrize("idstr", ["vfio", "é" * 127, "0000:00:05.0/vfio", "x" * 250 + "/vfio"])
def test_a_section_is_named_as_the_guest_knows_it(filled: Filled, idstr: str) -> None:
    section = Section(2**32 - 1, idstr)
    with filled(section.start()) as src:
        reader = StreamReader(src.fileno(), 4096)
        if idstr.endswith("vfio"):
            assert open_incoming(reader, 1).section == section
        else:
            with pytest.raises(StreamMismatchError):
                open_incoming(reader, 1)
