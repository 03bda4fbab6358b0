"""Faults a simulated device can be told to have: fault=NAME:WHAT[@WHERE][*COUNT].

    read:ERRNO@BYTE           a read fails at this byte of the stream (default 0)
    write:ERRNO@BYTE          a write that reaches this byte of the stream fails
    set:ERRNO@STATE           the step into STATE (default: any) fails; the state stays
    set:ERRNO@STATE:ERROR     ... and the device is in ERROR
    set-after:ERRNO@STATE     the step into STATE is done, but SET fails and gives no data_fd
    get:ERRNO                 the state cannot be read
    caps:ERRNO                the capabilities cannot be read (ENOTTY: no migration at all)
    size:ERRNO                VFIO_DEVICE_FEATURE_MIG_DATA_SIZE fails
    info:ERRNO                VFIO_MIG_GET_PRECOPY_INFO fails
    info:GARBAGE              ... gives numbers that cannot be
    info:REINIT               ... starts over: the whole state is initial data again
    reset:ERRNO               VFIO_DEVICE_RESET fails
    log-start:ERRNO           the DMA log cannot be started; also log-report: and log-stop:
    async-reset:read@BYTE     the device is reset underneath, at this byte of a save
    async-reset:write@BYTE    ... of a load
    async-reset:set@STATE     ... right after it entered STATE
    hang:DURATION@read:BYTE   the device does nothing for so long; also @write:BYTE @set:STATE
                              @get @reset

ERRNO is a name such as EIO, BYTE a size (4096, 1M), STATE a name of the state machine. COUNT is how
often the fault strikes while the device is open; without it, always.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from vfiomig.errors import UsageError
from vfiomig.quantities import parse_duration, parse_size
from vfiomig.uapi import DeviceState


class Action(Enum):
    """What a fault does when it strikes."""

    FAIL = auto()
    HANG = auto()
    RESET = auto()
    GARBAGE = auto()
    REINIT = auto()


_AT_BYTE = ("read", "write")
_AT_STATE = ("set", "set-after")
_LOGGING = ("log-start", "log-report", "log-stop")
_ANYWHERE = ("get", "caps", "size", "info", "reset", *_LOGGING)
_HANGS = ("read", "write", "set", "get", "reset")
_RESETS = ("read", "write", "set")
NAMES = (*_AT_BYTE, *_AT_STATE, *_ANYWHERE, "async-reset", "hang")


@dataclass(slots=True)
class Fault:
    """One fault. left: how often it will still strike; None is for ever."""

    where: str
    action: Action
    errno: int = 0
    duration_ns: int = 0
    byte: int = 0
    state: DeviceState | None = None
    to_error: bool = False
    left: int | None = None

    def take(self) -> bool:
        """Use it up once. False when it struck as often as it may."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0

    def error(self) -> OSError:
        """Return the error the device gives."""
        return OSError(self.errno, os.strerror(self.errno))


class FaultScript:
    """The faults of one opening of a device. Its counts are not for several threads at once."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = list(faults)

    def strikes(self, where: str, state: DeviceState | None = None) -> Iterator[Fault]:
        """Yield the faults that strike now: hangs, and one other. The rest are not used up."""
        for fault in self._faults:
            if fault.where == where and fault.state in (None, state) and fault.take():
                yield fault
                if fault.action is not Action.HANG:
                    return

    def in_stream(self, where: str) -> list[Fault]:
        """Return the faults of a read or a write session in the order of their bytes."""
        found = (fault for fault in self._faults if fault.where == where)
        return sorted(found, key=lambda fault: fault.byte)


def parse_fault(text: str) -> Fault:
    """Return the fault this text describes. Raises UsageError."""
    body, star, count = text.partition("*")
    name, _, rest = body.partition(":")
    what, _, where = rest.partition("@")
    if name == "hang":
        fault = _at(_of(text, where.partition(":")[0], _HANGS), where.partition(":")[2], text)
        fault.action, fault.duration_ns = Action.HANG, parse_duration(what)
    elif name == "async-reset":
        fault = _at(_of(text, what, _RESETS), where, text)
        fault.action = Action.RESET
        # It follows the state change, and does not fail it.
        fault.where = "set-after" if what == "set" else what
    elif name in NAMES:
        fault = _failing(name, what, where, text)
    else:
        raise UsageError(f"fault {text!r}: there is no {name!r}; known are {', '.join(NAMES)}")
    if star:
        fault.left = _count(count, text)
    return fault


def parse_errno(name: str) -> int:
    """Return the number of an errno's name, such as EIO. Raises UsageError."""
    numbers = {text: number for number, text in errno.errorcode.items()}
    numbers |= {
        "EOPNOTSUPP": errno.EOPNOTSUPP,
        "ENOTSUP": errno.ENOTSUP,
        "EWOULDBLOCK": errno.EWOULDBLOCK,
    }
    try:
        return numbers[name.upper()]
    except KeyError:
        raise UsageError(f"{name!r} is not the name of an errno, such as EIO") from None


def parse_state(name: str) -> DeviceState:
    """Return the device state of this name. Raises UsageError."""
    try:
        return DeviceState[name.upper()]
    except KeyError:
        known = ", ".join(state.name for state in DeviceState)
        raise UsageError(f"{name!r} is not a device state; those are {known}") from None


def _failing(name: str, what: str, where: str, text: str) -> Fault:
    place, _, after = where.partition(":") if name == "set" else (where, "", "")
    if after not in ("", "ERROR"):
        raise UsageError(f"fault {text!r}: after the state there may only be :ERROR")
    fault = _at(name, place, text)
    fault.to_error = bool(after)
    if name == "info" and what in (Action.GARBAGE.name, Action.REINIT.name):
        fault.action = Action[what]
    else:
        fault.errno = parse_errno(what)
    return fault


def _at(name: str, place: str, text: str) -> Fault:
    fault = Fault(name, Action.FAIL)
    if not place:
        return fault
    if name in _AT_BYTE:
        fault.byte = parse_size(place)
    elif name in _AT_STATE:
        fault.state = parse_state(place)
    else:
        raise UsageError(f"fault {text!r}: {name} has no place to put {place!r}")
    return fault


def _of(text: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UsageError(f"fault {text!r}: it happens at {', '.join(known)}, not at {name!r}")
    return name


def _count(text: str, whole: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise UsageError(f"fault {whole!r}: {text!r} is not how often it happens")
    return int(text)
