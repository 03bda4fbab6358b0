"""load(): every profile and framing gives back what was saved; what it tells, reports and reads."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from devices import (
    URLS,
    V1_URL,
    WITHOUT_PRE_COPY,
    Simulated,
    Trigger,
    entered,
    failure_of,
    into_pipe,
    no_leak,
    seeded,
)
from vfiomig import (
    Cancellation,
    Chunk,
    DeviceBusyError,
    DeviceState,
    Event,
    LoadOptions,
    PreCopyLimits,
    Progress,
    QemuFraming,
    SaveOptions,
    StateChange,
    StreamMismatchError,
    TransferReport,
    UsageError,
    load,
    save,
)
from vfiomig.report import Warning as WarningEvent

S = DeviceState
LIMITS = PreCopyLimits()
MODES = {
    "native": SaveOptions(),
    "native-pre-copy": SaveOptions(pre_copy=LIMITS),
    "qemu": SaveOptions(framing=QemuFraming()),
    "qemu-pre-copy": SaveOptions(framing=QemuFraming(), pre_copy=LIMITS),
}
SAVED = URLS | {"v1": V1_URL}
PAIRS = [
    (profile, mode)
    for profile in SAVED
    for mode in MODES
    if not (MODES[mode].pre_copy and profile in WITHOUT_PRE_COPY)
]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


def saved(
    path: Path,
    url: str,
    options: SaveOptions = SaveOptions(),  # noqa: B008
) -> tuple[bytes, TransferReport]:
    """Save a device; return the state it held when it was stopped, and the report."""
    with Simulated(url) as device:
        report = save(device, path, options)
        return device.content(), report


@pytest.mark.parametrize(("profile", "mode"), PAIRS)
def test_what_was_saved_is_loaded(tmp_path: Path, profile: str, mode: str) -> None:
    options = MODES[mode]
    content, report = saved(tmp_path / "out", seeded(SAVED[profile], 7), options)
    with Simulated(seeded(SAVED[profile], 8)) as device:
        assert device.content() != content
        loaded = load(tmp_path / "out", device)
        assert (device.state(), device.content()) == (S.RUNNING, content)
    assert (loaded.digest, loaded.device_bytes) == (report.digest, report.device_bytes)
    assert (loaded.framing, loaded.stream_bytes) == (report.framing, report.stream_bytes)
    assert loaded.state is S.RUNNING


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_device_that_changes_while_it_is_saved(tmp_path: Path, options: SaveOptions) -> None:
    url = "sim:?size=1M&dirty=500M&bandwidth=50M"
    content, report = saved(tmp_path / "out", url, options)
    with Simulated("sim:?size=1M&seed=5") as device:
        assert load(tmp_path / "out", device).digest == report.digest
        assert device.content() == content


def test_every_state_change_is_told_in_order(tmp_path: Path) -> None:
    saved(tmp_path / "out", "sim:?size=70000")
    events: list[Event] = []
    with Simulated("sim:?size=70000") as device:
        report = load(tmp_path / "out", device, on_event=events.append)
    changes = [event for event in events if isinstance(event, StateChange)]
    down = [S.RUNNING, S.RUNNING_P2P, S.STOP, S.RESUMING]
    steps = [*down, *reversed(down[:-1])]
    assert [(change.before, change.wanted) for change in changes] == list(pairwise(steps))
    assert all(change.errno is None and change.duration_ns > 0 for change in changes)
    assert report.state_changes == tuple(changes)


def test_chunks_and_progress_are_told(tmp_path: Path) -> None:
    size = 3_000_001
    saved(tmp_path / "out", f"sim:?size={size}&chunk=64K")
    events: list[Event] = []
    with Simulated("sim:?size=3000001&bandwidth=8M") as device:
        load(tmp_path / "out", device, LoadOptions(chunk_events=True), on_event=events.append)
    chunks = [event for event in events if isinstance(event, Chunk)]
    ends = [chunk.device_offset + chunk.length_bytes for chunk in chunks]
    assert [0, *ends[:-1]] == [chunk.device_offset for chunk in chunks]
    assert (ends[-1], max(chunk.length_bytes for chunk in chunks)) == (size, 64 << 10)
    told = [event for event in events if isinstance(event, Progress)]
    assert len(told) >= 2
    assert {(event.phase, event.expected_bytes) for event in told} == {("load", size)}
    assert all(one.device_bytes <= other.device_bytes for one, other in pairwise(told))


def test_the_figures_of_the_report_add_up(tmp_path: Path) -> None:
    content, _ = saved(tmp_path / "out", "sim:?size=300001&zeros=50", SaveOptions(config=b"blob"))
    with Simulated("sim:?size=300001") as device:
        report = load(tmp_path / "out", device)
    assert [phase.name for phase in report.phases] == ["load", "commit", "resume"]
    assert [phase.device_bytes for phase in report.phases] == [len(content), 0, 0]
    took_ns = sum(phase.duration_ns for phase in report.phases)
    assert took_ns <= (report.stopped_ns or 0) <= report.duration_ns
    assert (report.config, report.warnings) == (b"blob", ())
    assert report.stream_bytes == (tmp_path / "out").stat().st_size


@pytest.mark.parametrize("framing", ["native", QemuFraming()], ids=["native", "qemu"])
@pytest.mark.parametrize("size", [0, 1, 4181, 1 << 20])
def test_the_config_blob_comes_back(tmp_path: Path, framing: str | QemuFraming, size: int) -> None:
    blob = os.urandom(size)
    saved(tmp_path / "out", "sim:?size=5000", SaveOptions(framing=framing, config=blob))
    with Simulated("sim:?size=5000") as device:
        assert load(tmp_path / "out", device).config == blob


def test_a_device_can_be_left_stopped(tmp_path: Path) -> None:
    content, _ = saved(tmp_path / "out", "sim:?size=5000&seed=2")
    with Simulated("sim:?size=5000") as device:
        report = load(tmp_path / "out", device, LoadOptions(after=S.STOP))
        assert (report.state, report.stopped_ns, device.state()) == (S.STOP, None, S.STOP)
        assert device.content() == content
        with pytest.raises(DeviceBusyError, match="in STOP and not RUNNING"):
            load(tmp_path / "out", device)
        assert (device.state(), device.content()) == (S.STOP, content)


def test_whatever_it_is_read_from_the_state_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "out"
    content, _ = saved(path, "sim:?size=3000001&zeros=30&seed=3")
    os.mkfifo(tmp_path / "fifo")

    def from_path(device: Simulated) -> None:
        load(str(path), device)

    def from_file(device: Simulated) -> None:
        with path.open("rb") as file:
            load(file, device)
            assert not file.closed

    def from_fd(device: Simulated) -> None:
        with path.open("rb") as file:
            load(file.fileno(), device)

    def from_socket(device: Simulated) -> None:
        near, far = socket.socketpair()
        with near:
            written(lambda: copy(path, far.detach()), near, device)

    def from_pipe(device: Simulated) -> None:
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb") as reader:
            written(lambda: copy(path, write_fd), reader, device)

    def from_fifo(device: Simulated) -> None:
        written(lambda: copy(path, tmp_path / "fifo"), tmp_path / "fifo", device)

    for way in (from_path, from_file, from_fd, from_socket, from_pipe, from_fifo):
        with Simulated("sim:?size=3000001") as device:
            way(device)
            assert (device.content(), device.state()) == (content, S.RUNNING), way.__name__


def copy(path: Path, target: int | Path) -> None:
    with open(target, "wb") as file:
        file.write(path.read_bytes())


def written(write: Callable[[], object], source: object, device: Simulated) -> None:
    """Load from a source that a thread writes to."""
    thread = threading.Thread(target=write)
    thread.start()
    try:
        load(source, device)  # type: ignore[arg-type]
    finally:
        thread.join()


def test_a_save_feeds_a_load_through_a_pipe() -> None:
    with Simulated("sim:?size=3000001&seed=4") as one, Simulated("sim:?size=3000001") as other:
        read_fd, write_fd = os.pipe()

        def send() -> None:
            with open(write_fd, "wb") as writer:
                save(one, writer)

        with open(read_fd, "rb") as reader:
            written(send, reader, other)
        assert one.content() == other.content()


def test_another_device_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    content, _ = saved(tmp_path / "out", "sim:?size=5000")
    with Simulated("sim:?profile=mlx5&size=5000&seed=1") as device:
        before = device.content()
        with pytest.raises(StreamMismatchError, match="'sim:generic' is not 'sim:mlx5'") as caught:
            load(tmp_path / "out", device)
        assert (caught.value.code, device.state(), device.content()) == (8, S.RUNNING, before)
        assert "--allow-mismatch driver" in caught.value.hint
        load(tmp_path / "out", device, LoadOptions(allow_mismatch=frozenset({"driver"})))
        assert device.content() == content


def test_options_that_cannot_work_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    saved(tmp_path / "out", "sim:?size=5000")
    refused = [
        LoadOptions(after=S.PRE_COPY),
        LoadOptions(buffer_bytes=1),
        LoadOptions(buffer_bytes=1 << 30),
        LoadOptions(allow_mismatch=frozenset({"colour"})),
    ]
    with Simulated("sim:?size=5000") as device:
        for options in refused:
            with pytest.raises(UsageError):
                load(tmp_path / "out", device, options)
        assert device.state() is S.RUNNING


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "chunk": lambda event: isinstance(event, Chunk),
    "late chunk": lambda event: isinstance(event, Chunk) and event.device_offset > 200_000,
} | {state.name: entered(state) for state in (S.RUNNING_P2P, S.STOP, S.RESUMING)}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_cancel_before_the_commit_resets_the_device(
    tmp_path: Path, moment: Callable[[Event], bool]
) -> None:
    content, _ = saved(tmp_path / "out", "sim:?size=300001&chunk=10K")
    options = LoadOptions(chunk_events=True)
    with Simulated("sim:?size=300001&seed=9") as device, closing(Cancellation()) as stop:
        trigger = Trigger(moment, stop.cancel)
        err = failure_of(
            lambda: load(tmp_path / "out", device, options, on_event=trigger, cancellation=stop)
        )
        assert trigger.fired
        assert (err.code, err.actual, device.state()) == (14, S.RUNNING, S.RUNNING)
        assert err.aftermath == f"{device.name} was reset and is RUNNING; nothing is loaded"
        assert device.content() == bytes(300001)
        load(tmp_path / "out", device)
        assert device.content() == content


def test_a_cancel_reaches_a_load_that_waits_for_its_writer(tmp_path: Path) -> None:
    with Simulated("sim:?size=300001") as device:
        stream = into_pipe(lambda fd: save(device, fd))
    read_fd, write_fd = os.pipe()
    with (
        open(read_fd, "rb") as reader,
        open(write_fd, "wb", buffering=0) as writer,
        Simulated("sim:?size=300001") as device,
        closing(Cancellation()) as stop,
    ):
        writer.write(stream[:40_000])
        trigger = Trigger(entered(S.RESUMING), stop.cancel)
        err = failure_of(lambda: load(reader, device, on_event=trigger, cancellation=stop))
        assert (err.code, device.state()) == (14, S.RUNNING)


def test_a_cancel_at_the_last_moment_is_not_committed(tmp_path: Path) -> None:
    saved(tmp_path / "out", "sim:?size=0")
    with Simulated("sim:?size=5000") as device, closing(Cancellation()) as stop:
        # The warning that there is no state comes after the last byte was read.
        trigger = Trigger(lambda event: isinstance(event, WarningEvent), stop.cancel)
        err = failure_of(
            lambda: load(tmp_path / "out", device, on_event=trigger, cancellation=stop)
        )
        assert (err.code, trigger.fired, device.content()) == (14, True, bytes(5000))
