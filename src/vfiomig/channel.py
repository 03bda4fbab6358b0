"""The channel: what owns a data_fd and the life of one data session."""

from typing import NamedTuple, Protocol

from vfiomig import ioctl
from vfiomig.errors import StaleChannelError
from vfiomig.fd import OwnedFd
from vfiomig.uapi import VFIO_PRECOPY_INFO_REINIT


class PrecopyInfo(NamedTuple):
    """struct vfio_precopy_info: estimates in bytes. reinit: new initial data appeared."""

    initial_bytes: int
    dirty_bytes: int
    reinit: bool = False


class Chunks(Protocol):
    """A session by protocol v1, which moves chunk after chunk and not bytes (region.py).

    pending_bytes: what the device said before the last read() that is still to come.
    """

    pending_bytes: int

    def read(self) -> memoryview:
        """Return the next chunk of a save, valid until the next call; empty: nothing now."""
        ...

    def submit(self) -> None:
        """Load the chunk that was written to fileno(); it must have the size it was read with."""
        ...


class DataChannel(Protocol):
    """One data session of a device. One thread reads or writes it; close() ends our use of it.

    chunks: where the session moves chunks (protocol v1); None where fileno() is a data_fd.
    """

    chunks: Chunks | None

    def fileno(self) -> int:
        """Return the data_fd, which stays the channel's. Raises StaleChannelError once closed."""
        ...

    def precopy_info(self) -> PrecopyInfo:
        """Ask VFIO_MIG_GET_PRECOPY_INFO. Only the copy loop may: it makes drivers produce data.

        Raises OSError.
        """
        ...

    def failure(self) -> OSError | None:
        """Return the error behind an end of file or a broken pipe on the data_fd, if there is one.

        A kernel's data_fd says everything itself, and this is None. A simulated one is a pipe,
        which cannot say ENOMSG or EIO: the simulator says it here.
        """
        ...

    def close(self) -> None:
        """Close the data_fd; later use raises StaleChannelError. The device's state stays."""
        ...


class FdChannel:
    """The session of a kernel device: owns its data_fd."""

    chunks: Chunks | None = None

    def __init__(self, device: str, data_fd: int) -> None:
        self._device, self._fd = device, OwnedFd(data_fd)

    def fileno(self) -> int:
        """Return the data_fd, still owned here. Raises StaleChannelError once closed."""
        if (fd := self._fd.fileno()) == -1:
            raise StaleChannelError(f"{self._device}: this data session has ended")
        return fd

    def precopy_info(self) -> PrecopyInfo:
        """Ask the kernel. Raises OSError: EINVAL outside PRE_COPY, ENODEV after a reset."""
        flags, initial_bytes, dirty_bytes = ioctl.get_precopy_info(self.fileno())
        return PrecopyInfo(initial_bytes, dirty_bytes, bool(flags & VFIO_PRECOPY_INFO_REINIT))

    def failure(self) -> OSError | None:
        """Return None: the kernel's data_fd gives its errno to read() and write()."""
        return None

    def close(self) -> None:
        """Close the data_fd. The device's state stays as it is."""
        self._fd.close()
