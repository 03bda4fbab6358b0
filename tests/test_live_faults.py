"""A live migration that fails, at each step in turn: one side runs, and a second one succeeds."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vfiomig
from devices import entered, no_leak
from live_ends import Ends, ends
from vfiomig import Cancellation, DeviceState, MigrationProgress, StateChange
from vfiomig.report import Event

S = DeviceState
SIZE = 300001
URL = f"sim:?size={SIZE}"

# What goes wrong once, at which end, and the exit codes of both ends. In a pre-copy the state is
# preceded by records, so that byte 100000 is in it for both.
SOURCE_FAULTS = {
    "read": ("read:EIO@100000*1", 6),
    "read-enodev": ("read:ENODEV@100000*1", 6),
    "reset-while-read": ("async-reset:read@100000*1", 6),
    "reset-in-pre-copy": ("async-reset:set@PRE_COPY*1", 6),
    "reset-in-stop-copy": ("async-reset:set@STOP_COPY*1", 6),
    "enter-pre-copy": ("set:EIO@PRE_COPY*1", 6),
    "enter-p2p": ("set:EIO@PRE_COPY_P2P*1", 6),
    "enter-stop-copy": ("set:EIO@STOP_COPY*1", 6),
    "error-state": ("set:EIO@STOP_COPY:ERROR*1", 6),
    "no-descriptor": ("set-after:EMFILE@PRE_COPY*1", 15),
    "info": ("info:EIO*1", 6),
}
DESTINATION_FAULTS = {
    "enter-resuming": ("set:EIO@RESUMING*1", 6),
    "no-descriptor": ("set-after:EMFILE@RESUMING*1", 15),
    "write": ("write:EIO@100000*1", 6),
    "write-enospc": ("write:ENOSPC@0*1", 6),
    "reset-while-written": ("async-reset:write@100000*1", 6),
    # Late: from RESUMING on, since the way there passes these states too.
    "commit": ("late:set:EINVAL@STOP*1", 6),
    "run-p2p": ("late:set:EIO@RUNNING_P2P*1", 6),
    "run": ("late:set:EIO@RUNNING*1", 6),
}
# These have lost what the source held: it runs, blank, and says so.
BLANKING = {"reset-while-read", "reset-in-pre-copy", "reset-in-stop-copy", "error-state"}


@pytest.mark.parametrize("name", SOURCE_FAULTS)
def test_a_source_that_fails_runs_again_and_the_destination_is_reset(
    tmp_path: Path, name: str
) -> None:
    fault, code = SOURCE_FAULTS[name]
    with no_leak(), ends(tmp_path, f"{URL}&fault={fault}", URL) as both:
        both.migrate()
        assert (both.source.failure.code, both.destination.failure.code) == (code, 9)
        if name in BLANKING:
            assert both.sources[0].state() is S.RUNNING
            assert "was reset" in both.source.failure.aftermath
            assert both.destinations[0].content() != both.before[0]
        else:
            both.check_stayed()
        check_told(both)
        migrate_again(both)


@pytest.mark.parametrize("name", DESTINATION_FAULTS)
def test_a_destination_that_fails_is_reset_and_the_source_runs_on(
    tmp_path: Path, name: str
) -> None:
    fault, code = DESTINATION_FAULTS[name]
    with no_leak(), ends(tmp_path, URL) as both:
        if fault.startswith("late:"):
            both.migrate(on_destination=late(both, 0, fault))
        else:
            both.destinations[0].set_faults(fault)
            both.migrate()
        assert (both.source.failure.code, both.destination.failure.code) == (9, code)
        both.check_stayed()
        check_told(both)
        migrate_again(both)


def late(both: Ends, index: int, fault: str) -> Callable[[Event], None]:
    """Return an on_event that lets a destination fail once it is in RESUMING."""

    def look(event: Event) -> None:
        mine = isinstance(event, StateChange) and event.device == both.destinations[index].name
        if mine and entered(S.RESUMING)(event):
            both.destinations[index].set_faults(fault.removeprefix("late:"))

    return look


def check_told(both: Ends) -> None:
    """Both errors say what became of both ends."""
    for failure in (both.source.failure, both.destination.failure):
        assert both.sources[0].name in failure.source_state
        assert both.destinations[0].name in failure.destination_state
        assert "RUNNING" in failure.source_state
        assert "RUNNING" in failure.destination_state


def migrate_again(both: Ends) -> None:
    both.before = [device.content() for device in both.sources]
    both.source, both.destination = type(both.source)(), type(both.destination)()
    both.migrate()
    both.check_moved()


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize(
    "fault",
    [
        "set:EIO@PRE_COPY*1",
        "read:EIO@50000*1",
        "set:EIO@PRE_COPY_P2P*1",
        "set:EIO@STOP_COPY*1",
    ],
)
def test_of_four_sources_one_fails_and_all_run_again(
    tmp_path: Path, failing: int, fault: str
) -> None:
    with no_leak(), ends(tmp_path, "sim:?size=100001", count=4) as both:
        both.sources[failing].set_faults(fault)
        both.migrate()
        both.check_stayed()
        migrate_again(both)


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize(
    "fault",
    [
        "set:EIO@RESUMING*1",
        "write:EIO@50000*1",
        "late:set:EINVAL@STOP*1",
        "late:set:EIO@RUNNING_P2P*1",
        "late:set:EIO@RUNNING*1",
    ],
)
def test_of_four_destinations_one_fails_and_none_runs_with_the_state(
    tmp_path: Path, failing: int, fault: str
) -> None:
    with no_leak(), ends(tmp_path, "sim:?size=100001", count=4) as both:
        at_the_commit = fault.startswith("late:")
        if not at_the_commit:
            both.destinations[failing].set_faults(fault)
        both.migrate(on_destination=late(both, failing, fault) if at_the_commit else None)
        both.check_stayed()
        migrate_again(both)


def cancel_at(
    cancellation: Cancellation, wanted: Callable[[Event], bool]
) -> Callable[[Event], None]:
    """Return an on_event that cancels at the first event that is wanted."""

    def look(event: Event) -> None:
        if wanted(event):
            cancellation.cancel()

    return look


MOMENTS = {
    "connected": lambda event: isinstance(event, vfiomig.Connected),
    "pre-copy": entered(S.PRE_COPY),
    "p2p": entered(S.PRE_COPY_P2P),
    "stop-copy": entered(S.STOP_COPY),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_cancelled_source_runs_on(tmp_path: Path, moment: str) -> None:
    with no_leak(), ends(tmp_path, "sim:?size=3M&bandwidth=20M", "sim:?size=3M") as both:
        cancellation = Cancellation()
        both.migrate(
            both.send_options(switch_on_limit=True),
            on_source=cancel_at(cancellation, MOMENTS[moment]),
            cancel_source=cancellation,
        )
        cancellation.close()
        assert isinstance(both.source.failure, vfiomig.CancelledError)
        assert both.destination.failure.code == 9
        both.check_stayed()
        migrate_again(both)


def test_a_cancel_is_heeded_within_a_tenth_of_a_second_and_a_chunk(tmp_path: Path) -> None:
    url = "sim:?size=30M&bandwidth=3M&chunk=64K"
    with ends(tmp_path, url, "sim:?size=30M") as both:
        cancellation, at_ns = Cancellation(), [0]

        def look(event: Event) -> None:
            if isinstance(event, MigrationProgress) and event.device_bytes and not at_ns[0]:
                at_ns[0] = time.monotonic_ns()
                cancellation.cancel()

        both.migrate(
            both.send_options(switch_on_limit=True), on_source=look, cancel_source=cancellation
        )
        cancellation.close()
        back_ns = both.sources[0].history[-1]
        assert back_ns[1] is S.RUNNING
        # A chunk of 64 KiB takes 21 ms here; a busy machine is given as much again.
        assert back_ns[0] - at_ns[0] < 1_000_000_000
        both.check_stayed()


@pytest.mark.parametrize("state", [S.RESUMING, S.STOP])
def test_a_cancelled_destination_is_reset(tmp_path: Path, state: DeviceState) -> None:
    with no_leak(), ends(tmp_path, "sim:?size=3M&bandwidth=20M", "sim:?size=3M") as both:
        cancellation = Cancellation()

        def wanted(event: Event) -> bool:
            return entered(state)(event) and event.before is not S.RUNNING_P2P  # type: ignore[union-attr]

        both.migrate(
            both.send_options(switch_on_limit=True),
            on_destination=cancel_at(cancellation, wanted),
            cancel_destination=cancellation,
        )
        cancellation.close()
        assert isinstance(both.destination.failure, vfiomig.CancelledError)
        assert both.source.failure.code == 9
        both.check_stayed()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_what_on_event_raises_ends_the_migration(tmp_path: Path, side: str) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, StateChange) and event.wanted in (S.STOP_COPY, S.RESUMING):
            raise ZeroDivisionError("in a callback")

    with no_leak(), ends(tmp_path, "sim:?size=100001") as both:
        if side == "source":
            both.migrate(on_source=fail)
        else:
            both.migrate(on_destination=fail)
        raised = both.source.error if side == "source" else both.destination.error
        assert isinstance(raised, ZeroDivisionError)
        both.check_stayed()


def test_a_destination_that_is_not_running_is_refused_before_anything_is_sent(
    tmp_path: Path,
) -> None:
    with ends(tmp_path, URL) as both:
        both.destinations[0].set_state(S.STOP)
        both.migrate()
        assert both.destination.failure.code == 5
        assert both.source.failure.code == 9
        assert both.sources[0].state() is S.RUNNING
        assert [change for _, change in both.sources[0].history if change is not S.RUNNING] == []


def test_a_source_that_is_not_running_is_refused(tmp_path: Path) -> None:
    with ends(tmp_path, URL) as both:
        both.sources[0].set_state(S.STOP)
        with pytest.raises(vfiomig.DeviceBusyError, match="STOP and not RUNNING"):
            vfiomig.send(both.sources, "fd:0", both.send_options())


def test_devices_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path) -> None:
    with no_leak(), ends(tmp_path, URL, "sim:?profile=qat") as both:
        both.migrate()
        for failure in (both.source.failure, both.destination.failure):
            assert isinstance(failure, vfiomig.IncompatibleError)
            assert "driver is 'sim:qat', not 'sim:generic'" in str(failure)
            assert "--allow-mismatch driver" in failure.hint
            assert failure.fields[0] == ("driver", "sim:generic", "sim:qat")
        assert both.destinations[0].state() is S.RUNNING
        assert len(both.destinations[0].history) == len(both.sources[0].history)


def test_a_mismatch_that_is_allowed_is_tried(tmp_path: Path) -> None:
    with ends(tmp_path, URL, "sim:?profile=mlx5") as both:
        allowed = both.receive_options(allow_mismatch=frozenset({"driver"}))
        both.migrate(receive=allowed)
        both.check_moved()


def test_other_numbers_of_devices_are_refused(tmp_path: Path) -> None:
    with ends(tmp_path, URL, count=2) as both:
        both.destinations = both.destinations[:1]
        both.migrate()
        assert both.source.failure.code == both.destination.failure.code == 2
        assert "2 devices" in str(both.destination.failure)


def test_devices_without_p2p_are_sent_together_only_when_asked_to(tmp_path: Path) -> None:
    with ends(tmp_path, "sim:?profile=hisi", count=2) as both:
        with pytest.raises(vfiomig.NotMigratableError, match="no P2P"):
            vfiomig.send(both.sources, "fd:0", both.send_options())
        both.migrate(both.send_options(without_p2p=True))
        both.check_moved()


def test_a_state_that_is_too_large_ends_it_at_either_end(tmp_path: Path) -> None:
    with ends(tmp_path, URL) as both:
        both.migrate(both.send_options(max_state_bytes=1000))
        assert both.source.failure.code == 15
        both.check_stayed()
    with ends(tmp_path / "2", URL) as both:
        both.migrate(receive=both.receive_options(max_state_bytes=1000))
        assert both.destination.failure.code == 15
        both.check_stayed()


@pytest.mark.parametrize("pre_copy", [True, False])
def test_a_limit_that_cannot_be_met_lets_the_source_run_on(
    tmp_path: Path, *, pre_copy: bool
) -> None:
    url = "sim:?size=8M&dirty=100M&bandwidth=20M" if pre_copy else "sim:?profile=xe&size=64M"
    with no_leak(), ends(tmp_path, url) as both:
        limits = vfiomig.PreCopyLimits(rounds=3, duration_ns=300_000_000)
        both.migrate(both.send_options(pre_copy=limits, downtime_limit_ns=1))
        assert isinstance(both.source.failure, vfiomig.TimeLimitError)
        assert "of downtime are allowed" in str(both.source.failure)
        assert S.STOP not in [state for _, state in both.sources[0].history]
        assert both.destinations[0].state() is S.RUNNING


def test_a_limit_that_cannot_be_met_may_be_overrun(tmp_path: Path) -> None:
    with ends(tmp_path, "sim:?profile=xe&size=8M") as both:
        both.migrate(both.send_options(downtime_limit_ns=1, switch_on_limit=True))
        both.check_moved()
        assert "longer than allowed" in " ".join(both.source.done.warnings)


def test_a_journal_that_cannot_be_written_is_found_before_anything_is_stopped(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("in the way")
    for side in ("source", "destination"):
        with ends(tmp_path / side, URL) as both:
            bad = {"journal": tmp_path / "file" / "below"}
            if side == "source":
                both.migrate(both.send_options(**bad))
                assert both.source.failure.code == 10
            else:
                both.migrate(receive=both.receive_options(**bad))
                assert both.destination.failure.code == 10
            both.check_stayed()
            assert all(state is S.RUNNING for _, state in both.sources[0].history)


def test_a_device_that_cannot_even_be_reset_is_the_last_word(tmp_path: Path) -> None:
    url = f"{URL}&fault=set:EIO@STOP_COPY:ERROR&fault=reset:EIO"
    with no_leak(), ends(tmp_path, url, URL) as both:
        both.migrate()
        assert isinstance(both.source.failure, vfiomig.DeviceLostError)
        assert "ERROR" in both.source.failure.source_state
        assert both.destinations[0].state() is S.RUNNING


def test_an_exception_in_the_calling_thread_cancels(tmp_path: Path) -> None:
    with ends(tmp_path, "sim:?size=30M&bandwidth=10M", "sim:?size=30M") as both:

        def interrupt(event: Event) -> None:
            if isinstance(event, MigrationProgress) and event.device_bytes:
                os.kill(os.getpid(), signal.SIGUSR2)

        class Interrupted(BaseException):
            pass

        def handler(*_: object) -> None:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            raise Interrupted

        before = signal.signal(signal.SIGUSR2, handler)
        try:
            main_thread_sends(both, interrupt)
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert isinstance(both.source.error, Interrupted)
        both.check_stayed()


def main_thread_sends(both: Ends, on_source: Callable[[Event], None]) -> None:
    assert threading.current_thread() is threading.main_thread()
    both.migrate(both.send_options(switch_on_limit=True), on_source=on_source)


def test_a_session_that_nobody_has_heard_of_leaves_no_journal(tmp_path: Path) -> None:
    with ends(tmp_path, URL) as both:
        with pytest.raises(vfiomig.PeerError):
            vfiomig.send(both.sources, f"unix:{tmp_path}/nobody", both.send_options())
        assert list((tmp_path / "source").iterdir()) == []
