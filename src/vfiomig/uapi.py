"""The parts of linux/vfio.h and linux/iommufd.h that migration uses, under their own names. No I/O.

The numbers are ours and not the distribution's: Debian 12's headers are of 6.1, without PRE_COPY.
Source, where nothing else is said: include/uapi/linux/vfio.h of Linux 6.12 and 7.3. Every struct
has the same layout on 32 and 64 bits; tests/test_uapi.py compares them with the header at hand.
"""

import struct
from enum import IntEnum, IntFlag
from typing import cast

# VFIO_TYPE << 8 | VFIO_BASE + n. Plain _IO(): the size travels in argsz, so that structs may grow.
_VFIO = ord(";") << 8 | 100
VFIO_GET_API_VERSION = _VFIO + 0
VFIO_CHECK_EXTENSION = _VFIO + 1
VFIO_SET_IOMMU = _VFIO + 2
VFIO_GROUP_GET_STATUS = _VFIO + 3
VFIO_GROUP_SET_CONTAINER = _VFIO + 4
VFIO_GROUP_GET_DEVICE_FD = _VFIO + 6
VFIO_DEVICE_GET_INFO = _VFIO + 7
VFIO_DEVICE_GET_REGION_INFO = _VFIO + 8
VFIO_DEVICE_RESET = _VFIO + 11
VFIO_DEVICE_FEATURE = _VFIO + 17
VFIO_DEVICE_BIND_IOMMUFD = _VFIO + 18
VFIO_MIG_GET_PRECOPY_INFO = _VFIO + 21

VFIO_API_VERSION = 0
VFIO_TYPE1v2_IOMMU = 3


class DeviceState(IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7

    @classmethod
    def _missing_(cls, value: object) -> "DeviceState":
        # linux/vfio.h: a newer kernel may show states we do not know.
        member = int.__new__(cls, cast(int, value))
        member._name_, member._value_ = f"UNKNOWN_{value}", cast(int, value)
        return member


class Capability(IntFlag):
    """flags of struct vfio_device_feature_migration, VFIO_MIGRATION_*."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the known bits that are set."""
        return tuple(bit.name or "" for bit in Capability if bit & self)


class Feature(IntFlag):
    """flags of struct vfio_device_feature; the low 16 bits are the number of the feature."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    MIG_PRECOPY_INFOV2 = 12
    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class DeviceInfoFlag(IntFlag):
    """flags of struct vfio_device_info. mtty resets well without showing RESET (measured, 6.12)."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionInfoFlag(IntFlag):
    """flags of struct vfio_region_info, VFIO_REGION_INFO_FLAG_*."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class MigrationInfoAt(IntEnum):
    """Where the fields of struct vfio_device_migration_info are (protocol v1)."""

    DEVICE_STATE = 0
    PENDING_BYTES = 8
    DATA_OFFSET = 16
    DATA_SIZE = 24


VFIO_PCI_NUM_REGIONS = 9  # the regions of a device's own kinds come behind these
VFIO_REGION_INFO_CAP_TYPE = 2
# VFIO_REGION_TYPE_MIGRATION_DEPRECATED and VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED.
VFIO_REGION_TYPE_MIGRATION, VFIO_REGION_SUBTYPE_MIGRATION = 3, 1
VFIO_GROUP_FLAGS_VIABLE = 1 << 0
# New initial data appeared in the stream; set only after the opt-in by MIG_PRECOPY_INFOV2.
VFIO_PRECOPY_INFO_REINIT = 1 << 0

FEATURE = struct.Struct("=II")  # vfio_device_feature: argsz, flags
FEATURE_MIGRATION = struct.Struct("=Q")  # vfio_device_feature_migration: flags
FEATURE_MIG_STATE = struct.Struct("=Ii")  # vfio_device_feature_mig_state: device_state, data_fd
FEATURE_MIG_DATA_SIZE = struct.Struct("=Q")  # vfio_device_feature_mig_data_size: stop_copy_length
# vfio_device_feature_dma_logging_control: page_size, num_ranges, reserved, ranges (an address).
FEATURE_DMA_LOGGING_CONTROL = struct.Struct("=QIIQ")
FEATURE_DMA_LOGGING_RANGE = struct.Struct("=QQ")  # ..._dma_logging_range: iova, length
# vfio_device_feature_dma_logging_report: iova, length, page_size, bitmap (an address).
FEATURE_DMA_LOGGING_REPORT = struct.Struct("=QQQQ")
PRECOPY_INFO = struct.Struct("=IIQQ")  # vfio_precopy_info: argsz, flags, initial_bytes, dirty_bytes
DEVICE_INFO = struct.Struct("=IIIIII")  # vfio_device_info: argsz, flags, regions, irqs, cap, pad
# vfio_region_info: argsz, flags, index, cap_offset, size, offset; then a chain of capabilities.
REGION_INFO = struct.Struct("=IIIIQQ")
INFO_CAP_HEADER = struct.Struct("=HHI")  # vfio_info_cap_header: id, version, next
REGION_INFO_CAP_TYPE = struct.Struct("=HHIII")  # the header, type, subtype
# vfio_device_migration_info: device_state, reserved, pending_bytes, data_offset, data_size.
MIGRATION_INFO = struct.Struct("=IIQQQ")
GROUP_STATUS = struct.Struct("=II")  # vfio_group_status: argsz, flags
# vfio_device_bind_iommufd: argsz, flags, iommufd, out_devid. 16 bytes serve old and new kernels.
BIND_IOMMUFD = struct.Struct("=IIiI")
