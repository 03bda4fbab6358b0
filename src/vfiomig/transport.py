"""Where a stream goes to and comes from: files that are whole or not there, pipes, sockets."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from vfiomig.errors import LocalIOError, MigrationError, PeerError, ResourceLimitError
from vfiomig.fd import OwnedFd

# F_SETPIPE_SZ: the default of 64 KiB costs a third of the throughput (measured: 0.90 against 0.51
# CPU seconds per GB, Zen 4, 22 Nov 2026).
_PIPE_BYTES = 1 << 20
# SO_SNDBUF: 1.71 instead of 1.16 times QEMU's loop by wall (the same measurement).
UNIX_BYTES = 4 << 20


class HasFileno(Protocol):
    """A socket or an open file: it stays the caller's."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


Target = str | os.PathLike[str] | int | HasFileno


class Stream(Protocol):
    """One end of a stream. name: for messages. is_file: seekable, so payloads are aligned.

    is_new_file: nothing was in it before. is_direct: it is written past the page cache (O_DIRECT).
    """

    name: str
    is_file: bool
    is_new_file: bool
    is_direct: bool

    def fileno(self) -> int:
        """Return the descriptor, which stays the stream's."""
        ...

    def failed(self, err: OSError) -> MigrationError:
        """Return the error that an OSError on this descriptor means."""
        ...

    def commit(self) -> None:
        """Make what was written whole: name it and sync it. Raises LocalIOError."""
        ...

    def close(self) -> None:
        """Close what is owned; what was not committed is removed."""
        ...


class FileSink:
    """A file that bears its name only when it is whole.

    Written as .NAME.partial-XXXX in the same directory, 0600; commit() syncs it, names it without
    replacing what is there (unless force), and syncs the directory.
    """

    is_file = is_new_file = True

    def __init__(self, path: Path, *, force: bool, direct: bool) -> None:
        self.name, self._path, self._force = str(path), path, force
        self._partial: str | None = None
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._directory = OwnedFd(os.open(path.parent, flags))
        try:
            self._refuse_open_directory()
            self._fd = self._create()
            self.is_direct = direct and _write_directly(self._fd.fileno())
        except BaseException:
            self._directory.close()
            raise

    def _refuse_open_directory(self) -> None:
        mode = os.fstat(self._directory.fileno()).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise LocalIOError(
                f"cannot write {self.name}: anybody may replace files in its directory",
                errno=errno.EPERM,
                hint="choose another directory, or take the right to write from others (chmod o-w)",
            )

    def _create(self) -> OwnedFd:
        # A name has at most 255 bytes (NAME_MAX), and not as many characters.
        start = os.fsdecode(os.fsencode(self._path.name)[:200])
        partial = f".{start}.partial-{os.urandom(4).hex()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = OwnedFd(os.open(partial, flags, 0o600, dir_fd=self._directory.fileno()))
        self._partial = partial
        os.fchmod(fd.fileno(), 0o600)
        return fd

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._fd.fileno()

    def failed(self, err: OSError) -> MigrationError:
        """Return the error for a write that failed; the partial file goes when it is closed."""
        return _local(f"cannot write {self.name}", err)

    def commit(self) -> None:
        """Sync, name and sync again: after this the file survives a crash. Raises LocalIOError."""
        directory_fd, fd = self._directory.fileno(), self._fd.fileno()
        try:
            if self.is_direct:  # made longer ahead of the writes
                os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
            os.fsync(fd)
            self._give_name(directory_fd)
        except OSError as err:
            raise _local(f"cannot finish {self.name}", err) from err
        try:
            with OwnedFd(os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory_fd)) as parent:
                os.fsync(parent.fileno())
        except OSError as err:
            what = f"{self.name} is whole, but its directory cannot be synced"
            raise _local(what, err) from err

    def _give_name(self, directory_fd: int) -> None:
        partial, name = str(self._partial), self._path.name
        at = {"src_dir_fd": directory_fd, "dst_dir_fd": directory_fd}
        if self._force:
            os.replace(partial, name, **at)
        else:
            # link(2) never replaces: of two writers one wins, and a file that came meanwhile stays.
            os.link(partial, name, **at, follow_symlinks=False)
            os.unlink(partial, dir_fd=directory_fd)
        self._partial = None

    def close(self) -> None:
        """Close the file; remove it unless it was committed."""
        if self._partial is not None:
            partial, self._partial = self._partial, None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=self._directory.fileno())
        self._fd.close()
        self._directory.close()


class FdStream:
    """A descriptor that belongs to the caller: a pipe, a socket, a terminal's neighbour.

    Of a pipe to write to, a non-blocking description of its own is used where /proc gives one, so
    that a reader who stalls cannot make the work deaf to cancel().
    """

    is_new_file = is_direct = False

    def __init__(self, fd: int, name: str, *, writing: bool) -> None:
        mode = os.fstat(fd).st_mode
        self.name, self.is_file = name, stat.S_ISREG(mode)
        self._is_socket = stat.S_ISSOCK(mode)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if access == (os.O_RDONLY if writing else os.O_WRONLY):
            # Opened again through /proc, even the read end of a pipe could be written to.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._fd, self._own = fd, OwnedFd(-1)
        if self._is_socket and writing:
            _widen(fd)
        if stat.S_ISFIFO(mode) and writing:
            with contextlib.suppress(OSError):  # not root, another user's pipe: blocking serves
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                self._own = OwnedFd(os.open(f"/proc/self/fd/{fd}", flags))

    def fileno(self) -> int:
        """Return the descriptor to use."""
        own = self._own.fileno()
        return self._fd if own == -1 else own

    def failed(self, err: OSError) -> MigrationError:
        """Return PeerError for a socket, LocalIOError else."""
        if self._is_socket:
            return PeerError(f"{self.name}: {err.strerror or err}", errno=err.errno)
        if err.errno == errno.EPIPE:
            return LocalIOError(f"{self.name}: its reader has closed it", errno=err.errno)
        return _local(f"cannot use {self.name}", err)

    def commit(self) -> None:
        """Do nothing: what was written is with the reader."""

    def close(self) -> None:
        """Close what is ours; the caller's descriptor stays open."""
        self._own.close()


class OwnedStream(FdStream):
    """A file, fifo or device node that was opened here, and is closed here."""

    def __init__(self, fd: int, name: str, *, writing: bool) -> None:
        self._opened = OwnedFd(fd)
        super().__init__(fd, name, writing=writing)

    def close(self) -> None:
        """Close the descriptor."""
        super().close()
        self._opened.close()


@contextlib.contextmanager
def open_sink(target: Target, *, force: bool = False, direct: bool = False) -> Iterator[Stream]:
    """Open where a stream is written: a path (whole or not there), or a descriptor (borrowed).

    A path that names a fifo or a device node is written to as it is. direct: write a new file past
    the page cache, where the file system can. Raises LocalIOError.
    """
    if isinstance(target, str | os.PathLike):
        stream = _open_path_sink(Path(target), force=force, direct=direct)
    else:
        fd = target if isinstance(target, int) else target.fileno()
        stream = _described(fd, writing=True)
    with contextlib.closing(stream):
        yield stream


@contextlib.contextmanager
def open_source(target: Target) -> Iterator[Stream]:
    """Open where a stream is read: a path, or a descriptor, which is borrowed.

    Opening a fifo blocks until it has a writer. Raises LocalIOError.
    """
    stream: Stream
    if isinstance(target, str | os.PathLike):
        try:
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise _local(f"cannot open {os.fspath(target)}", err) from err
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise _local(f"cannot read {os.fspath(target)}", OSError(errno.EISDIR, ""))
        stream = OwnedStream(fd, os.fspath(target), writing=False)
    else:
        fd = target if isinstance(target, int) else target.fileno()
        stream = _described(fd, writing=False)
    with contextlib.closing(stream):
        yield stream


def _described(fd: int, *, writing: bool) -> Stream:
    names = {0: "standard input", 1: "standard output"}
    try:
        return FdStream(fd, names.get(fd, f"descriptor {fd}"), writing=writing)
    except OSError as err:
        raise _local(f"descriptor {fd}", err) from err


def _open_path_sink(path: Path, *, force: bool, direct: bool) -> Stream:
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            return OwnedStream(fd, str(path), writing=True)
        if stat.S_ISDIR(mode):
            raise _local(f"cannot write {path}", OSError(errno.EISDIR, ""))
        if not force:
            raise LocalIOError(
                f"{path} exists",
                errno=errno.EEXIST,
                hint="choose another name, or replace it with --force",
            )
    except FileNotFoundError:
        pass  # the ordinary case: nothing bears the name yet
    except OSError as err:
        raise _local(f"cannot write {path}", err) from err
    try:
        return FileSink(path, force=force, direct=direct)
    except OSError as err:
        raise _local(f"cannot write {path}", err) from err


def _write_directly(fd: int) -> bool:
    """Set O_DIRECT. Returns False where the file system refuses (tmpfs before Linux 6.6)."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def _widen(fd: int) -> None:
    """Let a UNIX socket hold 4 MiB, or what net.core.wmem_max allows. TCP does better by itself."""
    import socket

    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.family == socket.AF_UNIX and not sock.type & socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BYTES)


def _local(what: str, err: OSError) -> LocalIOError | ResourceLimitError:
    reason = os.strerror(err.errno) if err.errno else str(err)
    if err.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceLimitError(f"{what}: {reason}", errno=err.errno)
    return LocalIOError(f"{what}: {reason}", errno=err.errno)
