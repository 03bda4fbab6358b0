"""The check: a fault is found by the rule that names it, and the device is left RUNNING."""

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from devices import Simulated, failure_of, no_leak
from vfiomig.backends import open_device
from vfiomig.channel import DataChannel
from vfiomig.conform import Conformance, RuleResult, Verdict, conform
from vfiomig.conform.catalog import all_rules, select
from vfiomig.conform.findings import errno_name
from vfiomig.conform.result import Stopwatch
from vfiomig.conform.rule import GROUPS
from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceBusyError,
    DeviceIOError,
    MigrationError,
    NotMigratableError,
    UsageError,
)
from vfiomig.simulator.device import SimulatedOps
from vfiomig.states import arcs
from vfiomig.uapi import DeviceState as S
from vfiomig.worker import Cancellation

URL = "sim:?size=30001"
FAULTS = {
    "set:EIO@STOP": "path-to-stop",
    "set:EBUSY@RUNNING": "path-to-running",
    "set:EIO@STOP_COPY": "path-to-stop-copy",
    "set:EIO@RUNNING_P2P": "path-to-running-p2p",
    "set:EIO@PRE_COPY": "path-to-pre-copy",
    "set:EIO@PRE_COPY_P2P": "path-to-pre-copy-p2p",
    "set:EIO@RESUMING": "path-to-resuming",
    "set:EIO@STOP:ERROR": "path-to-stop",
    "set-after:EMFILE@STOP_COPY": "data-fd-given",
    "async-reset:set@STOP": "path-to-stop",
    "async-reset:set@STOP_COPY": "path-to-stop-copy",
    "read:EIO@1000": "read-to-end",
    "read:EINTR": "read-to-end",
    "async-reset:read@1000": "read-to-end",
    "read:ENOMSG@1000": "read-to-end",
    "write:EIO@1000": "load-own-state",
    "async-reset:write@1000": "load-own-state",
    "size:EIO": "size-in-each-state",
    "info:EIO": "info-in-pre-copy",
    "info:GARBAGE": "info-in-pre-copy",
    "reset:EIO": "reset-runs",
    "log-start:EIO": "log-start-stop",
    "log-report:EIO": "log-bits-only-set",
    "log-stop:EIO": "log-start-stop",
}
OTHER_WAYS = {
    "reported_size=max": ("size-in-each-state", Verdict.FAIL),
    "reported_size=1000": ("size-against-actual", Verdict.NOTE),
    "reported_size=error": ("size-in-each-state", Verdict.FAIL),
    "precopy_end=zero": ("drained-enomsg", Verdict.NOTE),
    "initial=0": ("info-in-pre-copy", Verdict.NOTE),
    "fault=info:REINIT": ("initial-bytes-fall", Verdict.NOTE),
    "accept=complete": ("load-truncated", Verdict.PASS),
    "accept=exact&capabilities=stop_copy": ("load-too-long", Verdict.PASS),
    "chunk=1000": ("any-read-size", Verdict.PASS),
    "dirty=1G": ("pre-copy-stream-loads", Verdict.PASS),
    "dma_writes=5": ("log-any-page-size", Verdict.PASS),
}


def one(device: Device, rule: str) -> RuleResult:
    """Run one rule."""
    (found,) = conform(device, destructive=True, only=[rule]).results
    return found


def ids(found: Conformance, verdict: Verdict) -> set[str]:
    return {result.id for result in found.results if result.verdict is verdict}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_rule_that_names_it(fault: str) -> None:
    with no_leak(), Simulated(f"{URL}&fault={fault}") as device:
        found = one(device, FAULTS[fault])
        assert device.state() is S.RUNNING
    assert found.verdict is Verdict.FAIL
    name = fault.partition(":")[2].partition("@")[0]
    if name in ("EIO", "EBUSY", "EINTR"):
        assert name in found.seen


@pytest.mark.parametrize("parameter", OTHER_WAYS)
def test_what_a_device_is_like_is_told(parameter: str) -> None:
    rule, verdict = OTHER_WAYS[parameter]
    with Simulated(f"{URL}&{parameter}") as device:
        found = one(device, rule)
        assert device.state() is S.RUNNING
    assert found.verdict is verdict, found.seen


def test_a_fault_of_one_group_leaves_the_others_alone() -> None:
    with Simulated(f"{URL}&fault=reset:EIO") as device:
        found = conform(device, only=["features", "paths", "save", "pre-copy", "data-fd"])
    assert ids(found, Verdict.FAIL) == set()
    with Simulated(f"{URL}&fault=info:EIO") as device:
        found = conform(device)
    failed = {result.group for result in found.results if result.verdict is Verdict.FAIL}
    assert failed == {"pre-copy"}


def test_a_failure_says_what_was_asked_what_came_and_what_was_done_about_it() -> None:
    with Simulated(f"{URL}&fault=set:EIO@STOP_COPY") as device:
        found = one(device, "read-to-end")
    assert "SET STOP_COPY in RUNNING: EIO (Input/output error); it is in STOP" in found.seen
    assert found.aftermath == "it was left in STOP, and was set to RUNNING"
    with Simulated(f"{URL}&fault=set:EIO@STOP:ERROR*1") as device:
        found = one(device, "path-to-stop")
        assert device.state() is S.RUNNING
    assert found.aftermath == "it was left in ERROR, and was reset: it lost its state"


def test_a_rule_that_failed_is_told_apart_from_the_next() -> None:
    with Simulated(f"{URL}&fault=set:EIO@STOP_COPY*1") as device:
        found = conform(device, only=["save"])
    assert ids(found, Verdict.FAIL) == {"read-to-end"}


def test_a_lost_device_ends_the_check() -> None:
    with Simulated(f"{URL}&fault=set:EIO@STOP:ERROR&fault=reset:EIO") as device:
        found = conform(device, destructive=True)
    at = [result.id for result in found.results].index("path-to-stop")
    assert found.results[at].verdict is Verdict.FAIL
    for later in found.results[at + 1 :]:
        assert later.verdict is Verdict.SKIP
        assert later.seen.startswith("the device was lost before: ")
    assert "cannot be reset" in found.lost
    assert found.code == 20


def test_a_reset_that_does_not_help_is_a_failure_and_not_the_end() -> None:
    with Simulated(f"{URL}&fault=async-reset:set@RESUMING") as device:
        found = conform(device, destructive=True, only=["reset", "load-own-state"])
        assert device.state() is S.RUNNING
    assert "load-own-state" in ids(found, Verdict.FAIL)


# What is run.


def test_rules_and_groups_are_chosen_by_name() -> None:
    assert {rule.id for rule in select(["end-stays", "reset"])} >= {"end-stays", "reset-runs"}
    assert {rule.group for rule in select(["reset"])} == {"reset"}
    assert select([]) == all_rules()
    assert {rule.group for rule in all_rules()} == set(GROUPS)


def test_destructive_rules_come_last() -> None:
    order = [rule.destructive for rule in all_rules()]
    assert order == sorted(order)


def test_an_unknown_name_is_refused_before_the_device_is_asked() -> None:
    with Simulated(URL) as device:
        error = failure_of(lambda: conform(device, only=["end-stay"]))
        assert len(device.history) == 0
    assert isinstance(error, UsageError)
    assert "no rule and no group 'end-stay'" in str(error)
    assert "end-stays" in error.hint


def test_a_device_that_is_not_running_is_refused_and_left_alone() -> None:
    with Simulated(URL) as device:
        device.set_state(S.STOP)
        error = failure_of(lambda: conform(device, destructive=True))
        assert device.state() is S.STOP
    assert isinstance(error, DeviceBusyError)
    with Simulated(f"{URL}&fault=get:EIO") as device:
        assert isinstance(failure_of(lambda: conform(device)), DeviceIOError)


def test_protocol_v1_has_other_rules() -> None:
    with open_device("sim:?protocol=v1") as device:
        assert isinstance(failure_of(lambda: conform(device)), NotMigratableError)


def test_each_result_is_told_when_it_is_known() -> None:
    told: list[RuleResult] = []
    with Simulated(URL) as device:
        found = conform(device, only=["save"], on_result=told.append)
    assert tuple(told) == found.results


def test_what_on_result_raises_ends_the_check() -> None:
    def stop(_: RuleResult) -> None:
        raise MigrationError("enough")

    with no_leak(), Simulated(URL) as device:
        assert str(failure_of(lambda: conform(device, on_result=stop))) == "enough"
        assert device.state() is S.RUNNING


# Cancel.


class Cancelling(SimulatedOps):
    """Cancels the work as soon as the device is in a state."""

    cancel: Callable[[], None]
    when: S

    def set_device_state(self, state: S) -> DataChannel | None:
        channel = super().set_device_state(state)
        if state is self.when:
            self.cancel()
        return channel


@pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY, S.PRE_COPY, S.RESUMING])
def test_a_cancel_in_any_state_leaves_the_device_running(state: S) -> None:
    with no_leak(), closing(Cancellation()) as cancellation:
        ops = Cancelling.open("sim:?size=3000001")
        ops.cancel, ops.when = cancellation.cancel, state
        with Device(ops.name, ops.identity, ops) as device:
            error = failure_of(lambda: conform(device, destructive=True, cancellation=cancellation))
            assert device.state() is S.RUNNING
    assert isinstance(error, CancelledError)
    assert error.actual is S.RUNNING
    assert error.aftermath.startswith(f"{device.name} is RUNNING")


# Other processes.


def test_a_device_with_a_file_is_opened_once(tmp_path: Path) -> None:
    with open_named(tmp_path) as device:
        found = one(device, "second-open")
    assert (found.verdict, "in use" in found.seen) == (Verdict.PASS, True), found.seen


@pytest.mark.parametrize("rule", ["killed-in-stop-copy", "killed-in-resuming"])
def test_what_a_killed_owner_leaves_is_found_and_reset(tmp_path: Path, rule: str) -> None:
    with no_leak(), open_named(tmp_path) as device:
        found = one(device, rule)
        assert device.state() is S.RUNNING
        assert conform(device, destructive=True, only=["load", "save"]).how_many(Verdict.FAIL) == 0
    left = "STOP_COPY" if "copy" in rule else "RESUMING"
    # A simulated device's file keeps its state, as mtty does.
    assert found.verdict is Verdict.NOTE, found.seen
    assert left in found.seen


def test_the_device_of_the_caller_is_valid_after_a_killed_owner(tmp_path: Path) -> None:
    with no_leak(), open_named(tmp_path) as device:
        conform(device, destructive=True, only=["owners"])
        device.set_state(S.STOP)
        assert device.state() is S.STOP


def test_a_device_that_cannot_be_opened_again_is_lost(tmp_path: Path) -> None:
    def remove_it(result: RuleResult) -> None:
        if result.id == "killed-in-stop-copy":
            for path in tmp_path.iterdir():
                path.unlink()
            tmp_path.rmdir()

    with open_named(tmp_path) as device:
        found = conform(device, destructive=True, only=["owners"], on_result=remove_it)
    assert "cannot be opened again" in found.lost
    assert (found.code, found.results[-1].verdict) == (20, Verdict.FAIL)


# Time and memory.


def test_every_state_change_is_timed() -> None:
    with Simulated(URL) as device:
        found = conform(device, destructive=True)
    single = {(arc.before, arc.wanted) for arc in found.arcs if len(arc.steps) == 1}
    assert single >= arcs(device.capabilities)
    for arc in found.arcs:
        assert arc.steps[-1] is arc.wanted
        assert 0 < arc.min_ns <= arc.median_ns <= arc.max_ns
    assert {arc.before for arc in found.arcs if arc.by == "reset"} >= set(S) - {S.ERROR}


def test_the_median_is_that_of_the_times() -> None:
    watch = Stopwatch()
    for took_ns in (1, 100, 3, 9):
        watch.add(S.RUNNING, (S.STOP,), took_ns)
    (arc,) = watch.arcs()
    assert (arc.times, arc.min_ns, arc.median_ns, arc.max_ns) == (4, 1, 6, 100)


def test_a_state_above_the_limit_is_a_failure_and_is_not_kept(tmp_path: Path) -> None:
    with no_leak(), Simulated("sim:?size=3000001") as device:
        found = conform(device, destructive=True, only=["load-own-state"], max_state_bytes=1 << 20)
        assert device.state() is S.RUNNING
    assert found.results[0].verdict is Verdict.FAIL
    assert "EFBIG" in found.results[0].seen


def test_no_file_of_the_kept_state_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Simulated(URL) as device:
        assert one(device, "load-gives-it-back").verdict is Verdict.PASS
    assert os.listdir(tmp_path) == []


def test_rules_name_errnos_as_vfio_does() -> None:
    assert errno_name(errno.EOPNOTSUPP) == "EOPNOTSUPP"
    assert errno_name(0) == "success"
    assert errno_name(4000) == "errno 4000"


def open_named(directory: Path) -> Device:
    return open_device(f"sim:{directory}/device?size=30001")
