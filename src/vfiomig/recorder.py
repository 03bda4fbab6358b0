"""What one piece of work notes while it runs: events for the caller, phases for its report."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfiomig.report import Chunk, Event, OnEvent, Phase, Progress, StateChange
from vfiomig.report import Warning as WarningEvent

# Often enough for an eye, seldom enough to cost nothing.
PROGRESS_NS = 100_000_000


class Recorder:
    """Notes events, and passes them on. expected_bytes: the device's estimate, 0 when none."""

    def __init__(self, device: str, on_event: OnEvent | None) -> None:
        self._device, self._on_event = device, on_event
        self.expected_bytes = 0
        self.started_ns = time.monotonic_ns()
        self.state_changes: list[StateChange] = []
        self.phases: list[Phase] = []
        self.warnings: list[str] = []
        self._told_ns = 0
        self._observing = threading.Lock()  # several devices may have something to tell at once
        self._raised: BaseException | None = None

    @property
    def duration_ns(self) -> int:
        """Time since the work began."""
        return time.monotonic_ns() - self.started_ns

    @property
    def has_listener(self) -> bool:
        """Whether anybody is told of events; else the copy need not come back for them."""
        return self._on_event is not None

    @property
    def was_reset(self) -> bool:
        """Whether the device was reset on the way."""
        return any(change.by == "reset" for change in self.state_changes)

    def observe(self, event: Event) -> None:
        """Take an event. What the caller's on_event raises waits for check().

        It must tear neither a state change from what belongs to it, nor a roll-back. Whoever has
        raised is told no more.
        """
        with self._observing:
            if isinstance(event, StateChange):
                self.state_changes.append(event)
            if self._on_event is not None and self._raised is None:
                try:
                    self._on_event(event)
                except BaseException as err:  # noqa: BLE001  raised by check(), or noted
                    self._raised = err

    def check(self) -> None:
        """Raise what on_event raised: it ends the work."""
        if self._raised is not None:
            raise self._raised

    def note_on(self, err: BaseException) -> None:
        """Say on the error that is reported what on_event raised besides."""
        if self._raised is not None and self._raised is not err:
            err.add_note(f"on_event raised as well: {self._raised!r}")

    def warn(self, text: str) -> None:
        """Note something that does not stop the work."""
        self.remark(text)
        self.check()

    def remark(self, text: str) -> None:
        """Note something where nothing may be raised; what on_event raises waits for check()."""
        self.warnings.append(text)
        self.observe(WarningEvent(self._device, text))

    @contextmanager
    def phase(self, name: str, device_bytes: Callable[[], int]) -> Iterator[None]:
        """Measure a phase by the clock and by a counter of device bytes."""
        started_ns, before = time.monotonic_ns(), device_bytes()
        yield
        moved, took_ns = device_bytes() - before, time.monotonic_ns() - started_ns
        self.phases.append(Phase(name, moved, took_ns))

    def copied(self, phase: str, device_bytes: int) -> None:
        """Tell the progress, ten times a second at most."""
        now_ns = time.monotonic_ns()
        if not self.has_listener or now_ns - self._told_ns < PROGRESS_NS:
            return
        self._told_ns = now_ns
        elapsed_ns = now_ns - self.started_ns
        event = Progress(self._device, phase, device_bytes, self.expected_bytes, elapsed_ns)
        self.observe(event)
        self.check()

    def chunk(self, device_offset: int, length_bytes: int) -> None:
        """Tell one chunk, for callers who asked for chunk events."""
        self.observe(Chunk(self._device, device_offset, length_bytes, time.monotonic_ns()))
        self.check()
