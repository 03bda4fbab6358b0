"""A data session of a simulated device: the base of all, and the plain ones.

A plain session's data_fd is the file of the state, or of the staging: full speed, and no thread.
Pipes (feeder.py, drain.py) are for what a file cannot say.
"""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from vfiomig.channel import Chunks, PrecopyInfo
from vfiomig.errors import StaleChannelError
from vfiomig.fd import OwnedFd
from vfiomig.simulator.faults import Action, Fault

# How much a stream may catch up after a pause before its bandwidth limits it again.
_BURST_NS = 20_000_000


class Session:
    """A DataChannel, and the device's side of it: end() is a state change or a reset.

    The caller has fileno() to close(), the device the rest.
    """

    chunks: Chunks | None = None

    def __init__(self, device: str, data_fd: OwnedFd) -> None:
        self._device, self._data = device, data_fd
        self._ended = False

    def fileno(self) -> int:
        """Return the data_fd. Raises StaleChannelError once closed."""
        if (fd := self._data.fileno()) == -1:
            raise StaleChannelError(f"{self._device}: this data session has ended")
        return fd

    def precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO: ENOTTY, as of a load."""
        raise os_error(errno.ENOTTY)

    def failure(self) -> OSError | None:
        """Return what the device would have answered: ENODEV once the session has ended."""
        return os_error(errno.ENODEV) if self._ended else None

    def settle(self) -> OSError | None:
        """Take in all that was written. Returns the error nobody has been told, once."""
        return None

    def unread_bytes(self) -> int:
        """Return how much of the state was not read."""
        return 0

    def end(self) -> None:
        """End the session as the device does: no byte moves any more. The data_fd stays open."""
        self._ended = True

    def close(self) -> None:
        """Close the data_fd."""
        self._data.close()


class PlainLoad(Session):
    """The data_fd is a write-only descriptor of the staging."""


class PlainSave(Session):
    """The data_fd is a read-only descriptor of the state.

    After end() it still reads, as a file does; only failure() tells. A reset empties the file.
    """

    def __init__(
        self, device: str, data_fd: OwnedFd, size_bytes: int, ask: Callable[[], PrecopyInfo]
    ) -> None:
        super().__init__(device, data_fd)
        self._size_bytes, self._ask = size_bytes, ask
        self._unread_bytes = size_bytes

    def precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO: EINVAL, since the device is in STOP_COPY; or ENODEV."""
        if self._ended:
            raise os_error(errno.ENODEV)
        return self._ask()

    def unread_bytes(self) -> int:
        """Return how much of the state was not read: the file's offset tells."""
        if (fd := self._data.fileno()) != -1:
            self._unread_bytes = self._size_bytes - os.lseek(fd, 0, os.SEEK_CUR)
        return self._unread_bytes

    def close(self) -> None:
        """Close the data_fd."""
        self.unread_bytes()
        super().close()


class Pacer:
    """Slows a stream down to a rate, and makes each burst of it late. Waits end when told to."""

    def __init__(self, bytes_per_s: int, latency_ns: int, burst_bytes: int) -> None:
        self._bytes_per_s, self._latency_ns, self._burst_bytes = (
            bytes_per_s,
            latency_ns,
            burst_bytes,
        )
        self._in_burst = 0
        self._due_ns = 0
        self._hurry = threading.Event()

    def hurry(self) -> None:
        """End the wait that is, and all that would follow."""
        self._hurry.set()

    def allowance(self) -> int:
        """Return how many bytes to move at a time: about 10 ms of them."""
        most = self._burst_bytes - self._in_burst
        if self._bytes_per_s:
            most = min(most, max(4096, self._bytes_per_s // 100))
        return most

    def wait(self, length: int) -> None:
        """Wait until so many bytes may pass."""
        if self._latency_ns and not self._in_burst:
            self.pause(self._latency_ns)
        self._in_burst = (self._in_burst + length) % self._burst_bytes
        if self._bytes_per_s:
            now_ns = time.monotonic_ns()
            self._due_ns = max(self._due_ns, now_ns - _BURST_NS)
            self._due_ns += length * 10**9 // self._bytes_per_s
            self.pause(self._due_ns - now_ns)

    def pause(self, duration_ns: int) -> None:
        """Wait so long."""
        if duration_ns > 0:
            self._hurry.wait(duration_ns / 1e9)


def os_error(number: int) -> OSError:
    """Return the OSError of an errno."""
    return OSError(number, os.strerror(number))


def meet_faults(faults: deque[Fault], at_byte: int, pacer: Pacer, reset: Callable[[], None]) -> int:
    """Suffer the faults due at this byte. Returns the errno that ends the session, or 0."""
    while faults and faults[0].byte <= at_byte:
        fault = faults.popleft()
        if not fault.take():
            continue
        if fault.action is Action.HANG:
            pacer.pause(fault.duration_ns)
            continue
        if fault.action is Action.RESET:
            reset()
        return errno.ENODEV if fault.action is Action.RESET else fault.errno
    return 0
