"""From one device to another, live: every profile, several devices, and what both ends tell."""

import threading
from pathlib import Path

import pytest

import vfiomig
from devices import URLS, WITHOUT_PRE_COPY, no_leak
from live_ends import Ends, ends
from vfiomig import (
    DeviceState,
    MigrationProgress,
    PreCopyLimits,
    StateChange,
)
from vfiomig.report import Event, StoppingSoon

SMALL = "sim:?size=300001"


@pytest.mark.parametrize("url", URLS.values(), ids=list(URLS))
@pytest.mark.parametrize("pre_copy", [True, False])
def test_the_state_of_every_profile_arrives_and_runs_there_alone(
    tmp_path: Path, url: str, *, pre_copy: bool
) -> None:
    with no_leak(), ends(tmp_path, url) as both:
        limits = PreCopyLimits() if pre_copy else None
        both.migrate(both.send_options(pre_copy=limits))
        both.check_moved()
        here, there = both.source.done, both.destination.done
        assert [moved.digest for moved in here.devices] == [moved.digest for moved in there.devices]
        assert here.devices[0].device_bytes == there.devices[0].device_bytes > 0
        copying = pre_copy and both.sources[0].identity.driver not in {
            f"sim:{name}" for name in WITHOUT_PRE_COPY
        }
        assert bool(here.devices[0].pre_copy_bytes) == copying
        assert here.devices[0].pre_copy_bytes == there.devices[0].pre_copy_bytes
        assert here.devices[0].zero_bytes == there.devices[0].zero_bytes
        assert there.stream_bytes > here.stream_bytes > 0


@pytest.mark.parametrize("url", ["sim:?size=100001", "sim:?profile=pds", "sim:?profile=mtty"])
@pytest.mark.parametrize("count", [2, 4])
def test_several_devices_move_in_one_session(tmp_path: Path, url: str, count: int) -> None:
    with no_leak(), ends(tmp_path, url, count=count) as both:
        both.migrate()
        both.check_moved()
        assert len(both.source.done.devices) == count


def test_all_are_quiet_before_one_stops_and_before_one_runs(tmp_path: Path) -> None:
    changes: dict[str, list[tuple[str, DeviceState]]] = {"source": [], "destination": []}

    def note(side: str, event: Event) -> None:
        if isinstance(event, StateChange):
            changes[side].append((event.device, event.wanted))

    with ends(tmp_path, "sim:?size=4096", count=3) as both:
        both.migrate(
            on_source=lambda event: note("source", event),
            on_destination=lambda event: note("destination", event),
        )
        both.check_moved()
    source = [state for _, state in changes["source"]]
    assert source.index(DeviceState.STOP_COPY) > _last(source, DeviceState.PRE_COPY_P2P)
    destination = [state for _, state in changes["destination"]]
    runs = destination.index(DeviceState.RUNNING)
    assert runs > _last(destination, DeviceState.RUNNING_P2P)


def _last(states: list[DeviceState], wanted: DeviceState) -> int:
    return len(states) - 1 - states[::-1].index(wanted)


def test_what_changes_while_it_is_read_arrives(tmp_path: Path) -> None:
    with ends(tmp_path, "sim:?size=2M&dirty=100M", "sim:?size=2M") as both:
        both.migrate()
        assert both.source.done.rounds >= 1
        # The source has changed its own state until it was stopped: that one must have arrived.
        assert both.destinations[0].content() == both.sources[0].content() != both.before[0]
        assert both.destinations[0].state() is DeviceState.RUNNING


def test_a_device_that_never_runs_dry_is_stopped_within_the_limit_all_the_same(
    tmp_path: Path,
) -> None:
    with ends(tmp_path, "sim:?profile=virtio&size=100000") as both:
        both.migrate()
        both.check_moved()
        assert both.source.done.rounds <= 2


def test_initial_data_that_appears_again_is_sent_and_acknowledged_again(tmp_path: Path) -> None:
    url = "sim:?size=100001"
    with ends(tmp_path, f"{url}&fault=info:REINIT*2", url) as both:
        both.migrate()
        both.check_moved()
        # Twice the whole state again, beside the first time.
        assert both.source.done.devices[0].pre_copy_bytes > 2 * 100001


def test_the_expected_downtime_is_told_before_anything_is_stopped(tmp_path: Path) -> None:
    seen: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StoppingSoon):
            seen.append("told")
        elif isinstance(event, StateChange):
            seen.append(event.wanted.name)

    with ends(tmp_path, "sim:?profile=xe&size=100001") as both:
        both.migrate(on_source=note)
        both.check_moved()
    assert seen.index("told") < seen.index("RUNNING_P2P") < seen.index("STOP")


def test_progress_tells_what_is_loaded_and_what_is_left(tmp_path: Path) -> None:
    heard: list[MigrationProgress] = []

    def note(event: Event) -> None:
        if isinstance(event, MigrationProgress):
            heard.append(event)

    with ends(tmp_path, "sim:?size=3M&bandwidth=10M", "sim:?size=3M") as both:
        both.migrate(both.send_options(pre_copy=None, switch_on_limit=True), on_source=note)
        both.check_moved()
    assert heard
    assert {event.phase for event in heard} <= {"pre-copy", "stop-copy", "hand-over"}
    loaded = [event.device_bytes for event in heard]
    assert loaded == sorted(loaded)
    assert loaded[-1] > 0
    assert heard[-1].expected_downtime_ns > 0


def test_two_sessions_in_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    def migrate(both: Ends) -> None:
        both.migrate()

    with (
        no_leak(),
        ends(tmp_path / "a", "sim:?size=3M") as one,
        ends(tmp_path / "b", "sim:?size=3M&fault=read:EIO@1M", "sim:?size=3M") as other,
    ):
        threads = [threading.Thread(target=migrate, args=(both,)) for both in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.check_moved()
        other.check_stayed()


def test_the_downtime_is_the_simulators_own_within_a_millisecond(tmp_path: Path) -> None:
    with ends(tmp_path, "sim:?size=2M&dirty=1M", "sim:?size=2M") as both:
        both.migrate()
        report = both.source.done
    left = next(
        at_ns
        for at_ns, state in both.sources[0].history
        if state not in (DeviceState.RUNNING, DeviceState.PRE_COPY)
    )
    ran = both.destinations[0].history[-1]
    assert ran[1] is DeviceState.RUNNING
    truth_ns = ran[0] - left
    assert report.downtime_ns is not None
    assert report.downtime_error_ns is not None
    assert abs(report.downtime_ns - truth_ns) < 1_000_000 + report.downtime_error_ns
    assert both.destination.done.downtime_ns == report.downtime_ns
    seen_ns = both.destination.done.destination_downtime_ns
    assert seen_ns is not None
    assert report.source_downtime_ns is not None
    assert seen_ns <= report.downtime_ns + report.downtime_error_ns + 1_000_000
    assert report.downtime_ns <= report.source_downtime_ns


def test_options_that_cannot_work_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with ends(tmp_path, SMALL) as both:
        for options in (
            both.send_options(buffer_bytes=1),
            both.send_options(connections=0),
            both.send_options(ring_slots=0),
            both.send_options(bytes_per_s=-1),
            both.send_options(lease_ns=0),
        ):
            with pytest.raises(vfiomig.UsageError):
                vfiomig.send(both.sources, "fd:0", options)
        with pytest.raises(vfiomig.UsageError):
            vfiomig.receive(both.destinations, "fd:0", both.receive_options(buffer_bytes=1))
        strange = both.receive_options(allow_mismatch=frozenset({"colour"}))
        with pytest.raises(vfiomig.UsageError, match="no such field"):
            vfiomig.receive(both.destinations, "fd:0", strange)
        with pytest.raises(vfiomig.UsageError, match="0 devices"):
            vfiomig.send([], "fd:0", both.send_options())
        assert not list(tmp_path.iterdir())
