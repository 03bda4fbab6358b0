"""What becomes of a session whose process ended without an end: by its journal, and a word.

verdict.py has the rules; this has the devices of this host do what they say, and records it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from vfiomig.errors import (
    DeviceBusyError,
    DeviceIOError,
    DeviceStateError,
    NoSuchDeviceError,
    OutcomeUnknownError,
    UsageError,
)
from vfiomig.live.handover import DESTINATION, Act, Destination, DestinationEvent
from vfiomig.live.journal import Journal, busy, journal_directory, sessions
from vfiomig.live.record import Record
from vfiomig.live.remains import Remains
from vfiomig.live.verdict import (
    EVENT_OF,
    Role,
    Verdict,
    acts_of_destination,
    acts_of_source,
    final_of,
    verdict_of,
)
from vfiomig.report import OnEvent
from vfiomig.worker import Cancellation, run_shielded

_SHORTEST = 4
_NOT_RUN = DESTINATION[Destination.GOING, DestinationEvent.FAILED][1]


class Resolution(NamedTuple):
    """What was decided, and done. was, verdict: before and after.

    devices: names with their states, "" where nobody looked. did: a sentence. destination: what was
    decided there first, where both journals are on this host.
    """

    session: str
    role: Role
    was: Verdict
    verdict: Verdict
    devices: tuple[tuple[str, str], ...]
    did: str
    destination: "Resolution | None" = None


def resolve(
    session: str,
    *,
    role: Role | None = None,
    directory: Path | None = None,
    peer: Verdict | None = None,
    dry_run: bool = False,
    on_event: OnEvent | None = None,
) -> Resolution:
    """Decide what becomes of a session's devices on this host, do it, and record it.

    session: 32 hex digits, or a beginning of at least 4. role: whose journal, where both are here;
    without it the destination's first, and the source's with what that says. peer: the other side's
    verdict, None if nobody knows. dry_run: look, and change nothing. Blocks.
    Raises OutcomeUnknownError when it takes the other side's word (nothing is changed then),
    DeviceBusyError when a process is still at work on it, NoSuchDeviceError, UsageError, and what
    devices raise.
    """
    where = directory or journal_directory()
    records = find(session, where)
    if role is not None:
        records = {role: records[role]} if role in records else {}
    if not records:
        raise NoSuchDeviceError(f"no {role} of session {session} has a journal in {where}")
    told = None
    source, destination = records.get(Role.SOURCE), records.get(Role.DESTINATION)
    if source is not None and destination is not None:
        word = source.verdict if source.is_final else None
        told = _told_here(destination, word, dry_run=dry_run, on_event=on_event)
        peer = peer or (told.verdict if told else None)
    record = source or records[Role.DESTINATION]
    return _one(record, peer, dry_run=dry_run, on_event=on_event)._replace(destination=told)


def find(session: str, directory: Path) -> Mapping[Role, Record]:
    """Return the journals of a session, which may be abbreviated. Raises as resolve()."""
    if len(session) < _SHORTEST or set(session.lower()) - set("0123456789abcdef"):
        raise UsageError(f"{session!r} is no session: 32 hex digits, or the first {_SHORTEST}")
    found = [one for one in sessions(directory) if one.session.startswith(session.lower())]
    names = sorted({one.session for one in found})
    if len(names) > 1:
        raise UsageError(f"{session} may be any of {', '.join(names)}", hint="give more of it")
    if not found:
        raise NoSuchDeviceError(
            f"there is no session {session} in {directory}",
            hint="vfiomig resolve lists them; --journal names another directory",
        )
    return {one.role: one for one in found}


def check_peer(record: Record, session: str, role: Role) -> Verdict | None:
    """Return the verdict of the other side's journal, or of a copy; None unless it is final.

    session, role: of this side. Raises UsageError for another session's, or this side's own.
    """
    if record.is_damaged:
        return None
    if record.session != session or record.role is role:
        raise UsageError(
            f"{record.path} is the journal of the {record.role} of session {record.session}",
            hint=f"it takes that of the other side of session {session}",
        )
    return record.verdict if record.is_final else None


def _told_here(
    record: Record, peer: Verdict | None, *, dry_run: bool, on_event: OnEvent | None
) -> Resolution | None:
    try:
        return _one(record, peer, dry_run=dry_run, on_event=on_event)
    except (OutcomeUnknownError, DeviceBusyError):
        return None  # the source says whether it needs it


def _one(
    record: Record, peer: Verdict | None, *, dry_run: bool, on_event: OnEvent | None
) -> Resolution:
    if record.is_final:
        return _decided(record, peer)
    if record.is_live:
        raise busy(record)
    with ExitStack() as stack:
        journal = None
        if not dry_run:
            journal, record = Journal.reopen(record.path)
            stack.callback(journal.close)
            if record.is_final:  # somebody else has resolved it meanwhile
                return _decided(record, peer)
        settling = _Settling(record, journal, peer, on_event)
        stop = stack.enter_context(closing(Cancellation()))
        return run_shielded(settling.run, stop)


def _decided(record: Record, peer: Verdict | None) -> Resolution:
    verdict = record.verdict
    twice = (verdict, peer) in ((Verdict.BACK, Verdict.RAN), (Verdict.RAN, Verdict.BACK))
    if twice or (verdict, peer) == (Verdict.RELEASED, Verdict.NEVER_RAN):
        raise OutcomeUnknownError(
            f"session {record.session}: the journal of the {record.role} says {verdict}, and the"
            f" other side {peer}: {'both may run' if twice else 'neither runs'}",
            session=record.session,
            hint="one of the two was told something that was not so: look at the devices of both"
            " hosts, and set them by hand (vfiomig state, vfiomig reset)",
        )
    devices = tuple((name, "") for name in record.devices)
    done = f"it was decided before: {verdict}"
    return Resolution(record.session, record.role, verdict, verdict, devices, done)


class _Settling:
    """One side of one session. Runs in the working thread. journal: None for a dry run."""

    def __init__(
        self,
        record: Record,
        journal: Journal | None,
        peer: Verdict | None,
        on_event: OnEvent | None,
    ) -> None:
        self._record, self._journal, self._peer = record, journal, peer
        self._remains = Remains(record, on_event, dry_run=journal is None)
        self._events = set(record.names)
        self._notes: list[str] = []

    def run(self) -> Resolution:
        with closing(self._remains):
            is_source = self._record.role is Role.SOURCE
            acts = self._acts_of_source() if is_source else self._acts_of_destination()
            done = _sentence(self._record.verdict, acts)
            try:
                self._do_all(acts)
            except (DeviceStateError, DeviceIOError) as err:
                if is_source or Act.RUN not in acts:
                    raise
                self._do_all(_NOT_RUN)
                done = f"GO had come, and it could not run here: {err}; it was reset"
            return self._resolution(done)

    def _acts_of_source(self) -> tuple[Act, ...]:
        record = self._record
        acts = acts_of_source(record.verdict, self._peer)
        # Of a damaged journal the devices can be relied on, where they were read at all.
        useless = not record.is_damaged or not record.devices or final_of(record.role, record.names)
        if acts is None or (record.verdict is Verdict.UNKNOWN and useless):
            raise self._source_unknown()
        self._remains.open(needed=Act.RUN in acts)
        return acts

    def _acts_of_destination(self) -> tuple[Act, ...]:
        verdict = self._record.verdict
        if verdict is Verdict.UNKNOWN:
            raise self._destination_unknown(self._damage())
        self._remains.open(needed=False)
        acts = acts_of_destination(verdict, self._remains.left, self._events, self._peer)
        if acts is None:
            raise self._destination_unknown("; ".join(found.look() for found in self._remains))
        return acts

    def _do_all(self, acts: Sequence[Act]) -> None:
        for act in acts:
            if act in EVENT_OF:
                self._note(EVENT_OF[act])
            elif self._journal is not None:
                self._do(act)

    def _note(self, event: str) -> None:
        self._events.add(event)
        if self._record.is_damaged:
            self._notes.append(f"{event!r} was not recorded: {self._damage()}")
        elif self._journal is not None:
            self._journal.record(event, by="resolve", word=self._peer)

    def _do(self, act: Act) -> None:
        if act is Act.RUN and self._record.role is Role.SOURCE:
            self._remains.bring_back()
        elif act is Act.RUN:
            self._remains.let_run()
        elif act is Act.HOLD:
            self._remains.hold()
        elif act is Act.RESET:
            # Without a GO, what runs there now is none of this session's business.
            self._remains.reset(running="forgetting" in self._events)

    def _resolution(self, done: str) -> Resolution:
        record, verdict = self._record, verdict_of(self._record.role, self._events)
        states = [(found.name, found.state) for found in self._remains]
        devices = tuple((name, state.name if state is not None else "") for name, state in states)
        if self._journal is not None and not record.is_damaged:
            self._journal.record("resolved", verdict=verdict, did=done)
        whys = [found.look() for found in self._remains if found.why]
        did = "; ".join([done, *whys, *self._remains.notes, *self._notes])
        return Resolution(record.session, record.role, record.verdict, verdict, devices, did)

    def _damage(self) -> str:
        return f"its journal is damaged: {self._record.damage or 'it contradicts itself'}"

    def _source_unknown(self) -> OutcomeUnknownError:
        session, peer = self._record.session, self._peer
        what = {
            Verdict.MAY_RUN: "GO was not given",
            Verdict.HELD: "GO was given",
        }.get(self._record.verdict, self._damage())
        says = "what became of the destination is not known here"
        if peer is not None:
            says = f"the destination says {peer}, which decides nothing"
        return OutcomeUnknownError(
            f"session {session}: {what}, and {says}; nothing was changed",
            session=session,
            hint=f"vfiomig resolve {session} at the destination, then here with what it says:"
            " --peer never-ran|ran, or --peer-journal FILE; or both at once: --via ssh:HOST",
        )

    def _destination_unknown(self, why: str) -> OutcomeUnknownError:
        session = self._record.session
        return OutcomeUnknownError(
            f"session {session}: whether it ran here is not known: {why}; nothing was changed",
            session=session,
            hint="the source's journal may say it (--peer-journal FILE). Else it is yours to say:"
            f" see what ran here; then, at the source, vfiomig resolve {session} --peer ran, or"
            " --peer never-ran to let it run there with the state it has",
        )


def _sentence(verdict: Verdict, acts: Sequence[Act]) -> str:
    if Act.RECORD_BACK in acts:
        reason = "the destination never ran"
        if verdict is Verdict.MAY_RUN:
            reason = "GO was not given"
        return f"{reason}: the source runs again"
    if Act.RECORD_RELEASED in acts:
        return "it runs at the destination: the source stays stopped"
    if Act.RECORD_FORGETTING in acts:
        return "GO had come, and it did not run here: it was reset, and never will"
    if Act.RECORD_FORGOTTEN in acts:
        return "no GO had come: it never ran here, and never will"
    return f"GO had come: it {'was let run' if Act.RUN in acts else 'runs'} here"
