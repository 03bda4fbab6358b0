"""A load session through a pipe: a thread drains it into the staging, slowly or until a fault.

The pipe takes up to a mebibyte before the device has seen it, and can refuse only by being closed
(EPIPE). failure() therefore waits until all that was written has been seen, and says what it was.
"""

import errno
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence

from vfiomig.fd import OwnedFd
from vfiomig.simulator.faults import Fault
from vfiomig.simulator.feeder import PIPE_BYTES, open_pipe, queued_bytes
from vfiomig.simulator.profiles import Profile
from vfiomig.simulator.session import Pacer, Session, meet_faults, os_error
from vfiomig.threads import start_thread


class PipedLoad(Session):
    """Drains the pipe whose write end is the data_fd. _change guards what the threads share."""

    def __init__(
        self,
        device: str,
        staging: OwnedFd,
        pacer: Pacer,
        faults: Sequence[Fault],
        profile: Profile,
        most_bytes: int,
        reset: Callable[[], None],
    ) -> None:
        """Take over staging. most_bytes: the size at which the profile says too long."""
        self._read, data, self._wake = open_pipe(0)
        super().__init__(device, data)
        os.set_blocking(self._read.fileno(), False)
        self._staging, self._pacer, self._profile = staging, pacer, profile
        self._most_bytes = most_bytes if profile.too_long_errno else None
        self._faults, self._reset = deque(faults), reset
        self._change = threading.Condition()
        self._taken_bytes = 0
        self._asked = self._answered = 0
        self._is_over = self._is_done = self._is_told = False
        self._header_errno = 0
        self._failure: OSError | None = None
        self._thread = start_thread(self._drain, f"{device} drain")

    def failure(self) -> OSError | None:
        """Return why the device refused what was written, once it has seen it all; or ENODEV."""
        self._wait_until_seen()
        with self._change:
            self._is_told |= self._failure is not None
            return super().failure() or self._failure

    def settle(self) -> OSError | None:
        """Take in all that was written. Returns the error nobody has been told, once."""
        self._wait_until_seen()
        with self._change:
            untold = None if self._is_told else self._failure
            self._is_told |= untold is not None
            return untold

    def end(self) -> None:
        """End the session: a writer gets EPIPE."""
        super().end()
        self._stop()

    def close(self) -> None:
        """Close the data_fd; what was written counts."""
        self._pacer.hurry()
        super().close()
        self._wait_until_seen()
        self._stop()

    def _stop(self) -> None:
        self._is_over = True
        self._pacer.hurry()
        if self._wake.fileno() != -1:
            os.eventfd_write(self._wake.fileno(), 1)
        self._thread.join()
        self._wake.close()

    def _wait_until_seen(self) -> None:
        with self._change:
            self._asked += 1
            ticket = self._asked
            if not self._is_done:
                os.eventfd_write(self._wake.fileno(), 1)
            self._change.wait_for(lambda: self._is_done or self._answered >= ticket)

    def _drain(self) -> None:
        try:
            while not self._is_over:
                # Before the look at the pipe: what was written before the question is then seen.
                asked = self._asked
                if not self._take():
                    self._answer(asked)
                    self._wait_for_more()
        finally:
            with self._change:
                self._is_done = True
                self._read.close()
                self._staging.close()
                self._change.notify_all()

    def _take(self) -> bool:
        """Move something to the staging, or fail. Returns False when there is nothing to move."""
        if not queued_bytes(self._read.fileno()):
            if self._header_errno:
                self._fail(self._header_errno)
            return False
        if self._taken_bytes == self._most_bytes:
            self._fail(self._profile.too_long_errno)
        elif self._meet_faults():
            self._splice(self._allowance())
        return True

    def _allowance(self) -> int:
        ends = [self._most_bytes] if self._most_bytes is not None else []
        if self._faults:
            ends.append(self._faults[0].byte)
        return min(self._pacer.allowance(), *(end - self._taken_bytes for end in ends), PIPE_BYTES)

    def _splice(self, length: int) -> None:
        try:
            moved = os.splice(
                self._read.fileno(), self._staging.fileno(), length, offset_dst=self._taken_bytes
            )
        except OSError as err:  # the disk is full, for one
            self._fail(err.errno or errno.EIO)
            return
        before, self._taken_bytes = self._taken_bytes, self._taken_bytes + moved
        header = self._profile.header
        if before < len(header) <= self._taken_bytes:
            # Nobody is told before the rest is in: the bytes of a refused header stay, and count.
            is_ours = os.pread(self._staging.fileno(), len(header), 0) == header
            self._header_errno = 0 if is_ours else self._profile.header_errno
        self._pacer.wait(moved)

    def _meet_faults(self) -> bool:
        """Suffer what is due at this byte. Returns whether the session goes on."""
        number = meet_faults(self._faults, self._taken_bytes, self._pacer, self._reset)
        if number:
            self._fail(number)
        return not number

    def _fail(self, number: int) -> None:
        with self._change:
            self._failure, self._is_over = os_error(number), True

    def _answer(self, asked: int) -> None:
        with self._change:
            self._answered = asked
            self._change.notify_all()

    def _wait_for_more(self) -> None:
        poll = select.poll()
        poll.register(self._read.fileno(), select.POLLIN)
        poll.register(self._wake.fileno(), select.POLLIN)
        events = dict(poll.poll())
        if self._wake.fileno() in events:
            os.eventfd_read(self._wake.fileno())
        # Hung up and nothing to read: nobody can write any more.
        if events.get(self._read.fileno()) == select.POLLHUP:
            self._is_over = True
