"""Forked ends of a live migration that are killed or stopped, by the parent or by themselves.

A child tells the points that it passes: before and after each record, message and act, after each
state. At one of them it may strike itself, so that a blow can be repeated exactly.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

from vfiomig import MigrationError
from vfiomig.live.destination import _Receiving
from vfiomig.live.handover import Act
from vfiomig.live.journal import Journal
from vfiomig.live.link import Outbox
from vfiomig.live.messages import Progress, Status
from vfiomig.live.party import Party
from vfiomig.live.source import _Sending
from vfiomig.live.verdict import Role
from vfiomig.report import Event, StateChange

# A child that hangs dies of SIGALRM after so long: no code that an end may have.
LONGEST_S = 30
# What the command may end with when the other end was lost, whatever was done by then.
SUCCESS, PEER_FAILED, OUTCOME_UNKNOWN = 0, 9, 21
CODES = {
    Role.SOURCE: {SUCCESS, PEER_FAILED, OUTCOME_UNKNOWN},
    Role.DESTINATION: {SUCCESS, PEER_FAILED},
}


class Blow(NamedTuple):
    """What happens to whom, and when: at a point; without one, after_ns from the beginning.

    second_ns: how long after that the other is killed too; -1: it is not.
    """

    role: Role
    number: signal.Signals
    point: str = ""
    after_ns: int = 0
    second_ns: int = -1


class Trail:
    """In a child: the points it passes, told to the parent."""

    def __init__(self, trail_fd: int, blow: Blow | None) -> None:
        self._fd, self._blow = trail_fd, blow
        self._passed: set[str] = set()

    def passes(self, point: str) -> None:
        """Note a point that is passed for the first time, and strike if it is the one."""
        if point not in self._passed:
            self._passed.add(point)
            os.write(self._fd, f"{point}\n".encode())
            if self._blow is not None and self._blow.point == point:
                # To this thread: one to the process stops another one first, and this one goes on.
                signal.pthread_kill(threading.get_ident(), self._blow.number)

    def on_event(self, event: Event) -> None:
        if isinstance(event, StateChange):
            self.passes(f"{event.device.rpartition('/')[2]} {event.by} {event.wanted.name}")

    def lay(self) -> None:
        """Let what the ends do from here on pass points, until the process ends."""

        def begin(*_: object) -> str:
            return "begin journal"

        def record(_: Journal, event: str) -> str:
            return f"record {event}"

        def say(_: Outbox, message: object) -> str:
            # Those come when it is time for them, and not in every session.
            return "" if isinstance(message, Progress | Status) else f"say {type(message).__name__}"

        def do(_: Party, act: Act) -> str:
            return f"do {act.name}" if act in (Act.RUN, Act.RESET, Act.HOLD) else ""

        self._enclose(Journal, "create", begin)
        self._enclose(Journal, "record", record)
        self._enclose(Outbox, "say", say)
        self._enclose(_Sending, "_do", do)
        self._enclose(_Receiving, "_do", do)

    def _enclose(self, owner: type, method: str, name_of: Callable[..., str]) -> None:
        plain = getattr(owner, method)

        def enclosed(*args: object, **options: object) -> object:
            if not (name := name_of(*args)):
                return plain(*args, **options)
            self.passes(f"before {name}")
            found = plain(*args, **options)
            self.passes(f"after {name}")
            return found

        is_bound = hasattr(plain, "__self__")  # a class method, which knows its class already
        setattr(owner, method, staticmethod(enclosed) if is_bound else enclosed)


class Process:
    """A forked end. Owns what the parent has of it.

    fd: a pidfd. code: what it ended with, None while it lives. trail: the points it has passed.
    """

    def __init__(self, blow: Blow | None, job: Callable[[Trail], object]) -> None:
        """Fork. job: what the child does, which raises what ends it."""
        self.code: int | None = None
        self._blow, self._passed = blow, b""
        self._trail_fd, write_fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _live(Trail(write_fd, blow), job)
        os.close(write_fd)
        os.set_blocking(self._trail_fd, False)
        self.fd = os.pidfd_open(self.pid)

    @property
    def trail(self) -> list[str]:
        """The points it has passed, in order."""
        return self._passed.decode().splitlines()

    @property
    def has_struck_itself(self) -> bool:
        """Whether it has come to the point of its blow."""
        return self._blow is not None and self._blow.point in self.trail

    def follow(self) -> None:
        """See how far it has come, and whether it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.code is None else (0, 0)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        try:
            while piece := os.read(self._trail_fd, 1 << 16):
                self._passed += piece
        except BlockingIOError:
            pass

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.code is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """End it, if that is still to be done."""
        if self.code is None:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
        os.close(self._trail_fd)


def _live(trail: Trail, job: Callable[[Trail], object]) -> None:
    """Be the child: does not return, and ends with the exit code that the command would have."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST_S)
        trail.lay()
        job(trail)
        code = SUCCESS
    except MigrationError as err:
        code = err.code
        if code not in CODES[Role.SOURCE]:
            traceback.print_exc()
    except BaseException:  # noqa: BLE001  the parent sees that it ended with 1
        traceback.print_exc()
    finally:
        os._exit(code)
