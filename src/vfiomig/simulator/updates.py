"""The stream of a simulated pre-copy: update records, replayed onto a new state at the commit.

    record   magic u64, kind u32, tag u32, offset u64, length u64, little endian; then the bytes
    BEGIN    first; length is the size of the state, and no bytes follow
    DATA     length bytes of the state at offset
    END      last; nothing else

Only sessions that began in PRE_COPY write it. A raw state never begins with the magic.
"""

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from vfiomig.fd import OwnedFd

MAGIC = int.from_bytes(b"simupdt1", "little")
RECORD = struct.Struct("<QIIQQ")
# No state is larger: a damaged stream must not make a file of any size.
_LARGEST_BYTES = 2**48


class Kind(IntEnum):
    """What a record is."""

    BEGIN = 1
    DATA = 2
    END = 3


@dataclass(slots=True)
class Segment:
    """Bytes of a file that wait to be read: what is fed to the pipe of a session."""

    fd: int
    offset: int
    length: int


class UpdateLog:
    """Writes records. Their headers are in a memfd, so that all segments are alike."""

    def __init__(self) -> None:
        self._headers = OwnedFd(os.memfd_create("vfiomig-sim-records", os.MFD_CLOEXEC))
        self._length = 0

    def begin(self, size_bytes: int) -> list[Segment]:
        """Return the record that begins a stream of a state of this size."""
        return [self._header(Kind.BEGIN, 0, size_bytes)]

    def data(self, fd: int, offset: int, length: int) -> list[Segment]:
        """Return the record of these bytes of the state."""
        return [self._header(Kind.DATA, offset, length), Segment(fd, offset, length)]

    def end(self) -> list[Segment]:
        """Return the record that ends a stream."""
        return [self._header(Kind.END, 0, 0)]

    def _header(self, kind: Kind, offset: int, length: int) -> Segment:
        at = self._length
        record = RECORD.pack(MAGIC, kind, 0, offset, length)
        self._length += os.pwrite(self._headers.fileno(), record, at)
        return Segment(self._headers.fileno(), at, RECORD.size)

    def close(self) -> None:
        """Free the headers: no segment of them may be left."""
        self._headers.close()


class Update(NamedTuple):
    """A DATA record: length bytes at source of the stream belong at offset of the state."""

    source: int
    offset: int
    length: int


class UpdateStream(NamedTuple):
    """What is whole of a stream. is_complete: it is not cut, and nothing in it is wrong."""

    fd: int
    size_bytes: int
    is_complete: bool

    def updates(self) -> Iterator[Update]:
        """Yield its updates in order; a cut one as far as it goes."""
        for kind, update in _records(self.fd, self.size_bytes):
            if kind is Kind.DATA:
                yield update

    def replay(self, target_fd: int) -> None:
        """Write the state into an empty file. Raises OSError."""
        os.ftruncate(target_fd, self.size_bytes)
        for update in self.updates():
            _copy(self.fd, update, target_fd)


def find_updates(fd: int) -> UpdateStream | None:
    """Return the update stream in a file, None when it is a raw state."""
    head = os.pread(fd, RECORD.size, 0)
    if len(head) < RECORD.size:
        return None
    magic, kind, tag, offset, size_bytes = RECORD.unpack(head)
    if magic != MAGIC:
        return None
    if (kind, tag, offset) != (Kind.BEGIN, 0, 0) or size_bytes > _LARGEST_BYTES:
        return UpdateStream(fd, 0, is_complete=False)
    last = None
    for kind, update in _records(fd, size_bytes):
        last = kind, update.source + update.length
    whole = last == (Kind.END, os.fstat(fd).st_size)
    return UpdateStream(fd, size_bytes, whole)


def _records(fd: int, size_bytes: int) -> Iterator[tuple[Kind, Update]]:
    """Yield the records behind BEGIN, up to the first that is not whole or cannot be."""
    at, end = RECORD.size, os.fstat(fd).st_size
    while at + RECORD.size <= end:
        magic, kind, tag, offset, length = RECORD.unpack(os.pread(fd, RECORD.size, at))
        at += RECORD.size
        fits = offset + length <= (size_bytes if kind == Kind.DATA else 0)
        if magic != MAGIC or kind not in (Kind.DATA, Kind.END) or tag or not fits:
            return
        yield Kind(kind), Update(at, offset, min(length, end - at))
        at += length
        if kind == Kind.END:
            return


def _copy(source_fd: int, update: Update, target_fd: int) -> None:
    os.lseek(target_fd, update.offset, os.SEEK_SET)
    moved = 0
    while moved < update.length:
        # Between two regular files, without the bytes passing through Python.
        sent = os.sendfile(target_fd, source_fd, update.source + moved, update.length - moved)
        if not sent:  # somebody cut the file: not for ever, please
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved += sent
