"""Runs the rules against a device, one after the other, and brings it back after each."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from vfiomig.conform.catalog import select
from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.result import NOT_ALLOWED, Conformance, RuleResult, Verdict
from vfiomig.conform.rule import Rule
from vfiomig.conform.subject import Subject
from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceLostError,
    MigrationError,
    NotMigratableError,
)
from vfiomig.options import DEFAULT_MAX_STATE_BYTES
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded

OnResult = Callable[[RuleResult], None]


def conform(
    device: Device,
    *,
    destructive: bool = False,
    only: Sequence[str] = (),
    on_result: OnResult | None = None,
    cancellation: Cancellation | None = None,
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES,
) -> Conformance:
    """Ask of a device, which must be RUNNING, whether it keeps the rules of migration.

    The device is stopped again and again, for moments, and its state read many times: of a large
    one that takes long. destructive: also run the rules that may lose the state; these keep it in a
    temporary file of up to max_state_bytes, and load it again, but a reset in between, a driver
    that fails, or a cancel may leave the device blank. Some of them close the device and open it
    again by opened_as; the Device stays valid. only: ids of rules and names of groups. on_result:
    told each result, in the working thread; what it raises ends the check.

    Whatever happens, the device is left RUNNING, or lost is set. A device that is lost ends the
    check, and the remaining rules are skipped. Blocks; may be called from any thread.
    Raises UsageError (an unknown name), NotMigratableError (protocol v1), DeviceBusyError (it is
    not RUNNING), CancelledError; then nothing is left to do.
    """
    rules = select(only)
    if device.protocol != "v2":
        raise NotMigratableError(
            f"{device.name} has protocol {device.protocol}: the rules are those of v2",
            device=device.name,
        )
    with closing(Cancellation()) as own:
        stop = cancellation or own
        subject = Subject(
            device, stop.check, max_state_bytes=max_state_bytes, destructive=destructive
        )
        return run_shielded(lambda: _Run(subject, rules, on_result).run(), stop)


class _Run:
    """One check. Runs in the working thread."""

    def __init__(self, subject: Subject, rules: Sequence[Rule], on_result: OnResult | None) -> None:
        self._subject, self._rules, self._tell = subject, rules, on_result
        self._results: list[RuleResult] = []
        self._lost = ""

    def run(self) -> Conformance:
        subject, started_ns = self._subject, time.monotonic_ns()
        with closing(subject):
            subject.device.check_in(DeviceState.RUNNING)
            for rule in self._rules:
                result = self._judged(rule)
                self._results.append(result)
                if self._tell is not None:
                    self._tell(result)
        return Conformance(
            device=subject.device.name,
            driver=subject.device.identity.driver,
            capabilities=subject.capabilities.names,
            destructive=subject.destructive,
            results=tuple(self._results),
            arcs=tuple(subject.stopwatch.arcs()),
            duration_ns=time.monotonic_ns() - started_ns,
            lost=self._lost,
        )

    def _judged(self, rule: Rule) -> RuleResult:
        subject, started_ns = self._subject, time.monotonic_ns()
        subject.begin()
        skipped, aftermath = self._why_not(rule), ""
        if not skipped:
            skipped = self._check(rule)
            aftermath = self._settle()
        if skipped and not subject.deviations:
            verdict, seen = Verdict.SKIP, skipped
        else:
            notes = Verdict.NOTE if subject.notes else Verdict.PASS
            verdict, seen = Verdict.FAIL if subject.deviations else notes, subject.seen
        return RuleResult(
            id=rule.id,
            group=rule.group,
            text=rule.text,
            source=rule.source,
            destructive=rule.destructive,
            verdict=verdict,
            did=tuple(subject.log.did),
            seen=seen,
            duration_ns=time.monotonic_ns() - started_ns,
            aftermath=aftermath,
        )

    def _why_not(self, rule: Rule) -> str:
        subject = self._subject
        if self._lost:
            return f"the device was lost before: {self._lost}"
        if rule.destructive and not subject.destructive:
            return NOT_ALLOWED + rule.losing
        return next((need.value for need in rule.needs if not need.is_met(subject)), "")

    def _check(self, rule: Rule) -> str:
        """Run a rule. Returns why it was skipped, or ""; the rest is the subject's to say."""
        subject = self._subject
        try:
            rule.check(subject)
            subject.home()
        except SkipRule as skipped:
            return str(skipped)
        except OSError as err:
            subject.deviates(self._failed(err))
        except CancelledError as err:
            self._roll_back(err)
            raise
        except DeviceLostError as err:
            self._lost = str(err)
            subject.deviates(str(err))
        except MigrationError as err:
            subject.deviates(str(err))
        except BaseException as err:
            self._roll_back(err)
            raise
        return ""

    def _failed(self, err: OSError) -> str:
        subject, name = self._subject, errno_name(err.errno or 0)
        state = subject.device.state_or_none()
        now = f"it is in {state.name}" if state is not None else "its state is unknown"
        text = f"{name} ({err.strerror})" if err.errno else err.strerror
        return f"{subject.log.doing}: {text}; {now}"

    def _settle(self) -> str:
        """Bring the device to RUNNING. Returns how, or ""."""
        subject = self._subject
        try:
            return "" if self._lost else subject.settle()
        except DeviceLostError as err:
            self._lost = str(err)
            subject.deviates(str(err))
            return ""
        finally:
            subject.end_sessions()

    def _roll_back(self, err: BaseException) -> None:
        """Leave the device RUNNING; say on err what became of it."""
        try:
            aftermath = self._subject.settle()
        except DeviceLostError as lost:
            raise lost from err
        if isinstance(err, MigrationError):
            err.actual = DeviceState.RUNNING
            name = self._subject.device.name
            err.aftermath = f"{name} is RUNNING" + (f": {aftermath}" if aftermath else "")
