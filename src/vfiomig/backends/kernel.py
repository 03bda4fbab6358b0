"""A device of the kernel: opening it, by cdev and iommufd or by its group, and asking it.

Sources: drivers/vfio/{device_cdev.c,group.c,container.c,vfio_main.c} of Linux 6.12. No descriptor
here outlives a step that fails, and all are O_CLOEXEC: a child that inherits one keeps the device
open.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vfiomig import ioctl, sysfs, uapi
from vfiomig.backends.kernel_region import by_protocol
from vfiomig.channel import DataChannel, FdChannel
from vfiomig.device import Device, DeviceOps
from vfiomig.errors import (
    DeviceBusyError,
    DeviceIOError,
    MigrationError,
    NoSuchDeviceError,
    NotMigratableError,
    opening_failed,
)
from vfiomig.fd import OwnedFd
from vfiomig.identity import Identity
from vfiomig.sysfs import HostDevice
from vfiomig.uapi import DeviceState

# The name that vfio_device_open_file() gives (group.c), and that of a cdev's node.
_GROUP_PATH_LINK = "anon_inode:[vfio-device]"
_CDEV_LINK = re.compile(r"/dev/vfio/devices/(noiommu-)?vfio\d+")
_BIND = "VFIO_DEVICE_BIND_IOMMUFD"
# A BIND refused so has not opened the device, and its group may still do: EINVAL, iommufd cannot
# isolate it or it is bound already (then the group answers EBUSY); the others, no iommufd for it.
_NOT_BY_CDEV = frozenset({errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP})
_NO_RIGHT = frozenset({errno.EACCES, errno.EPERM})
_LOAD_MODULES = "load the modules: modprobe -a vfio vfio_iommu_type1"
_IN_USE = "borrow it from the process that runs it, pid:PID/fd:N; fuser -v {} names that process"


class KernelOps:
    """DeviceOps of a device_fd. Owns it, and what was opened with it.

    Close order: device, then group, then container or iommufd. May be used by several threads at
    once as far as the driver allows it; a reset never during a state change.
    """

    protocol = "v2"
    region_bytes = 0

    def __init__(self, name: str, device_fd: OwnedFd, opened: ExitStack) -> None:
        """Take over opened, which closes device_fd and whatever has to outlive it."""
        self._name, self._fd, self._opened = name, device_fd, opened
        self._is_logging = False

    def fileno(self) -> int:
        """Return the device_fd, for lending; still owned here, -1 once closed."""
        return self._fd.fileno()

    def get_migration_flags(self) -> int:
        """Return the capabilities. Raises OSError: ENOTTY when there is no migration (v2)."""
        return ioctl.get_migration_flags(self._fd.fileno())

    def get_device_state(self) -> DeviceState:
        """Return the state. Blocks while a state change runs."""
        return ioctl.get_device_state(self._fd.fileno())

    def set_device_state(self, state: DeviceState) -> DataChannel | None:
        """Move the device to state; returns the caller's channel when a session starts."""
        data_fd = ioctl.set_device_state(self._fd.fileno(), state)
        return None if data_fd == -1 else FdChannel(self._name, data_fd)

    def get_data_size(self) -> int:
        """Return stop_copy_length in bytes, an estimate."""
        return ioctl.get_data_size(self._fd.fileno())

    def set_precopy_info_v2(self) -> bool:
        """Opt in to VFIO_PRECOPY_INFO_REINIT; False where there is no such thing."""
        return ioctl.set_precopy_info_v2(self._fd.fileno())

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Log the device's writes into ranges; returns the page size that it chose."""
        chosen = ioctl.start_dma_logging(self._fd.fileno(), page_size_bytes, ranges)
        self._is_logging = True
        return chosen

    def stop_dma_logging(self) -> None:
        """End the logging. Nothing once closed: close() has ended it."""
        if self._fd.fileno() != -1:
            ioctl.stop_dma_logging(self._fd.fileno())
        self._is_logging = False

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        """Set the bits of pages that were written since they were last reported."""
        fd = self._fd.fileno()
        ioctl.report_dma_logging(fd, iova, length_bytes, page_size_bytes, bitmap)

    def reset_device(self) -> None:
        """Reset the device. Raises OSError: EAGAIN while its lock is busy."""
        ioctl.reset_device(self._fd.fileno())

    def get_device_info(self) -> tuple[int, int, int]:
        """Return the flags (uapi.DeviceInfoFlag), the number of regions and of interrupts."""
        return ioctl.get_device_info(self._fd.fileno())

    def close(self) -> None:
        """Close everything, the device first. Of a vfio-pci device the last close is a reset."""
        if self._is_logging:
            # A device that somebody else has open as well would go on logging for nobody.
            with suppress(OSError):
                self.stop_dma_logging()
        self._opened.close()


def identity_of(host: HostDevice) -> Identity:
    """Return what a stream says of a device."""
    return Identity(
        driver=host.driver,
        model=host.mdev_type,
        vendor_id=host.vendor_id,
        device_id=host.device_id,
        subsystem_vendor_id=host.subsystem_vendor_id,
        subsystem_device_id=host.subsystem_device_id,
    )


def open_kernel(host: HostDevice, *, dev_root: Path = Path("/dev")) -> Device:
    """Open a device of this host for migration. Raises as open_ops() does, or NotMigratableError.

    This resets a PCI device, and so does closing it: see vfiomig.backends.open_device().
    """
    ops = open_ops(host, dev_root=dev_root)
    return Device(host.name, identity_of(host), _by_protocol(host.name, ops))


def open_ops(host: HostDevice, *, dev_root: Path = Path("/dev")) -> KernelOps:
    """Open a device of this host, migratable or not: to look at it, or to lend it.

    By cdev and iommufd where both nodes exist, else by its group; also by its group when the kernel
    refuses BIND_IOMMUFD with EINVAL, ENOTTY or EOPNOTSUPP, as it may for an mdev. Raises
    AccessError, DeviceBusyError, NoSuchDeviceError, NotMigratableError (no-IOMMU), DeviceIOError or
    ResourceLimitError, with a hint.
    """
    cdev, iommufd = dev_root / "vfio/devices" / host.cdev, dev_root / "iommu"
    if not (host.cdev and os.path.exists(cdev) and os.path.exists(iommufd)):
        return _open_by_group(host, dev_root)
    try:
        return _open_by_cdev(host.name, cdev, iommufd)
    except MigrationError as err:
        has_group = host.iommu_group and os.path.exists(dev_root / "vfio" / host.iommu_group)
        if not (has_group and err.phase == _BIND and err.errno in _NOT_BY_CDEV):
            raise
        refused = err
    try:
        return _open_by_group(host, dev_root)
    except DeviceBusyError as err:
        # A bound cdev answers EINVAL to a second BIND, and its group EBUSY: the cdev is open.
        if (refused.errno, err.errno) != (errno.EINVAL, errno.EBUSY):
            raise
        raise refused from err


def device_from_fd(device_fd: int, name: str, identity: Identity | None = None) -> Device:
    """Make a Device of a device_fd that somebody else opened. Takes it over, also on error.

    name and identity: what the lender says; the kernel's word goes first where it names the device
    (fdinfo, Linux 7.x). Raises NoSuchDeviceError, before any ioctl, when it is no VFIO device;
    DeviceBusyError for a cdev its owner has not bound yet; NotMigratableError.
    """
    with ExitStack() as opened:
        owned = opened.enter_context(OwnedFd(device_fd))
        # The number of VFIO_DEVICE_FEATURE is a valid, different request to a container.
        _refuse_other_files(device_fd, name)
        if host := _host_device(device_fd):
            name, identity = host.name, identity_of(host)
        _refuse_unbound(device_fd, name)
        ops = KernelOps(name, owned, opened.pop_all())
    return Device(name, identity or Identity(driver=""), _by_protocol(name, ops))


def _by_protocol(name: str, ops: KernelOps) -> DeviceOps:
    try:
        return by_protocol(name, ops.fileno(), ops)
    except OSError as err:
        ops.close()
        raise opening_failed(f"{name}: looking for a migration region", err) from err


def _open_by_cdev(name: str, cdev: Path, iommu: Path) -> KernelOps:
    hints = {
        errno.EBUSY: "its group is open: " + _IN_USE.format("/dev/vfio/*"),
        errno.EINVAL: "most likely it is open already: " + _IN_USE.format(cdev),
        errno.EPERM: "bind every device of its IOMMU group to vfio-pci, or to no driver",
    }
    with ExitStack() as opened:
        iommufd = opened.enter_context(_open_node(name, iommu, "modprobe iommufd"))
        device = opened.enter_context(_open_node(name, cdev, "is udev running?"))
        with _step(name, _BIND, hints):
            ioctl.bind_iommufd(device.fileno(), iommufd.fileno())
        return KernelOps(name, device, opened.pop_all())


def _open_by_group(host: HostDevice, dev_root: Path) -> KernelOps:
    name, group_name = host.name, host.iommu_group
    _refuse_groupless(host)
    node = dev_root / "vfio" / group_name
    bind = f"bind every device in /sys/kernel/iommu_groups/{group_name}/devices to vfio-pci"
    claims = {errno.EPERM: bind, errno.EBUSY: bind}
    with ExitStack() as opened:
        container = opened.enter_context(_open_node(name, dev_root / "vfio/vfio", _LOAD_MODULES))
        group = opened.enter_context(_open_node(name, node, "bind the device to a VFIO driver"))
        _refuse_other_versions(name, container.fileno())
        with _step(name, "VFIO_GROUP_GET_STATUS", {}):
            viable = ioctl.get_group_status(group.fileno()) & uapi.VFIO_GROUP_FLAGS_VIABLE
        if not viable:
            reason = f"IOMMU group {group_name} is not viable: a host driver has a device of it"
            raise DeviceBusyError(f"{name}: {reason}", device=name, hint=bind)
        with _step(name, "VFIO_GROUP_SET_CONTAINER", claims):
            ioctl.set_container(group.fileno(), container.fileno())
        with _step(name, "VFIO_SET_IOMMU", {errno.ENODEV: _LOAD_MODULES}):
            ioctl.set_iommu(container.fileno(), uapi.VFIO_TYPE1v2_IOMMU)
        device = opened.enter_context(_device_of_group(name, group.fileno()))
        return KernelOps(name, device, opened.pop_all())


def _refuse_other_versions(name: str, container_fd: int) -> None:
    with _step(name, "VFIO_GET_API_VERSION", {}):
        version = ioctl.get_api_version(container_fd)
    if version != uapi.VFIO_API_VERSION:
        raise DeviceIOError(f"{name}: VFIO API version {version} is unknown", device=name)


def _device_of_group(name: str, group_fd: int) -> OwnedFd:
    hints = {
        errno.ENODEV: "bind it to a VFIO driver",
        errno.EINVAL: "dmesg says why; a function whose PF is in use by VFIO needs a vf_token",
    }
    with _step(name, "VFIO_GROUP_GET_DEVICE_FD", hints):
        return OwnedFd(ioctl.get_device_fd(group_fd, name))


def _refuse_groupless(host: HostDevice) -> None:
    if not host.iommu_group:
        raise NoSuchDeviceError(
            f"{host.name}: it has no node to open: no cdev, no IOMMU group",
            device=host.name,
            hint="bind it to a VFIO driver; for a PCI device the host needs its IOMMU switched on",
        )
    if host.iommu_group.startswith("noiommu-"):
        raise NotMigratableError(
            f"{host.name}: opening a device without an IOMMU ({host.iommu_group}) is not supported",
            device=host.name,
            hint="switch the IOMMU on, or borrow the device from the process that runs it",
        )


def _refuse_other_files(device_fd: int, name: str) -> None:
    try:
        link = os.readlink(f"/proc/self/fd/{device_fd}")
    except OSError as err:
        raise opening_failed(name, err, "is /proc mounted?") from err
    is_cdev = _CDEV_LINK.fullmatch(link) and stat.S_ISCHR(os.fstat(device_fd).st_mode)
    if not is_cdev and link != _GROUP_PATH_LINK:
        raise NoSuchDeviceError(
            f"{name}: this descriptor is no VFIO device: it is {link!r}",
            device=name,
            hint=f"it must be {_GROUP_PATH_LINK} or /dev/vfio/devices/vfioN: ls -l /proc/PID/fd",
        )


def _refuse_unbound(device_fd: int, name: str) -> None:
    try:
        ioctl.get_device_info(device_fd)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise opening_failed(name, err) from err
        # Until BIND a cdev answers EINVAL to every other request (vfio_main.c).
        raise DeviceBusyError(
            f"{name}: its owner has not bound this descriptor to an iommufd",
            device=name,
            errno=err.errno,
            hint="lend it after VFIO_DEVICE_BIND_IOMMUFD",
        ) from err


def _host_device(device_fd: int) -> HostDevice | None:
    """Return the device behind a descriptor, None where neither fdinfo nor sysfs tells."""
    with open(f"/proc/self/fdinfo/{device_fd}", encoding="utf-8") as lines:
        paths = [
            line.partition(":")[2] for line in lines if line.startswith("vfio-device-syspath:")
        ]
    try:
        return sysfs.find(paths[0].strip()) if paths else None
    except MigrationError:
        return None  # no such path in this mount namespace: the caller has the lender's word


def _open_node(name: str, node: Path, if_missing: str) -> OwnedFd:
    hints = dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENXIO), if_missing)
    hints |= {errno.EBUSY: _IN_USE.format(node)} | dict.fromkeys(_NO_RIGHT, _rights_hint(node))
    with _step(name, str(node), hints):
        return OwnedFd(os.open(node, os.O_RDWR | os.O_CLOEXEC))


def _rights_hint(node: Path) -> str:
    if os.geteuid() == 0:
        return (
            f"root is refused by a list of allowed devices: DeviceAllow={node} rw, or a container"
        )
    if node.name == "vfio":
        return f"as root: chmod 0666 {node}, udev's own setting: it gives access to no device"
    classes = {"iommu": "misc", "devices": "vfio-dev"}
    subsystem = classes.get(node.name) or classes.get(node.parent.name) or "vfio"
    rule = f'SUBSYSTEM=="{subsystem}", KERNEL=="{node.name}", GROUP="vfio", MODE="0660"'
    return f"as root: chown {os.geteuid()} {node}; to last, a udev rule: {rule}"


@contextmanager
def _step(name: str, what: str, hints: dict[int, str]) -> Iterator[None]:
    """Give an OSError its meaning: what was being done, and the hint for its errno."""
    try:
        yield
    except OSError as cause:
        hint = hints.get(cause.errno or 0, "")
        err = opening_failed(f"{name}: {what}", cause, hint)
        if (what, cause.errno) == (_BIND, errno.EINVAL):
            err = DeviceBusyError(str(err), errno=cause.errno, hint=hint)
        err.device, err.phase = name, what
        raise err from cause
