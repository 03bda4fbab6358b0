"""What the two ends of a session say to each other: small JSON objects, strictly parsed.

A message's fields are its class's; unknown fields are passed over, and those that have a default
may be missing, so that later versions may add some; an unknown type is an error. Sans-I/O.
"""

import json
from typing import Any, NamedTuple, get_type_hints

from vfiomig.errors import ResourceLimitError
from vfiomig.framing import strict_json
from vfiomig.framing.manifest import DeviceEntry, decode_entry, entry_values
from vfiomig.live.wire import MAX_MESSAGE_BYTES


class Hello(NamedTuple):
    """Both: who is there, with which devices, in the order that pairs them.

    token: the destination's, hex, for further connections. rates, fixed_ns: what each of its
    devices was measured to load, in bytes per second, and to take beside; 0 where it never was.
    max_state_bytes: the largest state it takes into a device; 0: it does not say.
    """

    tool: str
    devices: tuple[DeviceEntry, ...]
    token: str = ""
    rates: tuple[int, ...] = ()
    fixed_ns: tuple[int, ...] = ()
    max_state_bytes: int = 0


class Begin(NamedTuple):
    """Source: all checks were passed; enter RESUMING. lease_ns: how long to wait for GO later."""

    lease_ns: int


class Resuming(NamedTuple):
    """Destination: all devices are in RESUMING."""


class Mark(NamedTuple):
    """Source, in the stream of a device: answer when all before this is in the device."""

    number: int


class Marked(NamedTuple):
    """Destination: all before that mark is in the device."""

    device: int
    number: int


class Status(NamedTuple):
    """Source, once a second: it is alive, and this is where it stands."""

    phase: str
    round: int
    pending_bytes: int
    expected_downtime_ns: int


class Progress(NamedTuple):
    """Destination, when something moved, and once a second: bytes in each device so far."""

    loaded_bytes: tuple[int, ...]


class Stopping(NamedTuple):
    """Source: the devices are about to be stopped, for so long as it expects."""

    expected_downtime_ns: int


class End(NamedTuple):
    """Source, in the stream of a device: that was all of it. digest: 16 hex digits."""

    device_bytes: int
    digest: str


class Ready(NamedTuple):
    """Destination: everything is verified and committed, all devices are in STOP."""

    device_bytes: tuple[int, ...]
    digests: tuple[str, ...]
    commit_ns: int


class Go(NamedTuple):
    """Source: it will not run again by itself; run."""


class Done(NamedTuple):
    """Destination: all devices are RUNNING. ran_after_ns: from hearing GO to the last of them.

    fixed_ns: of the downtime, what the commit and that took. stopped_ns: the downtime from here.
    """

    ran_after_ns: int
    fixed_ns: int
    stopped_ns: int


class Bye(NamedTuple):
    """Source: it has heard DONE, and released its devices. The downtime as it reckons it.

    rates: of each device, what arrived while it was stopped, in bytes per second.
    """

    downtime_ns: int
    downtime_error_ns: int
    source_downtime_ns: int
    rates: tuple[int, ...]


class Fail(NamedTuple):
    """Both: it goes no further; each rolls back by its own rule. code: MigrationError's.

    fields: of devices that do not fit, three texts for each field: its name, and both values.
    """

    code: int
    error: str
    message: str
    hint: str
    phase: str
    fields: tuple[str, ...] = ()


class Left(NamedTuple):
    """Both, after Fail: rolled back, and what the devices were left in.

    never_ran: the destination's word that it did not run this state, and never will.
    """

    never_ran: bool
    states: tuple[str, ...]


Message = (
    Hello
    | Begin
    | Resuming
    | Mark
    | Marked
    | Status
    | Progress
    | Stopping
    | End
    | Ready
    | Go
    | Done
    | Bye
    | Fail
    | Left
)
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in Message.__args__}
_HINTS = {kind: get_type_hints(kind) for kind in _KINDS.values()}


def encode(message: Message) -> bytes:
    """Return a message as JSON in UTF-8. Raises ResourceLimitError for one that is too long."""
    fields: dict[str, object] = dict(message._asdict())
    if isinstance(message, Hello):
        fields["devices"] = [entry_values(entry) for entry in message.devices]
    name = type(message).__name__.lower()
    data = json.dumps({"type": name, **fields}, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ResourceLimitError(
            f"{name} has {len(data)} bytes, and a message at most {MAX_MESSAGE_BYTES}",
            hint="send fewer devices in one session",
        )
    return data


def decode(data: bytes) -> Message:
    """Parse a message. Raises ValueError for what is none, whatever the bytes are."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes")
    plain = strict_json.loads(data)
    name = strict_json.field(plain, "type", str)
    if name not in _KINDS:
        raise ValueError(f"there is no message {name[:40]!r}")
    kind = _KINDS[name]
    optional = kind._field_defaults.keys() - plain.keys()
    wanted = {field: hint for field, hint in _HINTS[kind].items() if field not in optional}
    found: Message = kind(**{field: _value(plain, field, hint) for field, hint in wanted.items()})
    return found


def _value(plain: dict[str, Any], name: str, wanted: object) -> object:
    if wanted is bool:
        return strict_json.field(plain, name, bool)
    if wanted is int:
        return _integer(plain.get(name), name)
    if wanted is str:
        return strict_json.field(plain, name, str)
    items = strict_json.field(plain, name, list)
    if wanted == tuple[DeviceEntry, ...]:
        return tuple(decode_entry(item) for item in items)
    if wanted == tuple[int, ...]:
        return tuple(_integer(item, name) for item in items)
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} is no list of texts")
    return tuple(items)


def _integer(value: object, name: str) -> int:
    if type(value) is not int:  # bool is an int
        raise ValueError(f"{name} is missing or is no whole number")
    return value
