"""Work that signals cannot tear: it runs in a thread of its own that blocks them, and is cancelled.

A signal that interrupts a read of a data_fd loses bytes on some drivers, and one that interrupts
a state change kills the session (xe, mlx5: drivers/vfio/pci). So the caller takes the signals.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from vfiomig.errors import CancelledError, ResourceLimitError
from vfiomig.fd import OwnedFd

T = TypeVar("T")


class Cancellation:
    """A wish to stop, from any thread: cancel() is seen between two chunks, or while one waits.

    Owns an eventfd, readable once cancelled. Serves one piece of work.
    """

    def __init__(self) -> None:
        try:
            self._fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError as err:
            raise ResourceLimitError(f"no eventfd: {err.strerror}", errno=err.errno) from err
        self._cancelled = False

    def cancel(self) -> None:
        """Ask the work to stop and roll back. Does not wait; may be called more than once."""
        self._cancelled = True
        if self._fd.fileno() != -1:
            os.eventfd_write(self._fd.fileno(), 1)

    @property
    def cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._cancelled

    def check(self) -> None:
        """Raise CancelledError once cancelled."""
        if self._cancelled:
            raise CancelledError("cancelled")

    def fileno(self) -> int:
        """Return the eventfd, which stays the cancellation's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Close the eventfd."""
        self._fd.close()


def run_shielded(job: Callable[[], T], cancellation: Cancellation) -> T:
    """Run job in a thread that blocks all signals; return what it returns, raise what it raises.

    An exception in the calling thread while it waits (KeyboardInterrupt, or what a signal handler
    raises) cancels the job, waits until it has rolled back, and goes on from here: as long as the
    roll-back takes, further ones are only noted.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            outcome.append(job())
        except BaseException as err:  # noqa: BLE001  handed to the caller, who raises it
            failure.append(err)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="vfiomig")
    # The thread inherits the mask; and a handler's exception cannot part start() from the wait.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    interrupted = _wait(thread, done, mask, cancellation)
    if interrupted is not None and not outcome:
        raise interrupted from (failure[0] if failure else None)
    if failure:
        raise failure[0]
    if interrupted is not None:
        raise interrupted
    return outcome[0]


def _wait(
    thread: threading.Thread,
    done: threading.Event,
    mask: set[int | signal.Signals],
    cancellation: Cancellation,
) -> BaseException | None:
    """Wait for the job with mask as it was; once interrupted, with all signals blocked."""
    first: BaseException | None = None
    while True:
        try:
            if first is None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # Not join() alone: interrupted once, Python 3.11's takes a running thread for ended.
            done.wait()
            thread.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException as err:  # noqa: BLE001  raised again once the roll-back is done
            # Before all else: one more signal here would tear us from the roll-back.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            if first is None:
                first = err
                cancellation.cancel()
        else:
            return first
