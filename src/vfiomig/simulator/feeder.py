"""A save session through a pipe: a thread feeds it, so that it can be slow, late, cut or broken.

A pipe has only one way to say "nothing": read() gives 0 when nobody has the write end open. Opened
again through /proc, the same descriptor goes on reading. failure() says which nothing it was.
"""

import errno
import fcntl
import os
import select
import struct
import termios
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from vfiomig.channel import PrecopyInfo
from vfiomig.fd import OwnedFd
from vfiomig.simulator.faults import Fault
from vfiomig.simulator.session import Pacer, Session, meet_faults, os_error
from vfiomig.simulator.storage import reopened
from vfiomig.simulator.updates import Segment
from vfiomig.threads import start_thread

PIPE_BYTES = 1 << 20
_PAGE_BYTES = 4096


class PipedSave(Session):
    """Feeds segments of files to the pipe whose read end is the data_fd.

    The device's thread appends segments, the caller reads, our thread feeds; _change guards what
    they share. Files are spliced: what the device changes before it is read is read changed, and
    appended again.
    """

    def __init__(
        self,
        device: str,
        pacer: Pacer,
        chunk_bytes: int,
        faults: Sequence[Fault],
        ask: Callable[[], PrecopyInfo],
        reset: Callable[[], None],
    ) -> None:
        """Begin with nothing: append() before the caller reads. reset: the device was reset."""
        data, self._write, self._wake = open_pipe(chunk_bytes)
        super().__init__(device, data)
        os.set_blocking(self._write.fileno(), False)
        self._pacer, self._most = pacer, chunk_bytes or PIPE_BYTES
        self._faults, self._ask, self._reset = deque(faults), ask, reset
        self._change = threading.Condition()
        self._segments: deque[Segment] = deque()
        self._is_last = self._is_over = self._is_failure_told = False
        self._drained_errno = 0
        self._failure: OSError | None = None
        self._appended_bytes = self._fed_bytes = 0
        self._thread: threading.Thread | None = None

    def append(self, segments: Sequence[Segment], drained_errno: int | None) -> None:
        """Let these be read next. drained_errno: what a read then says; None for the end.

        The files stay the device's, until end(). Returns when a read cannot miss them any more.
        Raises OSError: the session is dead.
        """
        with self._change:
            if self._is_over:
                return
            self._open_again()
            self._segments.extend(segment for segment in segments if segment.length)
            self._appended_bytes += sum(segment.length for segment in segments)
            self._is_last = drained_errno is None
            self._drained_errno = drained_errno or 0
            self._change.notify()
            if self._thread is None:
                self._thread = start_thread(self._feed, f"{self._device} feeder")

    def _open_again(self) -> None:
        if self._write.fileno() != -1:
            return
        try:
            self._write = OwnedFd(reopened(self.fileno(), os.O_WRONLY | os.O_NONBLOCK))
        except OSError as err:  # no descriptor is left; what should have been read is lost
            self._failure, self._is_over = err, True
            raise
        self._failure = None

    def precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO: ENODEV once the session is dead, else what the device says."""
        # Fed ahead of the reader: a fault that no read has met yet has not happened to it.
        if self._ended or (self._is_over and self._is_failure_told):
            raise os_error(errno.ENODEV)
        return self._ask()

    def failure(self) -> OSError | None:
        """Return what the end of the pipe stands for: ENOMSG, a fault, ENODEV; None for the end."""
        with self._change:
            self._is_failure_told |= self._is_over and self._failure is not None
            return super().failure() or self._failure

    def unread_bytes(self) -> int:
        """Return how much of what was appended has not been read."""
        with self._change:
            waiting = self._appended_bytes - self._fed_bytes
            return waiting + (queued_bytes(fd) if (fd := self._data.fileno()) != -1 else 0)

    def read_bytes(self) -> int:
        """Return how much has been read."""
        return self._appended_bytes - self.unread_bytes()

    def end(self) -> None:
        """End the session: what is in the pipe is lost, and a reader that waits gets 0."""
        super().end()
        self._stop()
        if (fd := self._data.fileno()) != -1:
            # Nobody has the write end open any more: a read does not wait.
            while lost := os.read(fd, PIPE_BYTES):
                self._fed_bytes -= len(lost)  # it was not read

    def close(self) -> None:
        """Stop the thread and close the data_fd."""
        self._stop()
        if (fd := self._data.fileno()) != -1:
            self._fed_bytes -= queued_bytes(fd)  # it was not read
        super().close()

    def _stop(self) -> None:
        with self._change:
            self._is_over = True
            self._change.notify()
        self._pacer.hurry()
        if self._wake.fileno() != -1:
            os.eventfd_write(self._wake.fileno(), 1)
        if self._thread is not None:
            self._thread.join()
        self._write.close()
        self._wake.close()

    def _feed(self) -> None:
        try:
            while self._await_work():
                if self._meet_faults():
                    self._push()
        finally:
            with self._change:
                self._is_over |= not self._is_last
                self._write.close()

    def _await_work(self) -> bool:
        with self._change:
            while not self._is_over:
                if self._segments or (self._is_last and self._is_fault_due()):
                    return True
                if self._is_last:
                    return False
                self._failure = os_error(self._drained_errno) if self._drained_errno else None
                self._write.close()
                self._change.wait()
            return False

    def _is_fault_due(self) -> bool:
        return bool(self._faults) and self._faults[0].byte <= self._fed_bytes

    def _meet_faults(self) -> bool:
        """Suffer what is due at this byte. Returns whether there is something to feed."""
        number = meet_faults(self._faults, self._fed_bytes, self._pacer, self._reset)
        if number:
            self._fail(number)
        return not number and bool(self._segments)

    def _fail(self, number: int) -> None:
        with self._change:
            self._failure, self._is_over = os_error(number), True

    def _push(self) -> None:
        segment = self._segments[0]
        length = min(segment.length, self._most, self._pacer.allowance())
        if self._faults:
            length = min(length, self._faults[0].byte - self._fed_bytes)
        self._pacer.wait(length)
        while length and self._wait_for_room():
            length -= self._splice(segment, length)

    def _wait_for_room(self) -> bool:
        poll = select.poll()
        poll.register(self._write.fileno(), select.POLLOUT)
        poll.register(self._wake.fileno(), select.POLLIN)
        poll.poll()
        return not self._is_over

    def _splice(self, segment: Segment, length: int) -> int:
        with self._change:
            try:
                moved = os.splice(
                    segment.fd,
                    self._write.fileno(),
                    length,
                    offset_src=segment.offset,
                    flags=os.SPLICE_F_NONBLOCK,
                )
            except BlockingIOError:
                return 0
            except OSError as err:  # EPIPE: the caller closed the descriptor behind our back
                self._failure, self._is_over = err, True
                return 0
            if not moved:  # the file was cut by somebody else
                self._failure, self._is_over = os_error(errno.EIO), True
            segment.offset += moved
            segment.length -= moved
            self._fed_bytes += moved
            if not segment.length:
                self._segments.popleft()
            return moved


def open_pipe(chunk_bytes: int) -> tuple[OwnedFd, OwnedFd, OwnedFd]:
    """Return the ends of a new pipe, read first, and an eventfd. Raises OSError, all closed."""
    with ExitStack() as stack:
        wake = stack.enter_context(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)))
        read_end, write_end = (stack.enter_context(OwnedFd(fd)) for fd in os.pipe2(os.O_CLOEXEC))
        _set_capacity(read_end.fileno(), chunk_bytes)
        stack.pop_all()
    return read_end, write_end, wake


def _set_capacity(pipe_fd: int, chunk_bytes: int) -> None:
    """Let a pipe hold no more than a chunk: then no read gives more.

    A spliced page takes a slot of the pipe of its own, so one slot is one chunk below a page.
    """
    capacity = PIPE_BYTES
    while chunk_bytes and capacity > max(chunk_bytes, _PAGE_BYTES):
        capacity //= 2
    with suppress(PermissionError):  # over the user's limit: then it keeps the default 64 KiB
        fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, capacity)


def queued_bytes(pipe_fd: int) -> int:
    """Return how many bytes are in a pipe."""
    queued: int = struct.unpack("i", fcntl.ioctl(pipe_fd, termios.FIONREAD, bytes(4)))[0]
    return queued
