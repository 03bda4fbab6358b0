"""A destination in memory that is used again and again: a load into it finds its pages in place.

A simulated device keeps its old state until a load is committed, so each load has new memory; and
memory that was never touched costs a virtual machine more than the load.
"""

import errno
import os
from collections.abc import Sequence

from vfiomig.channel import FdChannel
from vfiomig.device import Device
from vfiomig.fd import OwnedFd
from vfiomig.identity import Identity
from vfiomig.uapi import Capability, DeviceState


class ScratchOps:
    """DeviceOps of a device that takes every state, and keeps it in one memfd. Owns that."""

    protocol = "v2"
    region_bytes = 0

    def __init__(self) -> None:
        self._memory = OwnedFd(os.memfd_create("vfiomig-bench"))
        self._state = DeviceState.RUNNING

    def get_migration_flags(self) -> int:
        """STOP_COPY alone."""
        return Capability.STOP_COPY

    def get_device_state(self) -> DeviceState:
        """The state it is in."""
        return self._state

    def set_device_state(self, state: DeviceState) -> FdChannel | None:
        """Enter a state; a session writes, or reads, from the beginning of the memfd."""
        self._state = state
        if state not in (DeviceState.RESUMING, DeviceState.STOP_COPY):
            return None
        return FdChannel("scratch", os.open(self._path, os.O_RDWR | os.O_CLOEXEC))

    def get_data_size(self) -> int:
        """The bytes of the memfd."""
        return os.fstat(self._memory.fileno()).st_size

    def set_precopy_info_v2(self) -> bool:
        """There is no pre-copy."""
        return False

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """There is no DMA to log."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def stop_dma_logging(self) -> None:
        """There is no DMA to log."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        """There is no DMA to log."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def reset_device(self) -> None:
        """Be RUNNING. The memory stays in place: that is what it is for."""
        self._state = DeviceState.RUNNING

    def memory_fd(self) -> int:
        """Return the memfd, still owned here, at its beginning."""
        os.lseek(self._memory.fileno(), 0, os.SEEK_SET)
        return self._memory.fileno()

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    @property
    def _path(self) -> str:
        # A descriptor with an offset of its own.
        return f"/proc/self/fd/{self._memory.fileno()}"


def scratch_device(ops: ScratchOps) -> Device:
    """Return the device over ops, which it then owns. It does not say what driver it has."""
    return Device("scratch", Identity(driver=""), ops)
