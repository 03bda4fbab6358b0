"""What stands between a person and a migration, and what to do about it. Opens no device node.

It asks sysfs, procfs, access(2). Only what the uAPI offers is inferred from the kernel's release;
no file shows it, and asking would mean to open a device.
"""

import os
import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from vfiomig.sysfs import (
    DEV,
    MODULES,
    SYS,
    HostDevice,
    Verdict,
    device_nodes,
    entries,
    link_name,
    read_attribute,
)

PROC = Path("/proc")

# The first release of Linux with it: include/uapi/linux/vfio.h (v2, PRE_COPY, MIG_DATA_SIZE and
# BIND_IOMMUFD), samples/vfio-mdev/mtty.c, drivers/vfio/debugfs.c.
_MIGRATION, _PRE_COPY = (5, 18), (6, 2)
_SINCE = {
    _PRE_COPY: "PRE_COPY and the query of the state's size",
    (6, 6): "/dev/vfio/devices and iommufd",
    (6, 7): "migration of the sample device mtty",
    (6, 8): "the state in debugfs",
}
# Each is also a symbol of Kconfig: drivers/vfio/Kconfig, drivers/vfio/pci/Kconfig,
# drivers/iommu/iommufd/Kconfig.
_MODULES = {
    "vfio": "nothing of VFIO works",
    "vfio_iommu_type1": "no device opens by its group",
    "iommufd": "no device opens by /dev/vfio/devices",
    "vfio_pci": "no PCI device can be bound to vfio-pci",
}
_LEAST_FILES = 1024  # INR_OPEN_CUR in include/uapi/linux/fs.h: the kernel's own default
# Drivers of others that leave a group usable, by driver_managed_dma = true: drivers/pci/pcie/
# portdrv.c and drivers/pci/pci-stub.c.
_HARMLESS = frozenset({"", "pcieport", "pci-stub"})
_RULES = "/etc/udev/rules.d/70-vfiomig.rules"


class Status(StrEnum):
    """OK: nothing to do. WARN: some things will not work. FAIL: it has to be mended first."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined: what is true (text), and what to do about it (remedy, or "")."""

    status: Status
    subject: str
    text: str
    remedy: str = ""


def examine(
    device: HostDevice | None = None,
    *,
    sys_root: Path = SYS,
    dev_root: Path = DEV,
    proc_root: Path = PROC,
    modules_root: Path = MODULES,
    release: str = "",
) -> list[Finding]:
    """Examine this host, and the device if there is one, with the rights of the caller.

    release: of the kernel, "" for the one that runs; modules_root: its directory in /lib/modules.
    """
    findings = [
        check_kernel(release or os.uname().release),
        *check_modules(sys_root, modules_root),
        *check_nodes(dev_root),
        check_iommu(sys_root, proc_root),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_borrowing(proc_root, os.geteuid()),
        check_python(),
    ]
    if device is not None:
        findings += [check_driver(device), check_group(device)]
        findings += [check_node(device, dev_root), check_holders(device, dev_root, proc_root)]
    return findings


def check_kernel(release: str) -> Finding:
    """Say what a kernel of this release lacks."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        return Finding(Status.WARN, "kernel", f"{release!r} is no release of Linux")
    version = (int(numbers[1]), int(numbers[2]))
    if version < _MIGRATION:
        # Red Hat's kernels say ".el9"; they keep the number of their first day and backport VFIO.
        status = Status.WARN if ".el" in release else Status.FAIL
        text = f"Linux {release} has no migration (v2), unless somebody backported it"
        return Finding(status, "kernel", text, "boot Linux 5.18 or newer, best 6.8 or newer")
    missing = "; ".join(what for since, what in _SINCE.items() if version < since)
    if not missing:
        return Finding(Status.OK, "kernel", f"Linux {release}")
    status = Status.WARN if version < _PRE_COPY else Status.OK
    text = f"Linux {release} has migration, but not yet: {missing}"
    return Finding(status, "kernel", text, "boot Linux 6.8 or newer if you want these")


def check_modules(sys_root: Path, modules_root: Path) -> Iterator[Finding]:
    """Say of each module of VFIO whether it is there, or can be had."""
    built_in = _module_names(modules_root / "modules.builtin")
    installed = _module_names(modules_root / "modules.dep")
    for module, loss in _MODULES.items():
        subject, text, remedy = f"module {module}", f"absent: {loss}", ""
        if (sys_root / "module" / module).exists() or module in built_in:
            yield Finding(Status.OK, subject, "loaded or built in")
        elif module in installed:
            text = f"installed, but not loaded: {loss}"
            yield Finding(Status.WARN, subject, text, f"modprobe {module}")
        elif not built_in and not installed:
            text = f"not loaded; {modules_root} does not tell whether it is built in"
            yield Finding(Status.WARN, subject, text, "if a device opens, all is well")
        else:
            status = Status.FAIL if module == "vfio" else Status.WARN
            remedy = f"install or boot a kernel with CONFIG_{module.upper()}"
            yield Finding(status, subject, text, remedy)


def check_nodes(dev_root: Path) -> Iterator[Finding]:
    """Say which ways to a device there are, by its group or its own node, and who may take them."""
    container, iommufd = dev_root / "vfio/vfio", dev_root / "iommu"
    # One of the two ways is enough.
    absent = Status.WARN if container.exists() or iommufd.exists() else Status.FAIL
    if container.exists():
        yield _access(container, 'KERNEL=="vfio", SUBSYSTEM=="misc", MODE="0666"')
    else:
        text = "absent: no device opens by its group"
        yield Finding(absent, str(container), text, "modprobe vfio_iommu_type1")
    if iommufd.exists():
        rule = 'KERNEL=="iommu", SUBSYSTEM=="misc", GROUP="vfio", MODE="0660"'
        yield _access(iommufd, rule)
    else:
        text = "absent: no device opens by /dev/vfio/devices"
        yield Finding(absent, str(iommufd), text, "modprobe iommufd")
    directory = dev_root / "vfio/devices"
    if iommufd.exists() and not directory.exists():
        text = "absent: no device is bound to VFIO, or the kernel has no CONFIG_VFIO_DEVICE_CDEV"
        yield Finding(Status.WARN, str(directory), text, "vfiomig list --all shows what to bind")


def check_iommu(sys_root: Path, proc_root: Path) -> Finding:
    """Say whether the host has an IOMMU: without one a PCI device has no group."""
    if units := [entry.name for entry in entries(sys_root / "class/iommu")]:
        return Finding(Status.OK, "IOMMU", f"on: {', '.join(units)}")
    # Documentation/admin-guide/kernel-parameters.txt
    off = re.search(r"\b(intel_iommu|amd_iommu|iommu)=off\b", read_attribute(proc_root / "cmdline"))
    remedy = "turn on VT-d, AMD-Vi or the SMMU in the firmware; on Intel boot with intel_iommu=on"
    if off:
        remedy = f"remove {off[0]} from the kernel's command line"
    return Finding(Status.WARN, "IOMMU", "off or absent: only mdev devices can be opened", remedy)


def check_open_files(soft_limit: int) -> Finding:
    """Say whether RLIMIT_NOFILE leaves room for data sessions."""
    if soft_limit == resource.RLIM_INFINITY or soft_limit >= _LEAST_FILES:
        return Finding(Status.OK, "open files", f"up to {soft_limit}")
    # EMFILE comes after the transition: the device has moved, and its data_fd is lost.
    text = f"up to {soft_limit}: a session that gets no descriptor is lost"
    return Finding(Status.WARN, "open files", text, f"ulimit -n {_LEAST_FILES}")


def check_borrowing(proc_root: Path, euid: int) -> Finding:
    """Say whether pid:PID/fd:N can work: pidfd_getfd(2) takes the right to ptrace."""
    scope = read_attribute(proc_root / "sys/kernel/yama/ptrace_scope")
    if scope in ("", "0") or (scope in ("1", "2") and euid == 0):
        whose = "any process" if euid == 0 else "your own processes"
        return Finding(Status.OK, "pid:PID/fd:N", f"you may borrow from {whose}")
    # Documentation/admin-guide/LSM/Yama.rst: 1 children only, 2 root only, 3 nobody till reboot.
    text = f"kernel.yama.ptrace_scope is {scope}: you may not borrow from running processes"
    remedy = "use unix:PATH"
    if scope != "3":
        remedy += ", or run as root, or sysctl kernel.yama.ptrace_scope=0"
    return Finding(Status.WARN, "pid:PID/fd:N", text, remedy)


def check_python() -> Finding:
    """Say whether progress can be drawn."""
    python = f"Python {platform.python_version()}"
    if find_spec("rich") is None:
        text = f"{python} without rich: progress and tables are plain text"
        return Finding(Status.WARN, "Python", text, "pip install rich")
    return Finding(Status.OK, "Python", f"{python} with rich")


def check_driver(device: HostDevice) -> Finding:
    """Say whether the driver that holds the device can migrate it."""
    likely = {Verdict.NO: Status.FAIL, Verdict.UNKNOWN: Status.WARN}
    status = likely.get(device.migratable, Status.OK)
    return Finding(status, f"{device.name} driver", device.reason, device.hint)


def check_group(device: HostDevice) -> Finding:
    """Say whether the rest of the IOMMU group leaves the device to VFIO."""
    subject = f"{device.name} group"
    if not device.iommu_group:
        text = "in no IOMMU group: VFIO cannot hold it"
        return Finding(Status.FAIL, subject, text, "bind it to VFIO, and see IOMMU")
    drivers = {
        member.name: link_name(member / "driver")
        for member in entries(device.path / "iommu_group/devices")
        if member.name != device.name and not (member / "vfio-dev").exists()
    }
    taken = [
        f"{name} ({d})" for name, d in drivers.items() if "vfio" not in d and d not in _HARMLESS
    ]
    if not taken:
        return Finding(Status.OK, subject, f"group {device.iommu_group} is VFIO's alone")
    text = f"group {device.iommu_group} is shared with {', '.join(taken)}: VFIO is refused (EPERM)"
    return Finding(Status.FAIL, subject, text, "bind these to vfio-pci, or to no driver")


def check_node(device: HostDevice, dev_root: Path) -> Finding:
    """Say whether the caller may open the node of the device."""
    nodes = device_nodes(device, dev_root=dev_root)
    if not nodes or not nodes[-1].exists():
        where = str(nodes[-1]) if nodes else f"{device.name} node"
        text = "absent: there is nothing to open"
        return Finding(Status.FAIL, where, text, device.hint or "bind it to its VFIO driver")
    matched = f'SUBSYSTEM=="vfio", KERNEL=="{device.iommu_group}"'
    if device.cdev:
        matched = f'SUBSYSTEM=="vfio-dev", KERNELS=="{device.name}"'
    return _access(nodes[-1], f'{matched}, GROUP="vfio", MODE="0660"')


def check_holders(device: HostDevice, dev_root: Path, proc_root: Path) -> Finding:
    """Say which processes hold the device open, as far as the caller may see."""
    subject = f"{device.name} users"
    nodes = [str(node) for node in device_nodes(device, dev_root=dev_root)[1:]]
    holders, hidden = [], 0
    for process in entries(proc_root):
        if not process.name.isdecimal():
            continue
        try:
            fds = [fd.name for fd in entries(process / "fd") if _is_of(fd, device.name, nodes)]
        except PermissionError:
            hidden += 1
            continue
        comm = read_attribute(process / "comm")
        holders += [f"{comm} (pid {process.name}, fd {fd})" for fd in fds]
    if holders:
        remedy = (
            "opening it will fail (EBUSY): borrow its descriptor, pid:PID/fd:N, or end its user"
        )
        return Finding(Status.WARN, subject, f"held by {', '.join(holders)}", remedy)
    if hidden:
        text = f"none that you may see; {hidden} processes are hidden"
        return Finding(Status.OK, subject, text, "run as root to see them all")
    return Finding(Status.OK, subject, "none")


def _is_of(fd: Path, name: str, nodes: list[str]) -> bool:
    """Whether a descriptor in /proc/PID/fd is of the device, or of its group."""
    try:
        target = os.readlink(fd)
    except FileNotFoundError:  # closed meanwhile
        return False
    if target in nodes:
        return True
    if target != "anon_inode:[vfio-device]":  # vfio_device_open_file() in drivers/vfio/group.c
        return False
    # Since Linux 7 fdinfo tells which device it is; before, only the group's descriptor does.
    info = read_attribute(fd.parent.parent / "fdinfo" / fd.name)
    return bool(re.search(rf"vfio-device-syspath:.*/{re.escape(name)}$", info, re.MULTILINE))


def _access(node: Path, rule: str) -> Finding:
    if os.access(node, os.R_OK | os.W_OK, effective_ids=True):
        return Finding(Status.OK, str(node), "you may read and write it")
    remedy = (
        f"add to {_RULES}: {rule}; then udevadm control --reload && udevadm trigger;"
        f" or until it is made anew: chown {os.geteuid()} {node}"
    )
    return Finding(Status.FAIL, str(node), "you may not read and write it", remedy)


def _module_names(index: Path) -> set[str]:
    """Return the modules that a file of depmod(8) names, with "_" for "-"."""
    return set(re.findall(r"(\w+)\.ko", read_attribute(index).replace("-", "_")))
