"""The legacy protocol v1: chunks keep their sizes, and whatever fails is told, on both sides."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stream_oracle
from devices import V1_URL, Simulated, failure_of, into_pipe, names_in, no_leak
from vfiomig import (
    Cancellation,
    CancelledError,
    DeviceIOError,
    DeviceState,
    DeviceStateError,
    IllegalArcError,
    LoadOptions,
    LocalIOError,
    MigrationError,
    NotMigratableError,
    PreCopyLimits,
    QemuFraming,
    SaveOptions,
    SendOptions,
    StreamMismatchError,
    UsageError,
    inspect,
    load,
    open_device,
    receive,
    save,
    send,
    states,
)
from vfiomig._fastcopy import Digest, FrameWriter
from vfiomig.framing import native
from vfiomig.framing.manifest import DeviceEntry, Manifest
from vfiomig.framing.native import FrameFlag, FrameKind
from vfiomig.outgoing import NativeOutgoing
from vfiomig.report import Chunk, Event
from vfiomig.simulator.region import DATA_AT, SimulatedRegion
from vfiomig.uapi import Capability, MigrationInfoAt

S = DeviceState
SIZE, DATA_BYTES = 300_001, 50_001
V1 = f"sim:?protocol=v1&size={SIZE}&region={DATA_BYTES}"
PRE_COPY = SaveOptions(pre_copy=PreCopyLimits())
MODES = {
    "native": SaveOptions(buffer_bytes=4096),
    "pre-copy": PRE_COPY,
    "zeros kept": SaveOptions(buffer_bytes=4096, elide_zeros=False),
    "large buffer": SaveOptions(buffer_bytes=4 << 20),
    "qemu": SaveOptions(framing=QemuFraming(), buffer_bytes=4096),
    "qemu pre-copy": SaveOptions(framing=QemuFraming(), pre_copy=PreCopyLimits()),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


class V1Device(Simulated):
    """A simulated device with its region."""

    def __init__(self, query: str = "", url: str = V1) -> None:
        super().__init__(f"{url}&{query}" if query else url)
        region = self.ops._region  # type: ignore[attr-defined]
        assert isinstance(region, SimulatedRegion)
        self.region = region

    @property
    def chunks(self) -> list[int]:
        """The sizes of the chunks it gave or took."""
        return list(self.region.chunk_sizes)

    def register(self, at: int, width: int = 8) -> int:
        raw = bytearray(width)
        assert self.region.read_into(raw, at) == width
        return int.from_bytes(raw, "little")


# What is moved.


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("query", ["", "zeros=50", "chunk=1000", "dirty=100K"])
def test_every_chunk_is_loaded_with_the_size_it_was_read_with(
    tmp_path: Path, options: SaveOptions, query: str
) -> None:
    with V1Device(query) as source, V1Device("seed=2") as destination:
        report = save(source, tmp_path / "out", options)
        loaded = load(tmp_path / "out", destination)
        assert destination.content() == source.content()
        assert destination.chunks == source.chunks
        assert len(source.chunks) >= SIZE // DATA_BYTES + 1
        assert (source.state(), destination.state()) == (S.RUNNING, S.RUNNING)
        assert (loaded.digest, loaded.device_bytes) == (report.digest, report.device_bytes)


@given(
    size=st.integers(0, 100_000),
    region=st.integers(1, 70_000),
    buffer=st.integers(4096, 70_000),
    zeros=st.sampled_from([0, 50, 100]),
    is_qemu=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_chunks_of_any_size_through_buffers_of_any_size(
    size: int, region: int, buffer: int, zeros: int, *, is_qemu: bool
) -> None:
    region = max(region, size // 100, 1)
    url = f"sim:?protocol=v1&size={size}&region={region}"
    framing = QemuFraming() if is_qemu else "native"
    with V1Device(f"zeros={zeros}", url) as source, V1Device("seed=9", url) as destination:
        options = SaveOptions(framing=framing, buffer_bytes=buffer)
        stream = into_pipe(lambda fd: save(source, fd, options))
        read_fd = os.memfd_create("stream")
        os.write(read_fd, stream)
        os.lseek(read_fd, 0, os.SEEK_SET)
        load(read_fd, destination, LoadOptions(buffer_bytes=max(buffer, 8192)))
        os.close(read_fd)
        assert destination.content() == source.content()
        assert destination.chunks == source.chunks
        if not is_qemu:
            assert stream_oracle.read(stream).states == [source.content()]


def test_a_chunk_larger_than_the_buffer_goes_on_in_frames_that_say_so(tmp_path: Path) -> None:
    details = []
    with V1Device() as device:
        save(device, tmp_path / "out", SaveOptions(buffer_bytes=4096))
        count = len(device.chunks)
    inspect(tmp_path / "out", on_frame=lambda frame: details.append((frame.kind, frame.ends_chunk)))
    assert details.count(("DATA", True)) == count
    assert details.count(("DATA", False)) > 10 * count
    assert not inspect(tmp_path / "out").problem


def test_chunk_events_are_told_only_when_they_are_asked_for(tmp_path: Path) -> None:
    events: list[Event] = []
    with V1Device() as device:
        save(device, tmp_path / "out")
        load(tmp_path / "out", device, on_event=events.append)
        assert not [event for event in events if isinstance(event, Chunk)]
        load(tmp_path / "out", device, LoadOptions(chunk_events=True), on_event=events.append)
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert sum(chunk.length_bytes for chunk in chunks) == SIZE


def test_a_device_may_be_left_stopped_by_a_save_and_not_by_a_load(tmp_path: Path) -> None:
    with V1Device() as source, V1Device("seed=2") as destination:
        save(source, tmp_path / "out", SaveOptions(after=S.STOP))
        assert source.state() is S.STOP
        before = destination.content()
        err = failure_of(lambda: load(tmp_path / "out", destination, LoadOptions(after=S.STOP)))
        assert (type(err), err.code) == (NotMigratableError, 3)
        assert (destination.state(), destination.content()) == (S.RUNNING, before)


def test_what_cannot_be_told_before_a_save_is_told_without_a_warning(tmp_path: Path) -> None:
    with V1Device() as device:
        assert device.stop_copy_length() is None
        assert save(device, tmp_path / "out").warnings == ()
        channel = device.start_session(S.STOP_COPY)
        assert device.stop_copy_length() == SIZE
        assert channel.precopy_info() == (SIZE, 0, False)


# What does not fit.


def test_a_smaller_region_is_refused_before_the_device_is_touched(tmp_path: Path) -> None:
    small = f"sim:?protocol=v1&size={SIZE}&region={DATA_BYTES - 1}"
    with V1Device() as source, V1Device("seed=2", small) as destination:
        save(source, tmp_path / "out")
        before = destination.content()
        err = failure_of(lambda: load(tmp_path / "out", destination))
        assert (type(err), err.code) == (StreamMismatchError, 8)
        assert f"{DATA_AT + DATA_BYTES} bytes" in str(err)
        assert "--allow-mismatch region_bytes" in err.hint
        assert (destination.content(), destination.chunks) == (before, [])


def test_a_region_too_large_for_qemus_records_is_refused_before_anything_is_done(
    tmp_path: Path,
) -> None:
    with V1Device("", "sim:?protocol=v1&size=1000&region=128M") as device:
        options = SaveOptions(framing=QemuFraming())
        with pytest.raises(UsageError, match="migration region of 134221824 bytes"):
            save(device, tmp_path / "out", options)
        assert (device.state(), names_in(tmp_path)) == (S.RUNNING, [])
        save(device, tmp_path / "out")


@pytest.mark.parametrize("framing", ["native", "qemu"])
def test_a_chunk_too_large_for_the_region_is_never_submitted(tmp_path: Path, framing: str) -> None:
    small = f"sim:?protocol=v1&size={SIZE}&region={DATA_BYTES - 1}"
    allowed = LoadOptions(allow_mismatch=frozenset({"region_bytes"}), buffer_bytes=4096)
    options = SaveOptions(framing=QemuFraming() if framing == "qemu" else "native")
    with V1Device() as source, V1Device("seed=2", small) as destination:
        save(source, tmp_path / "out", options)
        err = failure_of(lambda: load(tmp_path / "out", destination, allowed))
        assert (type(err), err.errno) == (DeviceIOError, errno.EMSGSIZE)
        assert "chunk" in str(err)
        assert destination.state() is S.RUNNING
        assert destination.chunks == []
        assert destination.content() == bytes(SIZE)


def test_a_smaller_region_that_holds_every_chunk_may_be_allowed(tmp_path: Path) -> None:
    allowed = LoadOptions(allow_mismatch=frozenset({"region_bytes"}))
    url = "sim:?protocol=v1&size=1000&region={}"
    with V1Device("", url.format(9000)) as source, V1Device("", url.format(1000)) as destination:
        save(source, tmp_path / "out")
        load(tmp_path / "out", destination, allowed)
        assert destination.chunks == [1000]


@pytest.mark.parametrize("urls", [(V1, f"sim:?size={SIZE}"), (f"sim:?size={SIZE}", V1)])
def test_a_stream_of_the_other_protocol_is_refused(tmp_path: Path, urls: tuple[str, str]) -> None:
    with Simulated(urls[0]) as source, Simulated(urls[1]) as destination:
        save(source, tmp_path / "out")
        with pytest.raises(StreamMismatchError, match="protocol"):
            load(tmp_path / "out", destination)
        assert destination.state() is S.RUNNING


def test_a_live_migration_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/socket"
    with V1Device() as device:
        with pytest.raises(NotMigratableError, match="protocol v1"):
            send([device], url, SendOptions())
        with pytest.raises(NotMigratableError, match="protocol v1"):
            receive([device], url)
    assert names_in(tmp_path) == []


# What fails.


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    ("query", "number", "lost"),
    [
        ("fault=read:EIO@0*1", errno.EIO, False),
        ("fault=read:EIO@60000*1", errno.EIO, False),
        ("fault=async-reset:read@60000*1", None, True),
        ("fault=set:EIO@STOP_COPY*1", errno.EIO, False),
        ("fault=set:EIO@STOP_COPY:ERROR*1", errno.EIO, True),
        ("fault=set:EIO@RUNNING*1", errno.EIO, True),
    ],
)
def test_a_save_that_fails_leaves_no_file_and_a_running_device(
    tmp_path: Path, options: SaveOptions, query: str, number: int | None, *, lost: bool
) -> None:
    with V1Device(query) as device:
        before = device.content()
        err = failure_of(lambda: save(device, tmp_path / "out", options))
        assert isinstance(err, DeviceIOError | DeviceStateError)
        # After a reset the registers answer: RUNNING, nothing pending. Only the state tells.
        assert err.errno in ({errno.EBADF, errno.ENODEV} if number is None else {number})
        assert names_in(tmp_path) == []
        assert device.state() is err.actual is S.RUNNING
        if not lost:
            assert device.content() == before
        elif "set:EIO@RUNNING" not in query:
            assert device.content() != before
        save(device, tmp_path / "out", options)
        assert not inspect(tmp_path / "out").problem


@pytest.mark.parametrize("byte", [0, 1, 50_000, 50_001, 299_999])
@pytest.mark.parametrize("framing", ["native", "qemu"])
def test_a_refused_chunk_ends_in_a_reset(tmp_path: Path, byte: int, framing: str) -> None:
    options = SaveOptions(framing=QemuFraming() if framing == "qemu" else "native")
    with V1Device() as source:
        save(source, tmp_path / "out", options)
    with V1Device(f"seed=2&fault=write:ENOSPC@{byte}*1") as device:
        err = failure_of(lambda: load(tmp_path / "out", device))
        assert (type(err), err.errno) == (DeviceIOError, errno.ENOSPC)
        assert "refused its state at byte" in str(err)
        assert device.state() is S.RUNNING
        assert device.content() == bytes(SIZE)
        load(tmp_path / "out", device)


@pytest.mark.parametrize("query", ["fault=async-reset:write@60000*1", "accept=exact"])
def test_a_reset_or_a_refused_commit_loads_nothing(tmp_path: Path, query: str) -> None:
    shorter = V1.replace(f"size={SIZE}", f"size={SIZE - 1}")
    with V1Device("", shorter) as source:
        save(source, tmp_path / "out")
    with V1Device(f"seed=2&{query}") as device:
        err = failure_of(lambda: load(tmp_path / "out", device))
        assert err.aftermath == f"{device.name} was reset and is RUNNING; nothing is loaded"
        assert device.content() == bytes(SIZE)


def test_a_stream_that_ends_inside_a_chunk_is_not_committed(tmp_path: Path) -> None:
    data, digest = os.urandom(5000), Digest()
    with V1Device() as device, (tmp_path / "out").open("wb") as file:
        entry = DeviceEntry("it", device.identity, protocol="v1", region_bytes=device.region_bytes)
        writer = FrameWriter(file.fileno(), 8192)
        outgoing = NativeOutgoing(writer, Manifest("now", "a test", (entry,)), 64, elide_zeros=True)
        outgoing.begin()
        half = native.template(FrameKind.DATA, 64, flags=FrameFlag.CONTINUED)
        writer.put_chunk(half, data, digest)
        outgoing.end(b"", digest)
        assert not inspect(tmp_path / "out").problem
        err = failure_of(lambda: load(tmp_path / "out", device))
        assert (type(err), err.errno) == (DeviceIOError, errno.EPROTO)
        assert (device.state(), device.content(), device.chunks) == (S.RUNNING, bytes(SIZE), [])


def test_a_damaged_stream_never_reaches_its_commit(tmp_path: Path) -> None:
    with V1Device() as source:
        save(source, tmp_path / "out")
    data = bytearray((tmp_path / "out").read_bytes())
    data[-DATA_BYTES] ^= 1
    (tmp_path / "out").write_bytes(data)
    with V1Device("seed=2") as device:
        with pytest.raises(MigrationError, match="damaged"):
            load(tmp_path / "out", device)
        assert (device.state(), device.content()) == (S.RUNNING, bytes(SIZE))


@pytest.mark.parametrize(
    ("offset", "size"), [(31, 10), (0, 10), (DATA_AT, 0), (DATA_AT, DATA_BYTES + 1), (2**64 - 1, 2)]
)
def test_a_region_that_says_what_cannot_be_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, size: int
) -> None:
    told = {MigrationInfoAt.DATA_OFFSET: offset, MigrationInfoAt.DATA_SIZE: size}
    honest = SimulatedRegion._number

    def number(self: SimulatedRegion, at: int) -> int:
        return told.get(MigrationInfoAt(at), 0) if at in told else honest(self, at)

    monkeypatch.setattr(SimulatedRegion, "_number", number)
    with V1Device() as device:
        err = failure_of(lambda: save(device, tmp_path / "out"))
        assert (type(err), err.errno) == (DeviceIOError, errno.EPROTO)
        assert device.state() is S.RUNNING


@pytest.mark.parametrize("framing", ["native", "qemu"])
def test_large_chunks_through_the_ring_of_two_threads(framing: str) -> None:
    url = "sim:?protocol=v1&size=9000001&region=700001&zeros=20"
    options = SaveOptions(framing=QemuFraming() if framing == "qemu" else "native")
    left, right = socket.socketpair()
    with left, right, V1Device("", url) as source, V1Device("seed=2", url) as destination:
        thread = threading.Thread(target=load, args=(right, destination))
        thread.start()
        save(source, left, options)
        left.close()
        thread.join()
        assert destination.content() == source.content()
        assert destination.chunks == source.chunks


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_sink_that_is_full_is_told_and_the_device_runs_again(options: SaveOptions) -> None:
    with V1Device() as device:
        before = device.content()
        err = failure_of(lambda: save(device, Path("/dev/full"), options))
        assert (type(err), err.errno) == (LocalIOError, errno.ENOSPC)
        assert (device.state(), device.content()) == (S.RUNNING, before)


@pytest.mark.parametrize("moment", [1, 4])
def test_a_cancel_between_two_chunks_rolls_back(tmp_path: Path, moment: int) -> None:
    chunks: list[Event] = []
    with V1Device() as device, closing(Cancellation()) as cancellation:

        def stop(event: Event) -> None:
            if isinstance(event, Chunk):
                chunks.append(event)
            if len(chunks) == moment:
                cancellation.cancel()

        options = SaveOptions(chunk_events=True)
        with pytest.raises(CancelledError):
            save(device, tmp_path / "out", options, on_event=stop, cancellation=cancellation)
        assert (device.state(), len(chunks), names_in(tmp_path)) == (S.RUNNING, moment, [])


# The protocol.


def test_the_reserved_bits_of_device_state_are_kept() -> None:
    with V1Device() as device:
        device.region.write(struct.pack("=I", 0xABCD0008 | 0b001), 0)
        device.set_state(S.STOP)
        assert device.register(0, 4) == 0xABCD0008
        device.set_state(S.RUNNING)
        assert device.register(0, 4) == 0xABCD0009


def test_pending_bytes_may_be_read_again_before_the_chunk_is_asked_for() -> None:
    with V1Device() as device:
        channel = device.start_session(S.STOP_COPY)
        assert channel.chunks is not None
        assert {device.register(MigrationInfoAt.PENDING_BYTES) for _ in range(3)} == {SIZE}
        first = bytes(channel.chunks.read())
        assert device.stop_copy_length() == SIZE - DATA_BYTES
        second = bytes(channel.chunks.read())
        assert first + second == device.content()[: 2 * DATA_BYTES]


def test_each_state_has_its_bits_and_impossible_ones_are_an_error() -> None:
    seen = {}
    with V1Device() as device:
        for target in (S.STOP, S.RUNNING, S.PRE_COPY, S.STOP_COPY, S.RUNNING, S.RESUMING):
            device.set_state(target)
            seen[target] = device.register(0, 4)
        device.reset()
        device.set_faults("set:EIO@STOP:ERROR")
        with pytest.raises(DeviceStateError):
            device.set_state(S.STOP)
        assert device.state() is S.ERROR
        assert device.register(0, 4) == 0b110
    assert seen == {
        S.STOP: 0b000,
        S.RUNNING: 0b001,
        S.PRE_COPY: 0b011,
        S.STOP_COPY: 0b010,
        S.RESUMING: 0b100,
    }


@pytest.mark.parametrize("value", [0b101, 0b110, 0b111, 0b010, 0b100])
def test_an_illegal_step_is_refused_and_changes_nothing(value: int) -> None:
    with V1Device() as device:
        device.set_state(S.STOP)
        with pytest.raises(OSError, match="Invalid argument"):
            device.region.write(struct.pack("=I", value), 0)
        assert device.state() is S.STOP


@pytest.mark.parametrize(("at", "width"), [(0, 8), (4, 8), (8, 4), (16, 2), (9, 8), (32, 8)])
def test_a_register_is_accessed_whole_or_not_at_all(at: int, width: int) -> None:
    with V1Device() as device:
        if at < 32:
            with pytest.raises(OSError, match="Invalid argument"):
                device.region.read_into(bytearray(width), at)
        with pytest.raises(OSError, match="Invalid argument"):
            device.region.write(bytes(width), at)


def test_a_way_that_would_let_the_device_run_is_no_way() -> None:
    both = Capability.STOP_COPY | Capability.PRE_COPY
    ways = {
        (start, target): states.path(both, start, target, "v1")
        for start in (S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING, S.PRE_COPY)
        for target in (S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING, S.PRE_COPY)
    }
    for (start, _), way in ways.items():
        assert way is None or S.RUNNING not in way[:-1], start
    assert ways[S.RUNNING, S.STOP_COPY] == (S.STOP_COPY,)
    assert ways[S.STOP_COPY, S.RUNNING] == (S.STOP, S.RUNNING)
    assert ways[S.RESUMING, S.STOP] is ways[S.STOP, S.STOP_COPY] is ways[S.STOP, S.RESUMING] is None
    with V1Device() as device:
        device.set_state(S.STOP)
        with pytest.raises(IllegalArcError):
            device.set_state(S.STOP_COPY)


# The device by name.


def test_the_region_is_a_file_while_the_device_is_open(tmp_path: Path) -> None:
    with open_device(f"sim:{tmp_path}/a?protocol=v1&size=70000&region=64K") as device:
        assert (device.protocol, device.region_bytes) == ("v1", DATA_AT + 65536)
        assert os.path.getsize(tmp_path / "a.region") == DATA_AT + 65536
        device.start_session(S.STOP_COPY)
        assert (tmp_path / "a.region").read_bytes()[:4] == struct.pack("=I", 0b010)
    assert names_in(tmp_path) == ["a", "a.sim"]
    with open_device(f"sim:{tmp_path}/a") as device:  # it stays what it is, and where it was
        assert (device.protocol, device.state()) == ("v1", S.STOP_COPY)


@pytest.mark.parametrize(
    "query",
    [
        *("protocol=v3", "region=64K", "protocol=v1&region=0", "protocol=v1&region=2G"),
        *("protocol=v1&capabilities=stop_copy", "protocol=v1&capabilities=stop_copy,p2p,pre_copy"),
        *("protocol=v1&profile=xe", "protocol=v1&profile=pds"),
    ],
)
def test_a_device_that_cannot_be_is_refused(query: str) -> None:
    with pytest.raises(UsageError):
        open_device(f"sim:?{query}")


def test_a_region_that_cannot_be_made_leaves_the_device_closed(tmp_path: Path) -> None:
    (tmp_path / "a.region").mkdir()
    with pytest.raises(MigrationError):
        open_device(f"sim:{tmp_path}/a?protocol=v1&size=1000")
    (tmp_path / "a.region").rmdir()
    with open_device(f"sim:{tmp_path}/a") as device:
        assert device.state() is S.RUNNING


def test_the_url_of_the_tests_is_of_protocol_v1() -> None:
    with open_device(V1_URL) as device:
        assert device.protocol == "v1"
