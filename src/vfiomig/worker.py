"""Work that signals cannot tear: it runs in a thread of its own that blocks them, and is cancelled.

A signal that interrupts a read of a data_fd loses bytes on some drivers, and one that interrupts
a state change kills the session (xe, mlx5: drivers/vfio/pci). So the caller takes the signals.
"""

import os
import select
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from vfiomig._fastcopy import start_and_wait
from vfiomig.errors import CancelledError, ResourceLimitError
from vfiomig.fd import OwnedFd

T = TypeVar("T")


class Cancellation:
    """A wish to stop, from any thread: cancel() is seen between two chunks, or while one waits.

    Owns an eventfd, readable once cancelled. Serves one piece of work.
    """

    def __init__(self) -> None:
        self._fd, self._was_cancelled = _eventfd(), False

    def cancel(self) -> None:
        """Ask the work to stop and roll back. Does not wait; may be called more than once."""
        self._was_cancelled = True
        if self._fd.fileno() != -1:
            os.eventfd_write(self._fd.fileno(), 1)

    @property
    def cancelled(self) -> bool:
        """Whether cancel() was called."""
        if self._fd.fileno() == -1:
            return self._was_cancelled
        look = select.poll()
        look.register(self._fd.fileno(), select.POLLIN)
        return bool(look.poll(0))

    def check(self) -> None:
        """Raise CancelledError once cancelled."""
        if self.cancelled:
            raise CancelledError("cancelled")

    def fileno(self) -> int:
        """Return the eventfd, which stays the cancellation's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Close the eventfd."""
        self._was_cancelled = self.cancelled  # start_and_wait() writes to the eventfd only
        self._fd.close()


def run_shielded(job: Callable[[], T], cancellation: Cancellation) -> T:
    """Run job in a thread that blocks all signals; return what it returns, raise what it raises.

    An exception in the calling thread while it waits (KeyboardInterrupt, or what a signal handler
    raises) cancels the job, waits until it has rolled back, and goes on from here; further ones
    meanwhile are dropped.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    abandoned: list[bool] = []
    gate = threading.Lock()

    with _eventfd() as done:

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            with gate:
                pass  # open once the caller waits, or has given up before the job began
            if abandoned:
                return
            try:
                outcome.append(job())
            except BaseException as err:  # noqa: BLE001  handed to the caller, who raises it
                failure.append(err)
            finally:
                os.eventfd_write(done.fileno(), 1)

        thread = threading.Thread(target=work, name="vfiomig")
        gate.acquire()
        try:
            interrupted = start_and_wait(
                thread, gate, abandoned, done.fileno(), cancellation.fileno()
            )
        finally:
            if thread.ident is not None:
                thread.join()
    if interrupted is not None and not outcome:
        raise interrupted from (failure[0] if failure else None)
    if failure:
        raise failure[0]
    if interrupted is not None:
        raise interrupted
    return outcome[0]


def _eventfd() -> OwnedFd:
    try:
        return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError as err:
        raise ResourceLimitError(f"no eventfd: {err.strerror}", errno=err.errno) from err
