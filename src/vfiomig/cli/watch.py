"""Progress and events of a long command: a bar on a terminal, lines, or NDJSON."""

import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Self

from vfiomig import quantities
from vfiomig.cli.output import Output
from vfiomig.report import Event, Progress, StateChange, state_change_dict
from vfiomig.report import Warning as WarningEvent

if TYPE_CHECKING:
    import rich.progress

_LINE_NS = 10_000_000_000  # without a terminal, with -v: a line so often
_RECORD_NS = 1_000_000_000  # with --json: a progress record so often


class Watch:
    """Takes the events of one command, and shows them as the options and the terminal say."""

    def __init__(self, out: Output) -> None:
        self._out, self._shown_ns = out, time.monotonic_ns()
        self._last: Progress | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        plain = os.environ.get("TERM") == "dumb" or out.quiet or out.json
        if sys.stderr.isatty() and not plain:
            # Imported before a device is stopped: it takes 50 ms.
            self._bar, self._task = _bar()

    def __call__(self, event: Event) -> None:
        """Take one event, in the working thread."""
        if isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, StateChange):
            self._state_change(event)
        elif isinstance(event, WarningEvent):
            self._out.note(event.text)

    def _progress(self, event: Progress) -> None:
        self._last = event
        if self._bar is not None and self._task is not None:
            # An estimate that is passed is no estimate: show a bar without an end.
            total = event.expected_bytes if event.device_bytes <= event.expected_bytes else None
            self._bar.update(
                self._task,
                completed=event.device_bytes,
                total=total,
                description=event.phase,
                rate=_rate(event.device_bytes, event.elapsed_ns),
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


def _rate(device_bytes: int, elapsed_ns: int) -> str:
    return quantities.format_rate(device_bytes * 1_000_000_000 // max(elapsed_ns, 1))


def _values(event: Progress) -> dict[str, object]:
    return {
        "device": event.device,
        "phase": event.phase,
        "device_bytes": event.device_bytes,
        "expected_bytes": event.expected_bytes,
        "elapsed_ns": event.elapsed_ns,
    }


def _sentence(event: Progress) -> str:
    of = f" of about {quantities.format_size(event.expected_bytes)}" if event.expected_bytes else ""
    took = quantities.format_duration(event.elapsed_ns)
    return f"{event.phase}: {quantities.format_size(event.device_bytes)}{of} in {took}"
