"""What devices were measured to do, kept from one migration to the next in one small file.

A migration is estimated with it, and never depends on it: a file that is missing, damaged or cannot
be written only makes the next estimate less exact.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vfiomig.framing import strict_json
from vfiomig.identity import Identity
from vfiomig.switchover import Band

# "source": of its device, in a session; "destination": likewise; "read": by `vfiomig estimate`.
Role = Literal["source", "destination", "read"]
FILE_NAME = "rates.json"
# Ours: enough for a spread; and enough kinds of devices for one host.
KEPT, MAX_DEVICES = 8, 64
_MAX_FILE_BYTES = 256 << 10
# Less than this moves too fast for a clock and a pipe's buffer to tell a rate.
TELLING_BYTES = 1 << 20
_LARGEST = (1 << 63) - 1


class Measured(NamedTuple):
    """What was measured: bytes per second, and the nanoseconds of what does not depend on bytes."""

    bytes_per_s: Band | None
    fixed_ns: Band | None


class _Entry(NamedTuple):
    """The measurements of one kind of device in one role, the newest last."""

    role: str
    identity: Identity
    bytes_per_s: tuple[int, ...]
    fixed_ns: tuple[int, ...]


class Rates:
    """The measurements in a directory. May be used by several threads, and several processes.

    Two that add at the same moment may lose one of the two measurements, and nothing else.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._lock = directory, threading.Lock()

    def read(self, role: Role, identity: Identity) -> Measured | None:
        """Return what is known of such a device in this role, None if nothing is."""
        for entry in self._entries():
            if (entry.role, entry.identity) == (role, identity):
                return Measured(Band.of(entry.bytes_per_s), Band.of(entry.fixed_ns))
        return None

    def of_source(self, identity: Identity) -> Measured | None:
        """Return what such a device does at the source: what "read" found goes before sessions.

        What does not depend on bytes is that of sessions, which stop a device and do not resume it.
        """
        read, source = self.read("read", identity), self._in_sessions("source", identity)
        if read is None or source is None:
            return read or source
        rate = source.bytes_per_s if read.bytes_per_s is None else read.bytes_per_s
        return Measured(rate, read.fixed_ns if source.fixed_ns is None else source.fixed_ns)

    def of_destination(self, identity: Identity) -> Measured | None:
        """Return what such a device does at the destination."""
        return self._in_sessions("destination", identity)

    def _in_sessions(self, role: Role, identity: Identity) -> Measured | None:
        found = self.read(role, identity)
        if found is None or found.bytes_per_s is None:
            return found
        # A session shows no more than its link and the other end let through: the fastest counts.
        _, low, high = found.bytes_per_s
        return Measured(Band(high, low, high), found.fixed_ns)

    def add(
        self, role: Role, identity: Identity, *, bytes_per_s: int, fixed_ns: int, moved_bytes: int
    ) -> None:
        """Keep a measurement. Of less than 1 MiB, or of no rate, fixed_ns alone is kept."""
        is_telling = moved_bytes >= TELLING_BYTES and 0 < bytes_per_s <= _LARGEST
        rates: tuple[int, ...] = (bytes_per_s,) if is_telling else ()
        times: tuple[int, ...] = (fixed_ns,) if 0 <= fixed_ns <= _LARGEST else ()
        with self._lock:
            others = []
            for entry in self._entries():
                if (entry.role, entry.identity) == (role, identity):
                    rates, times = entry.bytes_per_s + rates, entry.fixed_ns + times
                else:
                    others.append(entry)
            mine = _Entry(role, identity, rates[-KEPT:], times[-KEPT:])
            # Nobody is told: the work that was measured has succeeded.
            with suppress(OSError):
                self._write([*others[1 - MAX_DEVICES :], mine])

    def _entries(self) -> list[_Entry]:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._directory / FILE_NAME, flags), "rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            if len(data) > _MAX_FILE_BYTES:
                return []
            items = strict_json.field(strict_json.loads(data), "measurements", list)
            return [_decoded(item) for item in items]
        except (OSError, ValueError):
            return []  # nothing is known, as on the first day

    def _write(self, entries: list[_Entry]) -> None:
        values = [entry._asdict() | {"identity": asdict(entry.identity)} for entry in entries]
        data = json.dumps({"version": 1, "measurements": values}, indent=1).encode()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _replacing(self._directory / FILE_NAME) as fd, open(fd, "wb") as file:
            file.write(data)


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Give a new file that becomes path when the with block ends well; who gets it closes it."""
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with suppress(FileNotFoundError):
        new.unlink()  # of a process of the same number that was killed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600)
    try:
        yield fd
        new.rename(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _decoded(plain: object) -> _Entry:
    identity = strict_json.field(plain, "identity", dict)
    fields = [str(strict_json.field(identity, name, str)) for name in Identity.__slots__]
    role = strict_json.field(plain, "role", str)
    return _Entry(
        role, Identity(*fields), _numbers(plain, "bytes_per_s"), _numbers(plain, "fixed_ns")
    )


def _numbers(plain: object, name: str) -> tuple[int, ...]:
    values: list[Any] = strict_json.field(plain, name, list)
    if not all(type(value) is int and value <= _LARGEST for value in values):
        raise ValueError(f"{name} holds what was never measured")
    return tuple(values[-KEPT:])
