"""Every ioctl vfiomig issues: one function each, no policy.

All borrow their descriptors. An OSError leaves here as the kernel gave it: the caller knows the
device, and gives it meaning. Sources: include/uapi/linux/vfio.h and drivers/vfio/vfio_main.c.
"""

import errno
import struct
from array import array
from collections.abc import Sequence
from fcntl import ioctl
from typing import NamedTuple

from vfiomig import uapi
from vfiomig.uapi import DeviceState, Feature, RegionInfoFlag

# Ours: a page holds the areas of any sparse mapping seen so far.
_REGION_INFO_MOST_BYTES = 4096


def _feature(device_fd: int, flags: Feature, payload_bytes: int = 0) -> bytearray:
    arg = bytearray(uapi.FEATURE.size + payload_bytes)
    uapi.FEATURE.pack_into(arg, 0, len(arg), flags)
    ioctl(device_fd, uapi.VFIO_DEVICE_FEATURE, arg)
    return arg


def get_migration_flags(device_fd: int) -> int:
    """Return the capabilities: VFIO_DEVICE_FEATURE, GET | MIGRATION. Unknown bits are kept.

    Raises OSError: ENOTTY when the device has no migration by protocol v2.
    """
    arg = _feature(device_fd, Feature.GET | Feature.MIGRATION, uapi.FEATURE_MIGRATION.size)
    flags: int = uapi.FEATURE_MIGRATION.unpack_from(arg, uapi.FEATURE.size)[0]
    return flags


def get_device_state(device_fd: int) -> DeviceState:
    """Return the state: VFIO_DEVICE_FEATURE, GET | MIG_DEVICE_STATE.

    Blocks as long as a state change or a write to the data_fd holds the driver's lock.
    """
    flags = Feature.GET | Feature.MIG_DEVICE_STATE
    arg = _feature(device_fd, flags, uapi.FEATURE_MIG_STATE.size)
    return DeviceState(uapi.FEATURE_MIG_STATE.unpack_from(arg, uapi.FEATURE.size)[0])


def set_device_state(device_fd: int, state: DeviceState) -> int:
    """Move the device to state: VFIO_DEVICE_FEATURE, SET | MIG_DEVICE_STATE.

    Blocks until the device is there; linux/vfio.h sets no time limit.
    Returns the new data_fd (O_CLOEXEC), which the caller owns, or -1 when no session starts.
    Raises OSError: the device may then be in any state on the path; read it back.
    """
    arg = bytearray(uapi.FEATURE.size + uapi.FEATURE_MIG_STATE.size)
    uapi.FEATURE.pack_into(arg, 0, len(arg), Feature.SET | Feature.MIG_DEVICE_STATE)
    uapi.FEATURE_MIG_STATE.pack_into(arg, uapi.FEATURE.size, state, -1)
    ioctl(device_fd, uapi.VFIO_DEVICE_FEATURE, arg)
    data_fd: int = uapi.FEATURE_MIG_STATE.unpack_from(arg, uapi.FEATURE.size)[1]
    return data_fd


def get_data_size(device_fd: int) -> int:
    """Return stop_copy_length, in bytes: VFIO_DEVICE_FEATURE, GET | MIG_DATA_SIZE (Linux 6.2).

    An estimate, which may be anything: xe lets a negative errno through as nearly 2**64.
    """
    flags = Feature.GET | Feature.MIG_DATA_SIZE
    arg = _feature(device_fd, flags, uapi.FEATURE_MIG_DATA_SIZE.size)
    size: int = uapi.FEATURE_MIG_DATA_SIZE.unpack_from(arg, uapi.FEATURE.size)[0]
    return size


def set_precopy_info_v2(device_fd: int) -> bool:
    """Opt in to VFIO_PRECOPY_INFO_REINIT: SET | MIG_PRECOPY_INFOv2 (Linux 7.1).

    The opt-in lasts until the last close of the device. Returns False where the kernel has no such
    feature (ENOTTY) or the device no PRE_COPY (EINVAL, measured on 7.3).
    """
    try:
        _feature(device_fd, Feature.SET | Feature.MIG_PRECOPY_INFOV2)
    except OSError as err:
        if err.errno in (errno.ENOTTY, errno.EINVAL):
            return False
        raise
    return True


def get_precopy_info(data_fd: int) -> tuple[int, int, int]:
    """Return flags, initial_bytes and dirty_bytes: VFIO_MIG_GET_PRECOPY_INFO on a data_fd.

    Has side effects: mlx5 and virtio make new data only when asked this. flags mean something only
    after set_precopy_info_v2(): without it the kernel echoes the caller's, which is 0 here.
    """
    arg = bytearray(uapi.PRECOPY_INFO.size)
    uapi.PRECOPY_INFO.pack_into(arg, 0, len(arg), 0, 0, 0)
    ioctl(data_fd, uapi.VFIO_MIG_GET_PRECOPY_INFO, arg)
    _, flags, initial_bytes, dirty_bytes = uapi.PRECOPY_INFO.unpack(arg)
    return flags, initial_bytes, dirty_bytes


def start_dma_logging(
    device_fd: int, page_size_bytes: int, ranges: Sequence[tuple[int, int]]
) -> int:
    """Log the device's writes into ranges of (iova, length): SET | DMA_LOGGING_START (Linux 6.1).

    Returns the page size that the device chose; what it was asked for is a hint. Raises OSError:
    E2BIG for more than PAGE_SIZE / 16 ranges, EOVERFLOW for one that ends past 2**64, EINVAL for
    what is not aligned, or overlaps, or is logged already (mlx5); a length of 0 is not noticed.
    """
    pairs = array("Q", [number for pair in ranges for number in pair])
    arg = bytearray(uapi.FEATURE.size + uapi.FEATURE_DMA_LOGGING_CONTROL.size)
    uapi.FEATURE.pack_into(arg, 0, len(arg), Feature.SET | Feature.DMA_LOGGING_START)
    address = pairs.buffer_info()[0]
    control = (page_size_bytes, len(ranges), 0, address)
    uapi.FEATURE_DMA_LOGGING_CONTROL.pack_into(arg, uapi.FEATURE.size, *control)
    ioctl(device_fd, uapi.VFIO_DEVICE_FEATURE, arg)
    chosen: int = uapi.FEATURE_DMA_LOGGING_CONTROL.unpack_from(arg, uapi.FEATURE.size)[0]
    return chosen


def stop_dma_logging(device_fd: int) -> None:
    """End the logging: SET | DMA_LOGGING_STOP. No error on mlx5, pds and mtty where none is on."""
    _feature(device_fd, Feature.SET | Feature.DMA_LOGGING_STOP)


def report_dma_logging(
    device_fd: int, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
) -> None:
    """Set the bits of pages that were written, and forget them: GET | DMA_LOGGING_REPORT.

    bitmap: bit n % 64 of its u64 n // 64 is the page at iova + n * page_size_bytes; bits are only
    ever set. page_size_bytes: a power of two, 4096 at least; not bound to be that of START. Raises
    OSError: take every page for written then. EOPNOTSUPP on a kernel without IOMMUFD_DRIVER, where
    START has succeeded (measured, 6.12).
    """
    # Only here, where the kernel needs an address that Python does not tell otherwise. Of memory
    # that cannot be written, which from_buffer() refuses, the kernel drops the bits and returns 0.
    from ctypes import addressof, c_char

    arg = bytearray(uapi.FEATURE.size + uapi.FEATURE_DMA_LOGGING_REPORT.size)
    uapi.FEATURE.pack_into(arg, 0, len(arg), Feature.GET | Feature.DMA_LOGGING_REPORT)
    kept = (c_char * len(bitmap)).from_buffer(bitmap)  # it stays where it is meanwhile
    report = (iova, length_bytes, page_size_bytes, addressof(kept))
    uapi.FEATURE_DMA_LOGGING_REPORT.pack_into(arg, uapi.FEATURE.size, *report)
    ioctl(device_fd, uapi.VFIO_DEVICE_FEATURE, arg)


def get_device_info(device_fd: int) -> tuple[int, int, int]:
    """Return flags, the number of regions and of interrupts: VFIO_DEVICE_GET_INFO."""
    arg = bytearray(uapi.DEVICE_INFO.size)
    uapi.DEVICE_INFO.pack_into(arg, 0, len(arg), 0, 0, 0, 0, 0)
    ioctl(device_fd, uapi.VFIO_DEVICE_GET_INFO, arg)
    _, flags, regions, irqs, _, _ = uapi.DEVICE_INFO.unpack(arg)
    return flags, regions, irqs


class RegionInfo(NamedTuple):
    """struct vfio_region_info. offset_bytes: where pread() and pwrite() on the device_fd reach it.

    kind: type and subtype of VFIO_REGION_INFO_CAP_TYPE, None where a region has none.
    """

    flags: RegionInfoFlag
    size_bytes: int
    offset_bytes: int
    kind: tuple[int, int] | None


def get_region_info(device_fd: int, index: int) -> RegionInfo:
    """Return one region of a device: VFIO_DEVICE_GET_REGION_INFO.

    Raises OSError: EINVAL for an index that the device does not have.
    """
    arg = bytearray(uapi.REGION_INFO.size)
    while True:
        uapi.REGION_INFO.pack_into(arg, 0, len(arg), 0, index, 0, 0, 0)
        ioctl(device_fd, uapi.VFIO_DEVICE_GET_REGION_INFO, arg)
        argsz, flags, _, cap_offset, size, offset = uapi.REGION_INFO.unpack_from(arg)
        if argsz <= len(arg):
            break
        if argsz > _REGION_INFO_MOST_BYTES:
            raise OSError(errno.E2BIG, f"region {index} has {argsz} bytes of capabilities")
        arg = bytearray(argsz)  # room for the capabilities, which did not fit
    kind = _region_kind(arg, cap_offset) if flags & RegionInfoFlag.CAPS else None
    return RegionInfo(RegionInfoFlag(flags), size, offset, kind)


def _region_kind(arg: bytearray, cap_offset: int) -> tuple[int, int] | None:
    while 0 < cap_offset <= len(arg) - uapi.INFO_CAP_HEADER.size:
        cap, _, following = uapi.INFO_CAP_HEADER.unpack_from(arg, cap_offset)
        fits = cap_offset <= len(arg) - uapi.REGION_INFO_CAP_TYPE.size
        if cap == uapi.VFIO_REGION_INFO_CAP_TYPE and fits:
            _, _, _, kind, subtype = uapi.REGION_INFO_CAP_TYPE.unpack_from(arg, cap_offset)
            return kind, subtype
        if following <= cap_offset:
            return None  # 0: the last one; a chain that goes back would have no end
        cap_offset = following
    return None


def reset_device(device_fd: int) -> None:
    """VFIO_DEVICE_RESET. The state becomes RUNNING, every open data_fd answers ENODEV.

    Never at the same time as a state change. EAGAIN: the device's lock is busy, try again.
    """
    ioctl(device_fd, uapi.VFIO_DEVICE_RESET)


def bind_iommufd(device_fd: int, iommufd: int) -> int:
    """VFIO_DEVICE_BIND_IOMMUFD: the first thing a cdev must be told. Returns the device's id."""
    arg = bytearray(uapi.BIND_IOMMUFD.size)
    uapi.BIND_IOMMUFD.pack_into(arg, 0, len(arg), 0, iommufd, 0)
    ioctl(device_fd, uapi.VFIO_DEVICE_BIND_IOMMUFD, arg)
    out_devid: int = uapi.BIND_IOMMUFD.unpack(arg)[3]
    return out_devid


def get_api_version(container_fd: int) -> int:
    """VFIO_GET_API_VERSION: 0 on every kernel so far."""
    return ioctl(container_fd, uapi.VFIO_GET_API_VERSION)


def set_iommu(container_fd: int, iommu_type: int) -> None:
    """VFIO_SET_IOMMU: needed before a group gives a device fd; no mapping is."""
    ioctl(container_fd, uapi.VFIO_SET_IOMMU, iommu_type)


def get_group_status(group_fd: int) -> int:
    """Return the flags of VFIO_GROUP_GET_STATUS: VFIO_GROUP_FLAGS_VIABLE or not."""
    arg = bytearray(uapi.GROUP_STATUS.size)
    uapi.GROUP_STATUS.pack_into(arg, 0, len(arg), 0)
    ioctl(group_fd, uapi.VFIO_GROUP_GET_STATUS, arg)
    flags: int = uapi.GROUP_STATUS.unpack(arg)[1]
    return flags


def set_container(group_fd: int, container_fd: int) -> None:
    """VFIO_GROUP_SET_CONTAINER."""
    ioctl(group_fd, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container_fd)))


def get_device_fd(group_fd: int, name: str) -> int:
    """VFIO_GROUP_GET_DEVICE_FD. Returns the device_fd, which the caller owns.

    name: PCI address with domain, or the UUID of a mediated device.
    """
    # A bytearray: for immutable bytes fcntl.ioctl returns the buffer and not the result.
    device_fd: int = ioctl(
        group_fd, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0")
    )
    return device_fd
