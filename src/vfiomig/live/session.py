"""What both ends of a session have in common: what the peer said, its pulse, and threads that end.

One thread works (the caller's worker, which blocks all signals), one reads each connection, one
beats. Only the first decides; the others tell it, through Words.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from vfiomig import errors
from vfiomig.device import Device
from vfiomig.errors import CancelledError, MigrationError, PeerError
from vfiomig.live.link import Inbox
from vfiomig.live.messages import Fail, Marked, Message
from vfiomig.live.wire import FrameHeader
from vfiomig.recorder import Recorder
from vfiomig.threads import start_thread
from vfiomig.worker import Cancellation

M = TypeVar("M")

BEAT_NS = 1_000_000_000
TICK_NS = 100_000_000
# How long work that was cancelled may take to end between two frames; then it is torn.
GRACE_NS = TICK_NS
# How long to wait for the peer's last words, after everything here is in order again.
FAREWELL_NS = 5_000_000_000

# The peer's refusals that are this end's own error as well; else it is the peer that failed (9).
_SHARED = {
    kind.code: kind
    for kind in (
        errors.DeviceBusyError,
        errors.NotMigratableError,
        errors.StreamMismatchError,
        errors.IncompatibleError,
        errors.AuthenticationError,
        errors.UsageError,
    )
}


def peer_failed(fail: Fail, who: str) -> MigrationError:
    """Return the error that the peer's Fail means here."""
    kind = _SHARED.get(fail.code, PeerError)
    hint = f"at the other end: {fail.hint}" if fail.hint else ""
    error: MigrationError = kind(f"{who}: {fail.message}", hint=hint)
    if isinstance(error, errors.IncompatibleError):
        error.fields = tuple(zip(*(fail.fields[at::3] for at in range(3)), strict=False))
    return error


class Words:
    """What the peer has said, and what ended the session. Any thread tells; one waits.

    failure: why the work is to stop, the first reason. lost: why the peer cannot be heard any more.
    """

    def __init__(self, who: str, devices: int) -> None:
        self._changed = threading.Condition()
        self._said: dict[type[object], tuple[Message, int]] = {}
        self._who, self.marks = who, [-1] * devices
        self.failure: BaseException | None = None
        self.lost: MigrationError | None = None

    def hear(self, message: Message) -> None:
        """Take in what the peer said."""
        with self._changed:
            self._said[type(message)] = message, time.monotonic_ns()
            if isinstance(message, Marked) and message.device < len(self.marks):
                self.marks[message.device] = message.number
            if isinstance(message, Fail) and self.failure is None:
                self.failure = peer_failed(message, self._who)
            self._changed.notify_all()

    def fail(self, err: BaseException) -> None:
        """Let the work stop for this reason, unless it has one."""
        with self._changed:
            self.failure = self.failure or err
            self._changed.notify_all()

    def lose(self, err: MigrationError) -> None:
        """Take in that the peer cannot be heard any more."""
        with self._changed:
            self.lost = self.lost or err
            self.failure = self.failure or err
            self._changed.notify_all()

    def listen_again(self) -> None:
        """Forget a loss that was only the end of our own listening."""
        with self._changed:
            if isinstance(self.lost, CancelledError):
                self.lost = None

    def nudge(self) -> None:
        """Let who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def said(self, kind: type[M]) -> M | None:
        """Return the last message of this kind."""
        found = self._said.get(kind)
        return found[0] if found else None  # type: ignore[return-value]

    def heard_ns(self, kind: type[object]) -> int:
        """Return when the last message of this kind was heard (CLOCK_MONOTONIC)."""
        return self._said[kind][1]

    def check(self) -> None:
        """Raise what ended the session."""
        if self.failure is not None:
            raise self.failure

    def wait(self, done: Callable[[], bool], timeout_ns: int = 0, *, heed: bool = True) -> bool:
        """Wait until done(). False once timeout_ns (0: none) is over.

        heed: raise what ends the session meanwhile; else go on until the peer is lost: False.
        """
        ends_ns = time.monotonic_ns() + timeout_ns
        with self._changed:
            while not done():
                if heed:
                    self.check()
                elif self.lost is not None:
                    return False
                left_ns = ends_ns - time.monotonic_ns() if timeout_ns else BEAT_NS
                if left_ns <= 0:
                    return False
                # A peer may ask for more than a lock can be told to wait.
                self._changed.wait(min(left_ns, BEAT_NS) / 1e9)
            return True

    def wait_for(self, kind: type[M], timeout_ns: int = 0) -> M:
        """Wait for a message. Raises what ended the session, or PeerError when it does not come."""
        if not self.wait(lambda: kind in self._said, timeout_ns):
            raise PeerError(f"{self._who} did not say {kind.__name__.lower()} in time")
        return self.said(kind)  # type: ignore[return-value]


class Ears:
    """The threads that read connections: each until handle() returns False, or the peer is lost.

    The one that is listened to first carries the peer's words. The end of another is a failure, but
    its last words are still to come: it need not be the last one that ends.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._threads: list[tuple[threading.Thread, Inbox]] = []

    def listen(self, inbox: Inbox, handle: Callable[[Inbox, FrameHeader], bool]) -> None:
        """Read a connection, in a thread of its own."""
        told = self._words.fail if self._threads else self._words.lose

        def read() -> None:
            try:
                while handle(inbox, inbox.header()):
                    pass
            except MigrationError as err:
                told(err)
            except BaseException as err:  # noqa: BLE001  raised by the thread that works
                self._words.fail(err)

        self._threads.append((start_thread(read, "vfiomig ear"), inbox))

    @property
    def are_open(self) -> bool:
        """Whether anybody was listened to since join()."""
        return bool(self._threads)

    def join(self) -> list[Inbox]:
        """Wait until all have ended, and return what they read from."""
        threads, self._threads = self._threads, []
        for thread, _ in threads:
            thread.join()
        return [inbox for _, inbox in threads]


class Pulse:
    """Two threads: one ticks ten times a second and notices that the caller cancels, one beats.

    tick() must not block, neither may raise. beat() may block while the peer does not read: it is
    called once a second, and ten times a second where is_due() says so. on_cancel() is called when
    the caller cancels, on_grace_over() GRACE_NS later, when the work has not ended by then.
    """

    def __init__(
        self,
        cancellation: Cancellation,
        tick: Callable[[], None],
        beat: Callable[[], None],
        is_due: Callable[[], bool],
        on_cancel: Callable[[], None],
        on_grace_over: Callable[[], None],
    ) -> None:
        self._cancellation, self._tick = cancellation, tick
        self._on_cancel, self._on_grace_over = on_cancel, on_grace_over
        self._beat, self._is_due = beat, is_due
        self._end, self._over = Cancellation(), threading.Event()
        self._threads = [
            start_thread(self._watch, "vfiomig pulse"),
            start_thread(self._beat_on, "vfiomig beat"),
        ]

    def stop(self) -> None:
        """End both threads, and wait for them: a beat() that blocks must be ended otherwise."""
        self._over.set()
        self._end.cancel()
        for thread in self._threads:
            thread.join()
        self._end.close()

    def _beat_on(self) -> None:
        beaten_ns = time.monotonic_ns()
        while not self._over.wait(TICK_NS / 1e9):
            if self._is_due() or time.monotonic_ns() - beaten_ns >= BEAT_NS:
                beaten_ns = time.monotonic_ns()
                self._beat()

    def _watch(self) -> None:
        waiter = select.poll()
        waiter.register(self._end.fileno(), select.POLLIN)
        waiter.register(self._cancellation.fileno(), select.POLLIN)
        told = 0
        while True:
            ready = [fd for fd, _ in waiter.poll(TICK_NS // 1_000_000)]
            if self._end.fileno() in ready:
                return
            if told == 1:
                told = 2
                self._on_grace_over()
            elif self._cancellation.fileno() in ready:
                waiter.unregister(self._cancellation.fileno())
                told = 1
                self._on_cancel()
            else:
                self._tick()


def new_id() -> bytes:
    """Return 16 random bytes: a session's id, or a token."""
    return os.urandom(16)


def fail_of(err: BaseException, phase: str) -> Fail:
    """Return what the peer is told of an error here."""
    if not isinstance(err, MigrationError):
        return Fail(1, type(err).__name__, f"{type(err).__name__}: {err}"[:1000], "", phase)
    fields = getattr(err, "fields", ())
    return Fail(
        err.code,
        type(err).__name__,
        str(err)[:4000],
        err.hint[:1000],
        err.phase or phase,
        tuple(text[:100] for field in fields[:100] for text in field),
    )


def state_text(device: Device, recorder: Recorder) -> str:
    """Return what a device is in, and whether it was reset on the way there."""
    state = device.state_or_none()
    now = state.name if state is not None else "in a state that cannot be read"
    changes = recorder.state_changes
    if any(change.by == "reset" and change.device == device.name for change in changes):
        return f"{device.name} was reset and is {now}"
    return f"{device.name} is {now}"
