"""One live migration between two hosts, one end struck: what must be true then, and once resolved.

The devices are files that stay as they are when a process dies, as those do that `vfiomig hold`
lends. Whoever reads the files sees where it runs, and with what.
"""

import json
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import vfiomig
from live_victims import CODES, OUTCOME_UNKNOWN, PEER_FAILED, SUCCESS, Blow, Process, Trail
from vfiomig import DeviceState, ReceiveOptions, SendOptions
from vfiomig.errors import OutcomeUnknownError
from vfiomig.live.journal import sessions
from vfiomig.live.options import LIVE_PRE_COPY
from vfiomig.live.resolve import Resolution, resolve
from vfiomig.live.verdict import Role, Verdict

S = DeviceState
# A device works in these: it may change memory, or what it holds.
RUNS = {S.RUNNING, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P}
# STOP_COPY: of a source that was killed when it had just recorded that the other side runs.
STILL = {S.STOP, S.STOP_COPY}
# An end that is stopped is away for longer than the other is patient.
SILENCE_NS, STOPPED_NS = 300_000_000, 600_000_000
# Of one that was killed the connection tells: silence must not be what ends such a session.
PATIENCE_NS = 10_000_000_000
LOOK_S = 0.002
KILLED = -signal.SIGKILL


class Violation(AssertionError):
    """Something that must never be."""


class Shape(NamedTuple):
    """What moves, of so many devices. bytes_per_s: how fast each gives and takes, 0: at once."""

    devices: int
    size_bytes: int
    bytes_per_s: int
    has_pre_copy: bool


class Host:
    """One of two hosts: the files of its devices, and its journals."""

    def __init__(self, place: Path, name: str, shape: Shape, seed: int) -> None:
        self.journal, self._shape = place / f"{name}.journals", shape
        self.files = [place / f"{name}{index}" for index in range(shape.devices)]
        for index, file in enumerate(self.files):
            vfiomig.open_device(f"sim:{file}?size={shape.size_bytes}&seed={seed + index}").close()
        self._first = self.contents()

    def open(self, stack: ExitStack) -> list[vfiomig.Device]:
        """Open its devices, as fast as the shape says."""
        rate = self._shape.bytes_per_s
        query = f"?bandwidth={rate}" if rate else ""
        return [
            stack.enter_context(vfiomig.open_device(f"sim:{file}{query}")) for file in self.files
        ]

    def contents(self) -> list[bytes]:
        return [file.read_bytes() for file in self.files]

    def states(self) -> set[DeviceState]:
        return {_state_of(file) for file in self.files}

    def holds(self, index: int, content: bytes, states: set[DeviceState]) -> bool:
        """Whether a device is in one of states and has content, at one and the same moment."""
        file = self.files[index]
        while True:
            before = _version(file)
            if _state_of(file) not in states:
                return False
            found = file.read_bytes() == content
            if _version(file) == before:
                return found

    def runs_with(self, contents: Sequence[bytes]) -> bool:
        """Whether all its devices run, with these contents."""
        return all(self.holds(i, content, {S.RUNNING}) for i, content in enumerate(contents))

    def has_nothing(self) -> bool:
        """Whether all its devices run with what they held at first, or were reset."""
        blank = bytes(self._shape.size_bytes)
        pairs = zip(self.contents(), self._first, strict=True)
        return self.states() == {S.RUNNING} and all(now in (old, blank) for now, old in pairs)


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.sim")


def _state_of(file: Path) -> DeviceState:
    return DeviceState[json.loads(_sidecar(file).read_bytes())["state"]]


def _version(file: Path) -> tuple[int, int]:
    found = _sidecar(file).stat()  # another file, whenever the state changes
    return found.st_ino, found.st_mtime_ns


@dataclass
class Attempt:
    """One session from source to destination. cheat: done first in both children.

    codes: what both ended with. trails: the points they passed. struck_ns: -1 when nobody was.
    """

    source: Host
    destination: Host
    shape: Shape
    blow: Blow | None = None
    cheat: Callable[[], None] | None = None
    codes: dict[Role, int] = field(default_factory=dict)
    trails: dict[Role, list[str]] = field(default_factory=dict)
    duration_ns: int = 0
    struck_ns: int = -1

    def __post_init__(self) -> None:
        self.contents = self.source.contents()

    def run(self) -> None:
        """Run both ends until they have ended. Raises Violation should a device run at both."""
        started_ns = time.monotonic_ns()
        processes = self._fork()
        try:
            while living := [one.fd for one in processes.values() if one.code is None]:
                self._strike(processes, time.monotonic_ns() - started_ns)
                select.select(living, [], [], LOOK_S)
                for one in processes.values():
                    one.follow()
                self.check_never_both()
            self.duration_ns = time.monotonic_ns() - started_ns
        finally:
            for role, one in processes.items():
                one.close()
                self.trails[role] = one.trail
                if one.code is not None:
                    self.codes[role] = one.code

    def _fork(self) -> dict[Role, Process]:
        near, far = socket.socketpair()
        with near, far:
            there = self._process(Role.DESTINATION, far, near, self._receive)
            here = self._process(Role.SOURCE, near, far, self._send)
        return {Role.SOURCE: here, Role.DESTINATION: there}

    def _process(
        self,
        role: Role,
        own: socket.socket,
        other: socket.socket,
        job: Callable[[str, Trail, ExitStack], object],
    ) -> Process:
        def run(trail: Trail) -> None:
            other.close()
            if self.cheat is not None:
                self.cheat()
            with ExitStack() as stack:
                job(f"fd:{own.fileno()}", trail, stack)

        is_victim = self.blow is not None and self.blow.role is role
        return Process(self.blow if is_victim else None, run)

    @property
    def _silence_ns(self) -> int:
        is_stop = self.blow is not None and self.blow.number is signal.SIGSTOP
        return SILENCE_NS if is_stop else PATIENCE_NS

    def _send(self, address: str, trail: Trail, stack: ExitStack) -> None:
        options = SendOptions(
            pre_copy=LIVE_PRE_COPY if self.shape.has_pre_copy else None,
            switch_on_limit=True,
            silence_ns=self._silence_ns,
            journal=self.source.journal,
        )
        vfiomig.send(self.source.open(stack), address, options, on_event=trail.on_event)

    def _receive(self, address: str, trail: Trail, stack: ExitStack) -> None:
        options = ReceiveOptions(silence_ns=self._silence_ns, journal=self.destination.journal)
        vfiomig.receive(self.destination.open(stack), address, options, on_event=trail.on_event)

    def _strike(self, processes: dict[Role, Process], passed_ns: int) -> None:
        """Do to the processes what is due."""
        if (blow := self.blow) is None:
            return
        victim = processes[blow.role]
        if self.struck_ns < 0:
            is_due = victim.has_struck_itself if blow.point else passed_ns >= blow.after_ns
            if is_due:
                self.struck_ns = passed_ns
                if not blow.point:
                    victim.send(blow.number)
        elif blow.number is signal.SIGSTOP and passed_ns - self.struck_ns >= STOPPED_NS:
            victim.send(signal.SIGCONT)
        elif 0 <= blow.second_ns <= passed_ns - self.struck_ns:
            for one in processes.values():
                one.send(signal.SIGKILL)

    def check_never_both(self) -> None:
        """Raise Violation when a device runs with its state at both hosts."""
        for index, content in enumerate(self.contents):
            # In this order: once it has run there, it must not run here at any later time.
            there = self.destination.holds(index, content, RUNS)
            if there and self.source.holds(index, content, RUNS):
                raise Violation("both run with the state")

    def check_codes(self) -> None:
        """Raise Violation when an end that was not killed has not left what its code says."""
        is_held = self.source.states() == {S.STOP}
        runs_there = self.destination.runs_with(self.contents)
        left = {
            (Role.SOURCE, SUCCESS): is_held and runs_there,
            (Role.SOURCE, PEER_FAILED): self.source.runs_with(self.contents),
            (Role.SOURCE, OUTCOME_UNKNOWN): is_held,
            (Role.DESTINATION, SUCCESS): runs_there,
            (Role.DESTINATION, PEER_FAILED): self.destination.has_nothing(),
        }
        for role, code in self.codes.items():
            if code not in CODES[role] and not (code == KILLED and self._may_die(role)):
                raise Violation(f"the {role} ended with {code}")
            if not left.get((role, code), True):
                raise Violation(f"the {role} ended with {code}, and its devices say otherwise")

    def _may_die(self, role: Role) -> bool:
        blow = self.blow
        is_kill = blow is not None and blow.number is signal.SIGKILL
        return is_kill and blow is not None and (blow.role is role or blow.second_ns >= 0)

    def runs_at(self) -> Role:
        """Return where it runs. Raises Violation unless that is one side, with all there was."""
        self.check_never_both()
        here = self.source.runs_with(self.contents)
        if here == self.destination.runs_with(self.contents):
            raise Violation(f"{'both run' if here else 'neither runs'} with the state")
        if not (self.destination.has_nothing() if here else self.source.states() <= STILL):
            raise Violation("the side that does not run was not left in order")
        return Role.SOURCE if here else Role.DESTINATION


class Operator:
    """Whoever resolves what a session has left. found: what that came to."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.found: list[Resolution] = []

    def hasten(self) -> None:
        """Resolve the source before the destination: what takes a word must not be done."""
        source = self._attempt.source
        before = source.states()
        try:
            self._resolve(Role.SOURCE, source, None)
        except OutcomeUnknownError:
            if source.states() != before:
                raise Violation("resolve has changed what it knows nothing of") from None
        self._attempt.check_never_both()

    def resolve(self) -> None:
        """Resolve the destination, and then the source by what that has said."""
        attempt = self._attempt
        word = self._resolve(Role.DESTINATION, attempt.destination, None)
        if word is None and not attempt.destination.has_nothing():
            raise Violation("the destination has no journal, and was touched")
        attempt.check_never_both()
        verdict = self._resolve(Role.SOURCE, attempt.source, word)
        if verdict is None and not attempt.source.runs_with(attempt.contents):
            raise Violation("the source has no journal, and was touched")

    def _resolve(self, role: Role, host: Host, word: Verdict | None) -> Verdict | None:
        records = sessions(host.journal)
        if not records:
            return None
        done = resolve(records[0].session, role=role, directory=host.journal, peer=word)
        self.found.append(done)
        return done.verdict
