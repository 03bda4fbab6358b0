"""Progress and events of a long command: a bar on a terminal, lines, or NDJSON."""

import os
import signal
import sys
import time
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Self

from vfiomig import quantities
from vfiomig.cli.output import Output
from vfiomig.report import (
    Connected,
    Event,
    MigrationProgress,
    Progress,
    StateChange,
    StoppingSoon,
    state_change_dict,
)
from vfiomig.report import Warning as WarningEvent

if TYPE_CHECKING:
    import rich.progress

_LINE_NS = 10_000_000_000  # without a terminal, with -v: a line so often
_RECORD_NS = 1_000_000_000  # with --json: a progress record so often


class Watch:
    """Takes the events of one command, and shows them as the options and the terminal say."""

    def __init__(self, out: Output) -> None:
        self._out, self._shown_ns = out, time.monotonic_ns()
        self._last: Progress | MigrationProgress | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        plain = os.environ.get("TERM") == "dumb" or out.quiet or out.json
        if sys.stderr.isatty() and not plain:
            # Imported before a device is stopped: it takes 50 ms.
            self._bar, self._task = _bar()

    def __call__(self, event: Event) -> None:
        """Take one event, in the working thread."""
        if isinstance(event, Progress | MigrationProgress):
            self._progress(event)
        elif isinstance(event, StateChange):
            self._state_change(event)
        elif isinstance(event, WarningEvent):
            self._out.note(event.text)
        elif isinstance(event, Connected):
            self._connected(event)
        elif isinstance(event, StoppingSoon):
            self._stopping(event)

    def _connected(self, event: Connected) -> None:
        kind = "connected" if event.peer else "listening"
        if self._out.json:
            self._out.record(kind, {"address": event.address, "peer": event.peer})
        else:
            self._out.note(f"{kind} at {event.address}" + (f": {event.peer}" * bool(event.peer)))

    def _stopping(self, event: StoppingSoon) -> None:
        if self._out.json:
            values = {"expected_downtime_ns": event.expected_downtime_ns, "text": event.text}
            self._out.record("stopping", values)
        else:
            self._out.note(f"stopping the source, for {event.text}")

    def _progress(self, event: Progress | MigrationProgress) -> None:
        self._last = event
        if self._bar is not None and self._task is not None:
            expected = _expected_bytes(event)
            # An estimate that is passed is no estimate: show a bar without an end.
            total = expected if event.device_bytes <= expected else None
            self._bar.update(
                self._task,
                completed=event.device_bytes,
                total=total,
                description=event.phase,
                rate=_rate(event),
            )
        elif self._out.json and self._due(_RECORD_NS):
            self._out.record("progress", _values(event))
        elif self._out.verbose and self._due(_LINE_NS):
            self._out.note(_sentence(event))

    def _due(self, every_ns: int) -> bool:
        now_ns = time.monotonic_ns()
        if now_ns - self._shown_ns < every_ns:
            return False
        self._shown_ns = now_ns
        return True

    def _state_change(self, event: StateChange) -> None:
        if self._out.json:
            self._out.record("transition", state_change_dict(event))
        elif self._out.verbose:
            before = event.before.name if event.before is not None else "?"
            took = quantities.format_duration(event.duration_ns)
            failed = f" failed: {os.strerror(event.errno)}" if event.errno else ""
            how = "reset" if event.by == "reset" else event.wanted.name
            self._out.note(f"{event.device}: {before} -> {how} {took}{failed}")

    def finished(self, device_bytes: int) -> None:
        """Show a full bar: all of the state has moved."""
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=device_bytes, total=device_bytes, description="done"
            )

    def snapshot(self, _: int, __: FrameType | None) -> None:
        """Print where the work stands: SIGUSR1."""
        text = _sentence(self._last) if self._last is not None else "nothing copied yet"
        if self._out.json and self._last is not None:
            self._out.record("progress", _values(self._last))
        else:
            print(f"vfiomig: {text}", file=sys.stderr)

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGUSR1, self.snapshot)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before)
        if self._bar is not None:
            self._bar.stop()


def _bar() -> "tuple[rich.progress.Progress, rich.progress.TaskID]":
    import rich.progress
    from rich.console import Console

    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:>9}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=False,
    )
    return bar, bar.add_task("", total=None, rate="")


def _expected_bytes(event: Progress | MigrationProgress) -> int:
    if isinstance(event, Progress):
        return event.expected_bytes
    return event.device_bytes + event.pending_bytes


def _rate(event: Progress | MigrationProgress) -> str:
    if isinstance(event, MigrationProgress):
        told = quantities.format_rate(event.bytes_per_s) if event.bytes_per_s else ""
        if event.expected_downtime_ns:
            downtime = quantities.format_duration(event.expected_downtime_ns)
            told += f" round {event.round}, downtime {downtime}"
        return told.strip()
    elapsed_ns = max(event.elapsed_ns, 1)
    return quantities.format_rate(event.device_bytes * 1_000_000_000 // elapsed_ns)


def _values(event: Progress | MigrationProgress) -> dict[str, object]:
    return asdict(event)


def _sentence(event: Progress | MigrationProgress) -> str:
    took = quantities.format_duration(event.elapsed_ns)
    done = quantities.format_size(event.device_bytes)
    if isinstance(event, MigrationProgress):
        left = quantities.format_size(event.pending_bytes)
        text = f"{event.phase}, round {event.round}: {done} in {took}, {left} left"
        downtime = quantities.format_duration(event.expected_downtime_ns)
        return text + (f", downtime {downtime} expected" * bool(event.expected_downtime_ns))
    expected = event.expected_bytes
    of = f" of about {quantities.format_size(expected)}" if expected else ""
    return f"{event.phase}: {done}{of} in {took}"
