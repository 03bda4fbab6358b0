"""The native stream against an oracle that was written from its page, and against old files."""

import hashlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import stream_oracle as oracle
from vfiomig._fastcopy import Digest, FrameWriter, StreamReader
from vfiomig.errors import StreamError
from vfiomig.fd import OwnedFd
from vfiomig.framing.manifest import DeviceEntry, Manifest
from vfiomig.identity import Identity
from vfiomig.incoming import open_incoming
from vfiomig.incoming.checked import FrameInfo
from vfiomig.incoming.native_frames import NativeIncoming
from vfiomig.outgoing import NativeOutgoing

Filled = Callable[[bytes], OwnedFd]
InChild = Callable[[Callable[[], None]], None]
DATA = Path(__file__).parent / "data"
NO_LIMIT = 1 << 40
ENTRY = DeviceEntry(
    "0000:08:00.1",
    Identity("mlx5_vfio_pci", "", "15b3", "101e", "15b3", "0042"),
    ("STOP_COPY", "PRE_COPY"),
    5096,
)
MANIFEST = Manifest("2026-11-23T05:30:00Z", "vfiomig test", (ENTRY,))
CONFIG = bytes(range(251)) * 900


def whole(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)


def written(
    filled: Filled, chunks: list[tuple[str, bytes]], config: bytes, align: int, buffer: int
) -> bytes:
    """Let our side write a stream: each chunk is one read, in pre-copy or in stop-copy."""
    with filled(b"".join(chunk for _, chunk in chunks)) as src, filled(b"") as dst:
        writer, digest = FrameWriter(dst.fileno(), buffer), Digest()
        outgoing = NativeOutgoing(writer, MANIFEST, align, elide_zeros=True)
        outgoing.begin()
        for phase, chunk in chunks:
            template = outgoing.pre_copy if phase == "pre_copy" else outgoing.stop_copy
            writer.copy(src.fileno(), template, len(chunk), digest)
        outgoing.drained()
        outgoing.begin_stop_copy()
        outgoing.end(config, digest)
        assert writer.stream_bytes == len(whole(dst))
        return whole(dst)


def transferred(
    filled: Filled, stream: bytes, *, buffer: int = 4096, max_state: int = NO_LIMIT
) -> tuple[NativeIncoming, bytes, list[FrameInfo]]:
    """Let our side read a stream; return what it says, the device's bytes, and the frames."""
    frames = list[FrameInfo]()
    with filled(stream) as src, filled(b"") as dst:
        incoming = open_incoming(StreamReader(src.fileno(), buffer), max_state)
        assert isinstance(incoming, NativeIncoming)
        incoming.transfer(dst.fileno(), frames.append)
        return incoming, whole(dst), frames


def test_the_byte_that_a_device_refuses_is_told(filled: Filled, in_child: InChild) -> None:
    def load() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        incoming = open_incoming(StreamReader(src.fileno(), 4096), NO_LIMIT)
        with pytest.raises(OSError, match="File too large"):
            incoming.transfer(dst.fileno())
        assert incoming.refused_at == 6000

    stream = oracle.write([oracle.data(b"x" * 5000), oracle.data(b"y" * 5000)])
    with filled(stream) as src, filled(b"") as dst:
        in_child(load)


content = st.builds(
    lambda size, kind: bytes(size) if kind == "zeros" else (kind[:1].encode() * size),
    st.integers(1, 9000),
    st.sampled_from(["zeros", "x", "y"]),
)
phases = st.sampled_from(["pre_copy", "stop_copy"])
aligns = st.sampled_from([64, 4096])
buffers = st.sampled_from([4096, 5000, 1 << 17])


@given(st.lists(st.tuples(phases, content), max_size=8), st.integers(0, 200 << 10), aligns, buffers)
def test_the_oracle_reads_what_we_write(
    filled: Filled, chunks: list[tuple[str, bytes]], config: int, align: int, buffer: int
) -> None:
    stream = oracle.read(written(filled, chunks, CONFIG[:config], align, buffer))
    assert stream.states == [b"".join(chunk for _, chunk in chunks)]
    assert stream.config == CONFIG[:config]
    assert (stream.align, len(stream.manifest["devices"])) == (align, 1)
    frames = [frame for frame in stream.frames if frame.kind in {oracle.DATA, oracle.ZEROS}]
    for phase, flag in (("pre_copy", oracle.PRE_COPY), ("stop_copy", 0)):
        expected = sum(len(chunk) for where, chunk in chunks if where == phase)
        assert expected == sum(f.length or 0 for f in frames if f.flags == flag)
    assert not any(not any(frame.payload) for frame in frames if frame.kind == oracle.DATA)


def test_the_manifest_says_what_it_was_given(filled: Filled) -> None:
    stream = oracle.read(written(filled, [], b"", 64, 4096))
    assert stream.manifest == {
        "created": "2026-11-23T05:30:00Z",
        "tool": "vfiomig test",
        "devices": [
            {
                "name": "0000:08:00.1",
                "protocol": "v2",
                "capabilities": ["STOP_COPY", "PRE_COPY"],
                "stop_copy_length": 5096,
                "identity": {
                    "driver": "mlx5_vfio_pci",
                    "model": "",
                    "vendor_id": "15b3",
                    "device_id": "101e",
                    "subsystem_vendor_id": "15b3",
                    "subsystem_device_id": "0042",
                },
            }
        ],
    }
    assert transferred(filled, written(filled, [], b"", 64, 4096))[0].manifest == MANIFEST


device_frames = st.one_of(
    st.builds(
        oracle.data, st.binary(min_size=1, max_size=300), st.integers(0, 3), st.integers(0, 2)
    ),
    st.builds(oracle.zeros, st.integers(1, 100_000), st.integers(0, 3), st.integers(0, 2)),
    st.builds(oracle.config, st.binary(min_size=1, max_size=5000)),
)
all_aligns = st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096])


@given(st.lists(device_frames, max_size=10), all_aligns)
def test_we_read_what_the_oracle_writes(
    filled: Filled, frames: list[oracle.Frame], align: int
) -> None:
    content = oracle.write(frames, oracle.manifest(3), align=align)
    stream = oracle.read(content)
    incoming, state, told = transferred(filled, content)
    in_order = b"".join(
        frame.payload or bytes(frame.length or 0) for frame in frames if frame.kind != oracle.CONFIG
    )
    assert state == in_order
    assert incoming.device_bytes == len(in_order) == sum(map(len, stream.states))
    assert incoming.digest == xxhash.xxh3_64_intdigest(stream.states[0])
    assert incoming.config == stream.config
    assert incoming.frames == len(stream.frames)
    assert incoming.manifest is not None
    assert [entry.name for entry in incoming.manifest.devices] == ["device0", "device1", "device2"]
    names = {2: "DATA", 3: "ZEROS", 4: "CONFIG", 5: "TRAILER"}
    assert [frame.kind for frame in told] == [names[f.kind] for f in stream.frames[1:]]


def test_both_writers_write_the_same_stream(filled: Filled) -> None:
    chunks = [("pre_copy", b"a" * 5000), ("stop_copy", bytes(100)), ("stop_copy", b"b")]
    ours = written(filled, chunks, b"blob", 64, 8192)
    frames = [
        oracle.data(b"a" * 5000, oracle.PRE_COPY),
        oracle.zeros(100),
        oracle.data(b"b"),
        oracle.config(b"blob"),
    ]
    assert ours == oracle.write(frames, MANIFEST.encode(), align=64)


def test_a_large_config_blob_needs_no_large_buffer(filled: Filled) -> None:
    config = CONFIG[: 200 << 10]
    assert transferred(filled, written(filled, [], config, 64, 1 << 17))[0].config == config


def test_the_end_of_each_frame_is_told_once(filled: Filled) -> None:
    # Many times the buffer, and a last piece that is shorter than a header.
    for length in (16 << 20, (16 << 20) + 1, (32 << 20) + 63):
        stream = oracle.write([oracle.zeros(9), oracle.data(b"x" * length)])
        frames = transferred(filled, stream, buffer=1 << 20)[2]
        assert [f.length_bytes for f in frames] == [9, length, 32]


def test_a_state_has_a_limit(filled: Filled) -> None:
    stream = oracle.write([oracle.data(b"x" * 60), oracle.zeros(40)])
    assert transferred(filled, stream, max_state=100)[0].device_bytes == 100
    with pytest.raises(StreamError, match="more than the 99 that a state may have") as failure:
        transferred(filled, stream, max_state=99)
    assert "--max-state" in failure.value.hint


def test_an_empty_state_is_whole(filled: Filled) -> None:
    incoming, state, _ = transferred(filled, oracle.write([]))
    assert (state, incoming.digest) == (b"", xxhash.xxh3_64_intdigest(b""))


@pytest.mark.parametrize(
    ("name", "sha256", "states", "config"),
    [
        (
            "native-v1-precopy.vmig",
            "304bc3cda0baecc68dd11cae84e45a0f468b565515d51e655ca242324a9a81fc",
            [(5096, 0x117331E9403DBC84)],
            b"",
        ),
        (
            "native-v1-config.vmig",
            "5176a07a58f646d98326b31690adb87cc2507fb7b89af46c9a820bdf9a70c470",
            [(465, 0xF7F080FC66B35C28)],
            bytes.fromhex(
                "bf4c564e4ac0f881cb657b69bcbbf16384c2d8ce9c7906260cbf2085088291ceecbd5a320ef1"
                "41607a259e03ce8575f50e982b1b144fac63c3f144e3e386cc12a0ef260dbbe773d54429d658"
                "6a1c72a5329b785a44413eefab2900c5492ff0f16f309a06908f8c0612c7a88281bcdc793615"
                "e853689ecbae026ebd4d76663c739a8977538414f9e9784a121ffab9607f5563e3f27177"
            ),
        ),
        (
            "native-v1-devices.vmig",
            "e718eb6726a99a0ab8005db489a99ce11fb157eec4e58e61013fd5d81bc0c2c4",
            [(65, 0x8FA7D7930873ACCC), (900, 0x21A6FA5586A098C8), (0, 0x2D06800538D394C2)],
            b"leftright",
        ),
    ],
)
def test_old_files_stay_readable(
    filled: Filled, name: str, sha256: str, states: list[tuple[int, int]], config: bytes
) -> None:
    stream = (DATA / name).read_bytes()
    assert hashlib.sha256(stream).hexdigest() == sha256
    incoming = transferred(filled, stream)[0]
    assert incoming.device_bytes == sum(size for size, _ in states)
    assert incoming.digest == states[0][1]
    assert incoming.config == config
    read = oracle.read(stream)
    assert states == [(len(s), xxhash.xxh3_64_intdigest(s)) for s in read.states]
