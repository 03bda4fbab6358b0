"""VFIO_DEVICE_FEATURE and its neighbours with arguments that no program should give."""

import errno
import fcntl

from vfiomig import uapi
from vfiomig.uapi import Feature

# No program has memory there: the first page is never mapped (vm.mmap_min_addr).
BAD_ADDRESS = 8
UNKNOWN_FEATURE = 0xFFFF


def feature(device_fd: int, flags: int, payload: bytes = b"", argsz: int = -1) -> bytes:
    """Ask VFIO_DEVICE_FEATURE. argsz: -1 for the true size. Returns the payload. Raises OSError."""
    arg = bytearray(uapi.FEATURE.size) + payload
    uapi.FEATURE.pack_into(arg, 0, len(arg) if argsz == -1 else argsz, flags)
    fcntl.ioctl(device_fd, uapi.VFIO_DEVICE_FEATURE, arg)
    return bytes(arg[uapi.FEATURE.size :])


def feature_error(device_fd: int, flags: int, payload: bytes = b"", argsz: int = -1) -> int:
    """Return the errno of VFIO_DEVICE_FEATURE, 0 when it succeeds."""
    try:
        feature(device_fd, flags, payload, argsz)
    except OSError as err:
        return err.errno or errno.EIO
    return 0


def ioctl_error(fd: int, request: int, arg: int | bytearray = 0) -> int:
    """Return the errno of any ioctl, 0 when it succeeds. arg: a buffer, or an address."""
    try:
        fcntl.ioctl(fd, request, arg)
    except OSError as err:
        return err.errno or errno.EIO
    return 0


def has_feature(device_fd: int, number: Feature) -> bool:
    """Whether a device has a feature: PROBE alone, which does nothing."""
    return feature_error(device_fd, Feature.PROBE | number) == 0
