"""Devices by name: the kernel's, the simulator's, and those that are borrowed."""

import errno
import fcntl
import os
import re

from vfiomig.device import Device
from vfiomig.errors import MigrationError, NoSuchDeviceError, UsageError, opening_failed
from vfiomig.fd import OwnedFd

_BORROWED = ("fd:", "pid:", "unix:")
_SYS_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h, Linux 5.6; os has no wrapper
_PTRACE_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"


def open_device(name: str) -> Device:
    """Return the device called name, open. The caller closes it.

    sim:[FILE][?KEY=VALUE]   a simulated device: docs/simulator.md
    fd:N                     a device_fd this process inherited; the original stays open
    pid:PID/fd:N             the device_fd of another process, copied by pidfd_getfd
    unix:PATH, unix:PATH#X   a device that `vfiomig hold` lends at the socket PATH
    anything else            a device of this host, as sysfs.find() reads names; it is opened here

    Opening is a last resort. The first open of a vfio-pci device resets it, and so does the last
    close: a device that nobody has open is blank once it is opened, and what was loaded into it is
    gone once it is closed. (One that is in use is refused: busy.) To save a device in use, borrow
    it. To load one, let the process that will run it lend it, or keep it open with `vfiomig hold`.
    An mdev is reset only if its driver does so.

    Either way the device may be in any state: look first. Raises UsageError, NoSuchDeviceError,
    DeviceBusyError, AccessError, NotMigratableError, DeviceIOError, ResourceLimitError or
    PeerError; then nothing is left open.
    """
    device = _open(name)
    device.opened_as = lasting_name(name)
    return device


def _open(name: str) -> Device:
    # Each kind is imported when it is asked for: start-up is most of what a short command takes.
    if name.startswith("sim:"):
        from vfiomig.simulator.device import open_simulated

        return open_simulated(name)
    if is_borrowed(name):
        return borrow(name)
    from vfiomig import sysfs
    from vfiomig.backends import kernel

    return kernel.open_kernel(sysfs.find(name))


def lasting_name(name: str) -> str:
    """Return name as another process can use it, in whatever directory; "" where none could."""
    if name.startswith("sim:"):
        path, _, _ = name.removeprefix("sim:").partition("?")
        return f"sim:{os.path.abspath(path)}" if path else ""
    if name.startswith("unix:"):
        path, hash_sign, device = name.removeprefix("unix:").partition("#")
        return f"unix:{os.path.abspath(path)}{hash_sign}{device}"
    return "" if name.startswith("fd:") else name


def is_borrowed(name: str) -> bool:
    """Whether open_device(name) copies a descriptor that somebody else keeps open."""
    return name.startswith(_BORROWED)


def opens_by_name(name: str) -> bool:
    """Whether open_device(name) opens a device of this host, and so may reset it."""
    return not name.startswith("sim:") and not is_borrowed(name)


def borrow(name: str) -> Device:
    """Return a device through a copy of a descriptor: fd:N, pid:PID/fd:N, unix:PATH, unix:PATH#X.

    A PATH may hold a "#" only where #X follows. Raises as open_device() does.
    """
    from vfiomig import lending
    from vfiomig.backends import kernel

    if own := re.fullmatch(r"fd:([0-9]{1,9})", name):
        return kernel.device_from_fd(_duplicate(name, int(own[1])), name)
    if other := re.fullmatch(r"pid:([1-9][0-9]{0,8})/fd:([0-9]{1,9})", name):
        return kernel.device_from_fd(_take(name, int(other[1]), int(other[2])), name)
    if place := re.fullmatch(r"unix:(.+?)(?:#([^#]+))?", name):
        lent_name, identity, device_fd = lending.borrow(place[1], place[2])
        return kernel.device_from_fd(device_fd.detach(), lent_name, identity)
    raise UsageError(
        f"{name!r} names no descriptor", hint="fd:N, pid:PID/fd:N, unix:PATH or unix:PATH#DEVICE"
    )


def _duplicate(name: str, fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as err:
        raise _copying_failed(name, err, f"this process has no descriptor {fd}") from err


def _take(name: str, pid: int, fd: int) -> int:
    """Copy a descriptor of another process; the caller owns the copy."""
    try:
        with OwnedFd(os.pidfd_open(pid)) as process:
            return _pidfd_getfd(process.fileno(), fd)
    except OSError as err:
        gone = f"process {pid} does not exist"
        missing = gone if err.errno == errno.ESRCH else f"process {pid} has no descriptor {fd}"
        raise _copying_failed(name, err, missing) from err


def _copying_failed(name: str, err: OSError, missing: str) -> MigrationError:
    if err.errno in (errno.EBADF, errno.ESRCH):
        hint = "ls -l /proc/PID/fd shows what a process has open"
        reason = f"{name}: {missing}"
        return NoSuchDeviceError(reason, device=name, errno=err.errno, hint=hint)
    return opening_failed(name, err, _ptrace_hint() if err.errno == errno.EPERM else "")


def _pidfd_getfd(pidfd: int, fd: int) -> int:
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    arguments = (ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))
    copy = int(syscall(ctypes.c_long(_SYS_PIDFD_GETFD), *arguments))
    if copy == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copy  # the kernel sets O_CLOEXEC


def _ptrace_hint() -> str:
    try:
        with open(_PTRACE_SCOPE, encoding="ascii") as file:
            scope = file.read().strip()
    except OSError:
        return "this takes the right to ptrace the process: be its user, or have CAP_SYS_PTRACE"
    return (
        "this takes the right to ptrace the process: CAP_SYS_PTRACE, or its user where"
        f" {_PTRACE_SCOPE} is 0 (it is {scope})"
    )
