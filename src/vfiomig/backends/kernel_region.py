"""The migration region of a kernel device, by pread and pwrite on its device_fd (protocol v1)."""

import errno
import os

from vfiomig import ioctl, uapi
from vfiomig.device import DeviceOps
from vfiomig.region import RegionOps
from vfiomig.uapi import RegionInfoFlag

_KIND = (uapi.VFIO_REGION_TYPE_MIGRATION, uapi.VFIO_REGION_SUBTYPE_MIGRATION)


class KernelRegion:
    """A region of a device that is open. Borrows its device_fd.

    The data section is read and written like the registers also where the device offers to map it
    (VFIO_REGION_INFO_CAP_SPARSE_MMAP): the header leaves that to the user.
    """

    def __init__(self, device_fd: int, offset_bytes: int, size_bytes: int) -> None:
        self._device_fd, self._offset_bytes = device_fd, offset_bytes
        self.size_bytes = size_bytes

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read as pread() does. Blocks. Raises OSError."""
        return os.preadv(self._device_fd, [buffer], self._offset_bytes + offset)

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write as pwrite() does. Blocks. Raises OSError."""
        return os.pwrite(self._device_fd, data, self._offset_bytes + offset)

    def close(self) -> None:
        """Do nothing: the device_fd is the device's."""


def by_protocol(name: str, device_fd: int, ops: DeviceOps) -> DeviceOps:
    """Return what speaks to the device: ops for protocol v2, RegionOps for v1; ops for neither.

    v2 wins where a device has both. ops stays the owner of device_fd, RegionOps that of ops.
    Raises OSError.
    """
    try:
        ops.get_migration_flags()
    except OSError as err:
        if err.errno != errno.ENOTTY:
            return ops  # whoever asks it next is told
    else:
        return ops
    region = find_region(device_fd)
    return ops if region is None else RegionOps(name, region, ops)


def find_region(device_fd: int) -> KernelRegion | None:
    """Return the region of type 3, subtype 1 (VFIO_REGION_TYPE_MIGRATION); None: there is none.

    Only regions behind those that every PCI device has can be of such a type. Raises OSError.
    """
    _, regions, _ = ioctl.get_device_info(device_fd)
    for index in range(uapi.VFIO_PCI_NUM_REGIONS, regions):
        info = ioctl.get_region_info(device_fd, index)
        usable = RegionInfoFlag.READ | RegionInfoFlag.WRITE
        if info.kind == _KIND and info.flags & usable == usable:
            return KernelRegion(device_fd, info.offset_bytes, info.size_bytes)
    return None
