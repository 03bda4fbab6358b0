"""save(): what it tells, what it reports, where it writes, and that it can be stopped anywhere."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from devices import Simulated, failure_of, names_in, no_leak
from vfiomig import (
    Chunk,
    DeviceBusyError,
    DeviceState,
    Event,
    NotMigratableError,
    PreCopyLimits,
    Progress,
    QemuFraming,
    SaveOptions,
    StateChange,
    UsageError,
    inspect,
    save,
)
from vfiomig.incoming.checked import FrameInfo
from vfiomig.report import Warning as WarningEvent

S = DeviceState
FRAMINGS = {"native": SaveOptions(), "qemu": SaveOptions(framing=QemuFraming())}
PRE_COPY = SaveOptions(pre_copy=PreCopyLimits())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


# What it tells.


def test_every_state_change_is_told_in_order_with_its_time(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=70000") as device:
        report = save(device, tmp_path / "out", PRE_COPY, on_event=events.append)
    changes = [event for event in events if isinstance(event, StateChange)]
    steps = [S.RUNNING, S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY, S.STOP, S.RUNNING_P2P, S.RUNNING]
    assert [(change.before, change.wanted) for change in changes] == list(pairwise(steps))
    assert all(change.actual is change.wanted for change in changes)
    assert all(change.errno is None and change.by == "set" for change in changes)
    assert all(change.duration_ns > 0 for change in changes)
    ends = [change.started_ns + change.duration_ns for change in changes]
    assert all(end <= after.started_ns for end, after in zip(ends, changes[1:], strict=False))
    assert report.state_changes == tuple(changes)


def test_a_state_change_that_fails_is_told_with_its_errno(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=5000&fault=set:EIO@STOP_COPY*1") as device:
        failure_of(lambda: save(device, tmp_path / "out", on_event=events.append))
    failed = [event for event in events if isinstance(event, StateChange) and event.errno]
    assert [(event.before, event.wanted, event.actual, event.errno) for event in failed] == [
        (S.STOP, S.STOP_COPY, S.STOP, 5)
    ]


@pytest.mark.parametrize("options", FRAMINGS.values(), ids=FRAMINGS)
def test_chunk_events_cover_the_state_without_a_gap(tmp_path: Path, options: SaveOptions) -> None:
    events: list[Event] = []
    chunked = SaveOptions(
        framing=options.framing, chunk_events=True, buffer_bytes=1 << 16, pre_copy=PRE_COPY.pre_copy
    )
    with Simulated("sim:?size=300001&chunk=1000") as device:
        report = save(device, tmp_path / "out", chunked, on_event=events.append)
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert all(0 < chunk.length_bytes <= 1000 for chunk in chunks)
    ends = [chunk.device_offset + chunk.length_bytes for chunk in chunks]
    assert [0, *ends[:-1]] == [chunk.device_offset for chunk in chunks]
    assert ends[-1] == report.device_bytes
    assert all(one.at_ns <= other.at_ns for one, other in pairwise(chunks))


def test_without_being_asked_no_chunk_is_told(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=300001") as device:
        save(device, tmp_path / "out", on_event=events.append)
    assert not [event for event in events if isinstance(event, Chunk)]


def test_progress_rises_and_says_its_phase(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=2M&bandwidth=3M") as device:
        save(device, tmp_path / "out", PRE_COPY, on_event=events.append)
    told = [event for event in events if isinstance(event, Progress)]
    assert len(told) >= 2
    assert {event.phase for event in told} <= {"pre-copy", "stop-copy"}
    assert {event.expected_bytes for event in told} == {2 << 20}
    for one, other in pairwise(told):
        assert one.device_bytes <= other.device_bytes
        assert other.elapsed_ns - one.elapsed_ns >= 90_000_000  # ten times a second


def test_a_device_that_does_not_tell_its_size_is_warned_about(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=5000&reported_size=error") as device:
        report = save(device, tmp_path / "out", on_event=events.append)
    warnings = [event.text for event in events if isinstance(event, WarningEvent)]
    assert warnings == list(report.warnings)
    assert "size" in warnings[0]


# What it reports.


@pytest.mark.parametrize("options", FRAMINGS.values(), ids=FRAMINGS)
def test_the_figures_of_the_report_add_up(tmp_path: Path, options: SaveOptions) -> None:
    path = tmp_path / "out"
    with Simulated("sim:?size=3000001&zeros=30") as device:
        report = save(device, path, options)
        content = device.content()
    found = inspect(path)
    assert found.sound
    assert report.device_bytes == len(content) == found.device_bytes
    assert report.digest == xxhash.xxh3_64_hexdigest(content) == found.digest
    assert report.stream_bytes == path.stat().st_size == found.sound_bytes
    assert report.framing == found.framing
    assert [phase.name for phase in report.phases] == ["stop-copy", "resume", "commit"]
    assert [phase.device_bytes for phase in report.phases] == [len(content), 0, 0]
    assert sum(phase.duration_ns for phase in report.phases) <= report.duration_ns
    assert 0 < (report.stopped_ns or 0) <= report.duration_ns
    assert report.state is S.RUNNING


def test_a_pre_copy_and_its_bytes_are_in_the_report(tmp_path: Path) -> None:
    with Simulated("sim:?size=300001&dirty=100M") as device:
        report = save(device, tmp_path / "out", PRE_COPY)
    names = ["pre-copy", "stop-copy", "resume", "commit"]
    assert [phase.name for phase in report.phases] == names
    assert report.phases[0].device_bytes >= 300001
    assert sum(phase.device_bytes for phase in report.phases) == report.device_bytes
    found = inspect(tmp_path / "out")
    assert found.pre_copy_bytes == report.phases[0].device_bytes


def test_pre_copy_is_bounded_by_rounds_and_bytes(tmp_path: Path) -> None:
    for limits in (PreCopyLimits(rounds=1), PreCopyLimits(device_bytes=100_000)):
        with Simulated("sim:?size=300001&dirty=1G") as device:
            report = save(device, tmp_path / f"{limits.rounds}", SaveOptions(pre_copy=limits))
        assert report.phases[0].device_bytes <= min(limits.device_bytes, 300001 + 1000)
        assert inspect(tmp_path / f"{limits.rounds}").sound


def test_pre_copy_is_bounded_by_time(tmp_path: Path) -> None:
    limits = PreCopyLimits(rounds=1_000_000, duration_ns=300_000_000)
    with Simulated("sim:?size=4M&dirty=1G&bandwidth=10M") as device:
        report = save(
            device, tmp_path / "out", SaveOptions(pre_copy=limits, max_state_bytes=1 << 40)
        )
    assert 0 < report.phases[0].device_bytes < 4 << 20


# What it is asked for.


@pytest.mark.parametrize("options", FRAMINGS.values(), ids=FRAMINGS)
@pytest.mark.parametrize("size", [0, 1, 4181, 1 << 20])
def test_the_config_blob_travels(tmp_path: Path, options: SaveOptions, size: int) -> None:
    blob = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with Simulated("sim:?size=5000") as device:
        asked = SaveOptions(framing=options.framing, config=blob)
        assert save(device, tmp_path / "out", asked).config == blob
    assert inspect(tmp_path / "out").config == blob


def test_options_that_cannot_work_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    refused = [
        SaveOptions(framing="odd"),
        SaveOptions(after=S.RESUMING),
        SaveOptions(buffer_bytes=4095),
        SaveOptions(buffer_bytes=(128 << 20) + 1),
        SaveOptions(digest=False),
        SaveOptions(config=bytes((16 << 20) + 1)),
        SaveOptions(framing=QemuFraming(), config=bytes((1 << 20) + 1)),
        SaveOptions(framing=QemuFraming(section_id=-1)),
        SaveOptions(framing=QemuFraming(section_id=1 << 32)),
        SaveOptions(framing=QemuFraming(idstr="")),
        SaveOptions(framing=QemuFraming(idstr="é" * 128)),
        SaveOptions(framing=QemuFraming(idstr="\udcff")),
    ]
    with Simulated("sim:?size=5000") as device:
        for options in refused:
            with pytest.raises(UsageError):
                save(device, tmp_path / "out", options)
        assert device.state() is S.RUNNING
    with (
        Simulated("sim:?profile=pds") as device,
        pytest.raises(NotMigratableError, match="no PRE_COPY"),
    ):
        save(device, tmp_path / "out", PRE_COPY)
    assert names_in(tmp_path) == []


def test_a_device_can_be_left_stopped_and_saved_again_from_there(tmp_path: Path) -> None:
    with Simulated("sim:?size=5000") as device:
        report = save(device, tmp_path / "one", SaveOptions(after=S.STOP))
        assert (report.state, report.stopped_ns, device.state()) == (S.STOP, None, S.STOP)
        with pytest.raises(DeviceBusyError, match="in STOP and not RUNNING"):
            save(device, tmp_path / "two")
        assert (device.state(), names_in(tmp_path)) == (S.STOP, ["one"])
        again = save(device, tmp_path / "two", SaveOptions(after=S.STOP, from_stop=True))
        assert (again.digest, device.state()) == (report.digest, S.STOP)
        # Pre-copy needs a running device: of a stopped one there is nothing to gain.
        third = SaveOptions(from_stop=True, pre_copy=PreCopyLimits())
        assert save(device, tmp_path / "three", third).digest == report.digest
        assert device.state() is S.RUNNING


@pytest.mark.parametrize("reported", ["0", "1000", "error", "max", "300000"])
def test_qemu_records_are_sane_whatever_size_is_reported(tmp_path: Path, reported: str) -> None:
    size = (3 << 20) + 5
    records: list[int] = []
    with Simulated(f"sim:?size={size}&reported_size={reported}") as device:
        save(device, tmp_path / "out", FRAMINGS["qemu"])
        inspect(tmp_path / "out", on_frame=lambda frame: collect(frame, records))
        assert sum(records) == size
    assert min(records[:-1]) == max(records)
    expected = {"error": 1 << 20, "max": 1 << 20, "300000": 300_000}.get(reported, 64 << 10)
    assert records[0] == expected


def collect(frame: FrameInfo, records: list[int]) -> None:
    if frame.kind == "DATA":
        records.append(frame.length_bytes)


@pytest.mark.parametrize("options", FRAMINGS.values(), ids=FRAMINGS)
def test_an_empty_state_is_saved_with_a_warning(tmp_path: Path, options: SaveOptions) -> None:
    with Simulated("sim:?size=0") as device:
        report = save(device, tmp_path / "out", options)
    assert report.device_bytes == 0
    assert "0 bytes" in report.warnings[-1]
    found = inspect(tmp_path / "out")
    assert (found.sound, found.device_bytes) == (True, 0)
