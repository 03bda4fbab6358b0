"""What is in a journal: its lines, and what they say. Sans-I/O.

A journal is a file of fixed size: lines of JSON, then spaces up to its end. "begun" says the size,
so that a file that has become shorter shows; each line carries an XXH3-64 of itself without it,
seeded with the one of the line before, so that damage, loss and another order show.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vfiomig._fastcopy import xxh3_64
from vfiomig.live.verdict import Role, Verdict, final_of, verdict_of

FORMAT = 1
SUFFIX = ".journal"
# Ours: an event is 200 bytes and a session has ten; the names of 256 devices may be long.
LARGEST_BYTES = 1 << 20
_ROOM_BYTES, _BLOCK_BYTES = 16 << 10, 4096
_SUM = b',"sum":"'
_SUM_BYTES = len(_SUM) + 16 + len(b'"}\n')
_RESERVED = {"at", "event", "sum"}


class Event(NamedTuple):
    """One line of a journal. at: UTC, ISO 8601."""

    at: str
    event: str
    facts: Mapping[str, Any]


class Record(NamedTuple):
    """What a journal says. facts: of "begun". is_live: somebody is at work on the session.

    damage: what is wrong with it, or ""; then facts and events are those before it. end_bytes,
    chain: where the next line goes, and what it follows.
    """

    path: Path
    session: str
    role: Role
    facts: Mapping[str, Any]
    events: tuple[Event, ...]
    damage: str
    is_live: bool
    end_bytes: int
    chain: int

    @property
    def is_damaged(self) -> bool:
        """Whether what it says cannot be relied on."""
        return bool(self.damage)

    @property
    def names(self) -> frozenset[str]:
        """The events, without their order."""
        return frozenset(event.event for event in self.events)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices' names as they were given, which may be opened again."""
        return tuple(self.facts.get("devices", ()))

    @property
    def verdict(self) -> Verdict:
        """Where that side stands, by its journal alone."""
        return verdict_of(self.role, self.names, is_damaged=self.is_damaged)

    @property
    def is_final(self) -> bool:
        """Whether nothing changes the verdict any more."""
        return self.verdict in final_of(self.role, self.names)

    @property
    def begun_at(self) -> str:
        """When it was begun; "" when even that is damaged."""
        return self.events[0].at if self.events else ""

    @property
    def age_ns(self) -> int:
        """Time since its last event, by the wall clock; 0 when nobody knows."""
        if not self.events:
            return 0
        passed = datetime.now(UTC) - datetime.fromisoformat(self.events[-1].at)
        return max(int(passed.total_seconds() * 10**9), 0)


class DamageError(ValueError):
    """What is wrong with a journal, a clause."""


def file_name(session: str, role: Role) -> str:
    """Return the name of a side's journal."""
    return f"{session}.{role}{SUFFIX}"


def session_of(name: str) -> tuple[str, Role] | None:
    """Return what a file name says, None if it is no journal's."""
    session, _, role = name.removesuffix(SUFFIX).partition(".")
    is_ours = name.endswith(SUFFIX) and role in list(Role)
    return (session, Role(role)) if is_ours and session else None


def first_line(facts: Mapping[str, object]) -> tuple[bytes, int, int]:
    """Return "begun" with facts, the chain behind it, and the bytes that the file has to have."""
    needed = len(json.dumps(facts)) + _ROOM_BYTES
    size_bytes = (needed + _BLOCK_BYTES - 1) // _BLOCK_BYTES * _BLOCK_BYTES
    return *line_of("begun", {**facts, "format": FORMAT, "size": size_bytes}, 0), size_bytes


def line_of(event: str, facts: Mapping[str, object], chain: int) -> tuple[bytes, int]:
    """Return a line that follows chain, and the chain behind it."""
    assert not _RESERVED & facts.keys(), "a fact bears a name of the journal's own"
    at = datetime.now(UTC).isoformat(timespec="microseconds")
    body = json.dumps({"at": at, "event": event, **facts}, separators=(",", ":")).encode()
    chain = xxh3_64(body, chain)
    return body[:-1] + _SUM + b'%016x"}\n' % chain, chain


def parse(data: bytes, path: Path, *, is_live: bool) -> Record:
    """Return what the bytes of a journal say. path: for its name. Damage is in the record."""
    named = session_of(path.name)
    session, role = named or ("", Role.SOURCE)
    events: list[Event] = []
    end_bytes, chain, damage = 0, 0, ""
    try:
        for line in _lines(data):
            event, chain = _checked(line, chain)
            if not events:
                session, role = _checked_begin(event, named)
            events.append(event)
            end_bytes += len(line)
        if not events:
            raise DamageError("it is not there")
        if events[0].facts.get("size") != len(data):
            raise DamageError(f"the file has become another length, {len(data)} bytes")
    except DamageError as err:
        damage = f"line {len(events) + 1}: {err}"
    facts = events[0].facts if events else {}
    return Record(path, session, role, facts, tuple(events), damage, is_live, end_bytes, chain)


def _lines(data: bytes) -> Iterator[bytes]:
    """Yield the lines up to the spaces that fill the rest."""
    if len(data) > LARGEST_BYTES:
        raise DamageError(f"no journal has more than {LARGEST_BYTES} bytes")
    at = 0
    while at < len(data) and data[at : at + 1] != b" ":
        end = data.find(b"\n", at) + 1
        if not end:
            raise DamageError("it has no end")
        yield data[at:end]
        at = end
    if data[at:].strip(b" "):
        raise DamageError("it does not begin where it should")


def _checked(line: bytes, chain: int) -> tuple[Event, int]:
    """Check a line that must follow chain. Returns it, and the chain behind it."""
    body = line[:-_SUM_BYTES] + b"}"
    chain = xxh3_64(body, chain)
    if line != body[:-1] + _SUM + b'%016x"}\n' % chain:
        raise DamageError("its checksum is wrong, or it belongs elsewhere")
    try:
        plain = json.loads(body)
        at, event = plain.pop("at"), plain.pop("event")
        if datetime.fromisoformat(at).tzinfo is None or not isinstance(event, str):
            raise ValueError("no time, or no event")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise DamageError(f"it is no event: {err}") from err
    return Event(at, event, plain), chain


def _checked_begin(first: Event, named: tuple[str, Role] | None) -> tuple[str, Role]:
    """Check the first event, also against the file's name. Returns the session and the role."""
    facts = first.facts
    session, role, devices = facts.get("session"), facts.get("role"), facts.get("devices", [])
    if first.event != "begun" or facts.get("format") != FORMAT:
        raise DamageError(f"it is {first.event!r}, format {facts.get('format')!r}")
    if not isinstance(devices, list) or not all(isinstance(name, str) for name in devices):
        raise DamageError("its devices are no names")
    if not isinstance(session, str) or role not in list(Role):
        raise DamageError("it does not say whose it is")
    if named is not None and named != (session, role):
        raise DamageError(f"it is of session {session}, {role}")
    return session, Role(role)
