"""A data session as a rule uses it, and a state that is kept in a file. Memory is constant."""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vfiomig._fastcopy import Digest
from vfiomig.channel import DataChannel, PrecopyInfo

# QEMU's buffer (MAX_QEMU_MIGRATION_BUFFER_SIZE, hw/vfio/migration.c): what a driver is used to.
CHUNK_BYTES = 1 << 20


class Log:
    """What a rule does: doing is the request that is under way, or was the last."""

    # Of a loop over thousands of requests the first say enough.
    _MOST = 60

    def __init__(self) -> None:
        self.doing = ""
        self.did: list[str] = []

    def begin(self, text: str) -> None:
        """Say what is asked for now."""
        self.doing = text

    def done(self, text: str) -> None:
        """Say what was done."""
        if len(self.did) < self._MOST:
            self.did.append(text)


class Tally(NamedTuple):
    """What was read: bytes, their XXH3-64, and the errno that ended it (0: a read of 0 bytes)."""

    size_bytes: int
    digest: int
    error: int


class Session:
    """A data_fd in the hands of a rule: OSErrors mean what the device means. Owns the channel."""

    def __init__(self, channel: DataChannel, log: Log, check: Callable[[], None]) -> None:
        """check: called between reads and writes; raises CancelledError."""
        self._channel, self._log, self._check = channel, log, check
        self.written_bytes = 0
        # A read gave 0 in STOP_COPY, or the rest does not matter any more.
        self.at_end = False

    def fileno(self) -> int:
        """Return the data_fd, still owned here."""
        return self._channel.fileno()

    def read(self, most_bytes: int = CHUNK_BYTES) -> bytes:
        """Read once. b"" is the end, or nothing now. Raises OSError."""
        self._check()
        self._log.begin(f"a read of {most_bytes} bytes")
        data = os.read(self._channel.fileno(), most_bytes)
        if not data and (failure := self._channel.failure()) is not None:
            raise failure
        return data

    def read_all(
        self, limit_bytes: int, *, sizes: Iterator[int] | None = None, copy_fd: int = -1
    ) -> Tally:
        """Read until nothing comes. sizes: of the reads. copy_fd: where to write what comes.

        Raises OSError: EFBIG when it is more than limit_bytes; but ENOMSG is in the tally.
        """
        digest, size_bytes, error = Digest(), 0, 0
        try:
            while data := self.read(next(sizes) if sizes is not None else CHUNK_BYTES):
                digest.update(data)
                size_bytes += len(data)
                if size_bytes > limit_bytes:
                    raise OSError(errno.EFBIG, f"more than {limit_bytes} bytes, and no end")
                if copy_fd != -1:
                    write_whole(copy_fd, data)
        except OSError as err:
            if err.errno != errno.ENOMSG:
                raise
            error = err.errno
        self._log.done(f"read {size_bytes} bytes until nothing came")
        return Tally(size_bytes, digest.value, error)

    def read_error(self) -> int | None:
        """Return the errno of a read of one byte; 0 for nothing to read, None when a byte came."""
        self._log.begin("a read of 1 byte")
        failure = self._channel.failure()
        if failure is not None:
            return failure.errno
        try:
            return None if os.read(self._channel.fileno(), 1) else 0
        except OSError as err:
            return err.errno
        finally:
            self._log.done("read 1 byte")

    def write_error(self, data: bytes = b"\0") -> int:
        """Return the errno of a write, 0 when it was taken."""
        try:
            self.settle()  # a simulated data_fd is a file, which takes bytes when it is dead too
            self.write(data)
            self.settle()
        except OSError as err:
            return err.errno or errno.EIO
        return 0

    def write(self, data: bytes) -> int:
        """Write once; it may be short. Raises OSError."""
        self._check()
        self._log.begin(f"a write of {len(data)} bytes at byte {self.written_bytes}")
        try:
            written = os.write(self._channel.fileno(), data)
        except BrokenPipeError as err:  # a simulated data_fd refuses so
            raise self._channel.failure() or err from err
        self.written_bytes += written
        return written

    def wrote_all(self) -> None:
        """Say that the device has taken what was meant for it."""
        self._log.done(f"wrote {self.written_bytes} bytes")

    def settle(self) -> None:
        """Take in all that was written. Raises OSError: it was refused (simulated devices)."""
        if (failure := self._channel.failure()) is not None:
            raise failure

    def precopy_info(self) -> PrecopyInfo:
        """Ask VFIO_MIG_GET_PRECOPY_INFO. Raises OSError."""
        self._log.begin("VFIO_MIG_GET_PRECOPY_INFO")
        info = self._channel.precopy_info()
        self._log.done("VFIO_MIG_GET_PRECOPY_INFO")
        return info

    def info_error(self) -> int:
        """Return the errno of VFIO_MIG_GET_PRECOPY_INFO, 0 when it answers."""
        try:
            self.precopy_info()
        except OSError as err:
            return err.errno or errno.EIO
        return 0

    def close(self) -> None:
        """Close the data_fd."""
        self._channel.close()


class KeptState:
    """A state in a file without a name. Owns the file."""

    def __init__(self) -> None:
        """Raises OSError."""
        from tempfile import TemporaryFile

        self._file = TemporaryFile(  # noqa: SIM115  closed by close()
            buffering=0, prefix="vfiomig-conform-"
        )
        self.size_bytes = self.digest = 0

    def fill(self, session: Session, limit_bytes: int) -> None:
        """Read a session to its end. Raises OSError."""
        tally = session.read_all(limit_bytes, copy_fd=self._file.fileno())
        if tally.error:
            raise OSError(tally.error, os.strerror(tally.error))
        self.append(tally.size_bytes, tally.digest)

    def append(self, size_bytes: int, digest: int) -> None:
        """Say what was written to fileno()."""
        self.size_bytes, self.digest = self.size_bytes + size_bytes, digest

    def fileno(self) -> int:
        """Return the file's descriptor, still owned here."""
        return self._file.fileno()

    def pieces(
        self, *, start: int = 0, end: int | None = None, sizes: Iterator[int] | None = None
    ) -> Iterator[bytes]:
        """Yield it from start to end, in pieces of sizes."""
        at, stop = start, self.size_bytes if end is None else end
        while at < stop:
            most = next(sizes) if sizes is not None else CHUNK_BYTES
            piece = os.pread(self._file.fileno(), min(most, stop - at), at)
            if not piece:
                raise OSError(errno.EIO, "the kept state is shorter than it was")
            yield piece
            at += len(piece)

    def close(self) -> None:
        """Close the file, which is gone then."""
        self._file.close()


def odd_sizes() -> Iterator[int]:
    """Yield sizes of reads and writes: single bytes, then no multiple of anything, then large."""
    yield from itertools.repeat(1, 80)
    yield from itertools.repeat(4093, 64)
    yield from itertools.repeat(1 << 20)


def write_whole(fd: int, data: bytes) -> None:
    """Write all of data. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def send(session: Session, pieces: Iterator[bytes]) -> None:
    """Write pieces, each to its last byte, however short the writes are. Raises OSError."""
    for piece in pieces:
        while piece:
            written = session.write(piece)
            if not written:
                raise OSError(errno.EIO, "a write took 0 bytes")
            piece = piece[written:]
    session.settle()
    session.wrote_all()
