"""The journals of this host: what a side has done that the other must be able to rely on.

DIR/SESSION.ROLE.journal, 0600, as record.py describes it. All the room is taken at the beginning:
a full disk is found before a device is stopped. Whoever works on a session holds a lock on its
journal, so that nobody decides what becomes of devices that a process still moves.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from vfiomig._version import __version__
from vfiomig.errors import (
    DeviceBusyError,
    LocalIOError,
    MigrationError,
    NoSuchDeviceError,
    ResourceLimitError,
    StreamMismatchError,
)
from vfiomig.fd import OwnedFd
from vfiomig.live import record
from vfiomig.live.record import Record
from vfiomig.live.verdict import Role

__all__ = ["Journal", "Record", "Role", "journal_directory", "read_journal", "sessions"]

# A reader holds the lock for as long as one read of a small file takes.
_ATTEMPTS, _PAUSE_S = 5, 0.002


def journal_directory() -> Path:
    """Return where journals are: $VFIOMIG_JOURNAL, else of root /var/lib/vfiomig, else one's own.

    One's own is $XDG_STATE_HOME/vfiomig or ~/.local/state/vfiomig.
    """
    if given := os.environ.get("VFIOMIG_JOURNAL"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/vfiomig")
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "vfiomig"


class Journal:
    """Owns the open and locked journal of a side. Not for several threads at once."""

    def __init__(self, fd: OwnedFd, found: Record) -> None:
        self.path, self.session = found.path, found.session
        self._fd, self._is_damaged = fd, found.is_damaged
        self._end_bytes, self._chain = found.end_bytes, found.chain
        self._size_bytes = os.fstat(fd.fileno()).st_size
        self._torn_bytes = 0

    @classmethod
    def create(cls, directory: Path, session: str, role: Role, facts: Mapping[str, object]) -> Self:
        """Begin a journal. It is whole, locked and on the disk when it gets its name.

        session: 32 hex digits. facts: kept with "begun"; "devices" is the list of their names. The
        directory is made, 0700, where there is none. Raises StreamMismatchError when that session
        has been here before, LocalIOError, ResourceLimitError.
        """
        path = directory / record.file_name(session, role)
        begun = {**facts, "session": session, "role": role, "pid": os.getpid()}
        line, _, size_bytes = record.first_line({**begun, "tool": f"vfiomig {__version__}"})
        data = line.ljust(size_bytes)
        try:
            with _directory(directory) as where_fd:
                return cls(_create(where_fd, path, data), record.parse(data, path, is_live=True))
        except OSError as err:
            raise _failed(f"cannot write the journal {path}", err) from err

    @classmethod
    def reopen(cls, path: Path) -> tuple[Self, Record]:
        """Take up the journal of a process that has ended, and read it. The caller closes it.

        Raises DeviceBusyError when somebody is at work on the session, NoSuchDeviceError when there
        is none, LocalIOError.
        """
        with _open(path, os.O_RDWR) as file:
            if not _lock(file.fileno()):
                raise busy(_read(path, file.fileno(), is_live=True))
            found = _read(path, file.fileno(), is_live=False)
            return cls(OwnedFd(file.detach()), found), found

    def record(self, event: str, **facts: object) -> None:
        """Add an event: on the disk when this returns. Raises LocalIOError; then it may be, or not.

        What comes next takes the place of one that failed.
        """
        line, chain = record.line_of(event, facts, self._chain)
        end_bytes = self._end_bytes + len(line)
        try:
            if self._is_damaged:
                raise OSError(errno.EUCLEAN, "it is damaged, and kept as it is")
            if end_bytes > self._size_bytes:
                raise OSError(errno.ENOSPC, "it is full")
            data = line.ljust(self._torn_bytes)
            self._torn_bytes = len(data)
            _write(self._fd.fileno(), data, self._end_bytes)
        except OSError as err:
            raise _failed(f"cannot write {event!r} into the journal {self.path}", err) from err
        self._end_bytes, self._chain, self._torn_bytes = end_bytes, chain, 0

    def remove(self) -> None:
        """Remove the file: nobody else has heard of the session. close() it as well."""
        with suppress(OSError):  # then it stays, and says what is true
            self.path.unlink()

    def close(self) -> None:
        """Give up the session. The file stays."""
        self._fd.close()


def read_journal(path: Path) -> Record:
    """Read a journal, or a copy of one. Damage is no error here: it is in the record.

    Raises NoSuchDeviceError when there is none, LocalIOError.
    """
    with _open(path, os.O_RDONLY) as file:
        return _read(path, file.fileno(), is_live=not _try_lock(file.fileno(), fcntl.LOCK_SH))


def sessions(directory: Path) -> list[Record]:
    """Return every journal of a directory, the last one begun first. Raises LocalIOError."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as err:
        raise _failed(f"cannot read {directory}", err) from err
    found = []
    for name in names:
        if record.session_of(name) is not None:
            with suppress(NoSuchDeviceError):  # removed meanwhile
                found.append(read_journal(directory / name))
    return sorted(found, key=lambda one: one.begun_at, reverse=True)


def busy(found: Record) -> DeviceBusyError:
    """Return the error for a session that somebody is at work on."""
    return DeviceBusyError(
        f"session {found.session}: process {found.facts.get('pid', '?')} is still at work on it",
        hint="wait until it has ended, or end it: it then says what became of the devices",
    )


@contextmanager
def _directory(directory: Path) -> Iterator[int]:
    """Make the directory where there is none, and lend a descriptor of it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as where:
        mode = os.fstat(where.fileno()).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise LocalIOError(
                f"anybody may write to the journals' directory {directory}",
                errno=errno.EPERM,
                hint=f"take that right away (chmod o-w {directory}), or choose another: --journal",
            )
        yield where.fileno()


def _create(where_fd: int, path: Path, data: bytes) -> OwnedFd:
    """Write a locked file, and give it its name once it is on the disk."""
    partial = f".{path.name}.{os.urandom(4).hex()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with OwnedFd(os.open(partial, flags, 0o600, dir_fd=where_fd)) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            os.fchmod(file.fileno(), 0o600)
            _write(file.fileno(), data, 0)
            _give_name(where_fd, partial, path)
        finally:
            os.unlink(partial, dir_fd=where_fd)
        os.fsync(where_fd)
        return OwnedFd(file.detach())


def _give_name(where_fd: int, partial: str, path: Path) -> None:
    """Name a file. link() and not rename(): a session that has been here before stays."""
    where = {"src_dir_fd": where_fd, "dst_dir_fd": where_fd}
    try:
        os.link(partial, path.name, **where, follow_symlinks=False)
    except FileExistsError as err:
        raise StreamMismatchError(
            f"this session has been here before: {path} exists",
            hint="a session is used once: begin a new one",
        ) from err


def _write(fd: int, data: bytes, at_bytes: int) -> None:
    if len(data) > record.LARGEST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if os.pwrite(fd, data, at_bytes) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(fd)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[OwnedFd]:
    """Open a journal that is there; close it unless it is handed on."""
    try:
        # O_NONBLOCK: a fifo must not make anybody wait.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with OwnedFd(os.open(path, flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            yield file
    except FileNotFoundError as err:
        raise NoSuchDeviceError(f"there is no journal {path}", errno=err.errno) from err
    except OSError as err:
        raise _failed(f"cannot read the journal {path}", err) from err


def _read(path: Path, fd: int, *, is_live: bool) -> Record:
    return record.parse(os.pread(fd, record.LARGEST_BYTES + 1, 0), path, is_live=is_live)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(fd: int) -> bool:
    for _ in range(_ATTEMPTS):
        if _try_lock(fd, fcntl.LOCK_EX):
            return True
        time.sleep(_PAUSE_S)
    return False


def _failed(what: str, err: OSError) -> MigrationError:
    text = f"{what}: {err.strerror or err}"
    if err.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceLimitError(text, errno=err.errno)
    hint = "--journal DIR, or VFIOMIG_JOURNAL, names a directory that this user may write to"
    return LocalIOError(text, errno=err.errno, hint=hint)
