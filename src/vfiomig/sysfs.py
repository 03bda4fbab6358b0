"""The host's VFIO devices, from sysfs, debugfs and the module index. Opens no device node, ever.

Opening a vfio-pci device resets it, so whatever can be known without that is found here. Sources:
drivers/vfio/ of Linux 6.12 for every name in sysfs, scripts/mod/file2alias.c for the aliases.
"""

import difflib
import os
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from vfiomig.errors import NoSuchDeviceError, UsageError

SYS = Path("/sys")
DEV = Path("/dev")
MODULES = Path("/lib/modules", os.uname().release)  # of the running kernel

# Drivers with vfio_migration_ops, by the name of their pci_driver, which driver_override compares
# with: drivers/vfio/pci/{mlx5,hisilicon,pds,qat,virtio,xe}/. Value: what else the device needs.
VARIANTS = {
    "mlx5_vfio_pci": "its PF must allow it: devlink port function set PORT migratable enable",
    "hisi_acc_vfio_pci": "",
    "pds_vfio_pci": "",
    "qat_vfio_pci": "",
    "virtio_vfio_pci": "its PF must offer the device-parts admin commands",
    "xe-vfio-pci": "",
}
# VFIO drivers without vfio_migration_ops: drivers/vfio/{pci,cdx,fsl-mc,platform}/, drivers/s390/
# {cio,crypto}/vfio_*_ops.c, drivers/gpu/drm/i915/gvt/kvmgt.c, samples/vfio-mdev/{mdpy,mbochs}.c.
NOT_MIGRATABLE = frozenset(
    "vfio-pci nvgrace_gpu_vfio_pci ism_vfio_pci vfio-cdx vfio-fsl-mc vfio-platform vfio-amba"
    " vfio_ccw_mdev vfio_ap_mdev intel_vgpu_mdev mdpy mbochs".replace("-", "_").split()
)
_DRIVER_OF = {name.replace("-", "_"): name for name in VARIANTS}

# Domains have four digits or more: VMD numbers its own from 10000 (drivers/pci/controller/vmd.c).
_PCI = re.compile(r"(?:(?P<domain>[0-9a-f]{4,}):)?(?P<rest>[0-9a-f]{2}:[01][0-9a-f]\.[0-7])")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CDEV = re.compile(r"(?:/dev/vfio/devices/)?(?P<cdev>(noiommu-)?vfio\d+)")
_GROUP = re.compile(r"/dev/vfio/(?P<group>(noiommu-)?\d+)(#(?P<name>.+))?")


class Verdict(StrEnum):
    """Whether a device can be migrated, as far as can be known without opening it.

    YES: the kernel says so (debugfs), or the driver always can. LIKELY: the driver can; the device,
    its firmware or settings may refuse. NO: not as it is. UNKNOWN: we do not know its VFIO driver.
    """

    YES = "yes"
    LIKELY = "likely"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A device of this host as sysfs shows it; what sysfs does not show is "".

    name: canonical, the PCI address with its domain, or the UUID of an mdev. path: its real
    directory. bus: "pci", "mdev", or what the kernel calls it. The ids are PCI's, four hex digits.
    iommu_group and cdev: the names of its nodes, "3" or "noiommu-0", and "vfio0". features: the
    kernel's words ("stop-copy p2p pre-copy"), where debugfs may be read. variant_driver: the one
    that is installed for it. hint: what to do about reason.
    """

    name: str
    path: Path
    bus: str
    driver: str
    mdev_type: str
    vendor_id: str
    device_id: str
    subsystem_vendor_id: str
    subsystem_device_id: str
    iommu_group: str
    cdev: str
    features: str
    variant_driver: str
    migratable: Verdict = Verdict.UNKNOWN
    reason: str = ""
    hint: str = ""


def find(name: str, *, sys_root: Path = SYS, modules_root: Path = MODULES) -> HostDevice:
    """Return the device that a person means by name.

    Takes 3b:00.2 with or without domain and pci/, the UUID of an mdev, a path in sysfs, vfio0 with
    or without /dev/vfio/devices/, /dev/vfio/GROUP#NAME. Raises UsageError, NoSuchDeviceError.
    """
    return _describe(_locate(name, sys_root), sys_root, _variant_aliases(modules_root))


def list_devices(
    *, include_all: bool = False, sys_root: Path = SYS, modules_root: Path = MODULES
) -> list[HostDevice]:
    """Return the devices bound to a VFIO driver, by name.

    include_all: also virtual functions bound elsewhere, and what a variant driver is installed for.
    """
    found = [*_on_buses(sys_root), *sys_root.glob("class/vfio-dev/*/device")]
    aliases = _variant_aliases(modules_root)
    devices = [_describe(p, sys_root, aliases) for p in {path.resolve() for path in found}]
    wanted = (d for d in devices if is_vfio(d) or (include_all and _could_be_vfio(d)))
    return sorted(wanted, key=lambda device: device.name)


def is_vfio(device: HostDevice) -> bool:
    """Whether the device is bound to a VFIO driver."""
    # /sys/class/vfio-dev is of Linux 6.1; before it the names of the drivers have to do.
    return device.bus == "mdev" or "vfio" in device.driver or (device.path / "vfio-dev").exists()


def _could_be_vfio(device: HostDevice) -> bool:
    return bool(device.variant_driver) or (device.path / "physfn").exists()


def device_nodes(device: HostDevice, *, dev_root: Path = DEV) -> list[Path]:
    """Return the nodes that opening the device takes: by cdev, else by its group; else none."""
    if device.cdev:
        return [dev_root / "iommu", dev_root / "vfio/devices" / device.cdev]
    if device.iommu_group and is_vfio(device):
        return [dev_root / "vfio/vfio", dev_root / "vfio" / device.iommu_group]
    return []


def state_in_debugfs(device: HostDevice, *, sys_root: Path = SYS) -> str:
    """Return the state in the kernel's words, or "". Blocks while the driver changes the state."""
    return read_attribute(sys_root / "kernel/debug/vfio" / device.name / "migration/state")


def _locate(name: str, sys_root: Path) -> Path:
    plain = name.lower()
    if address := _PCI.fullmatch(plain.removeprefix("pci/")):
        return _at_address(address["domain"] or "", address["rest"], name, sys_root)
    if _UUID.fullmatch(plain):
        return _existing(sys_root / "bus/mdev/devices" / plain, name, sys_root)
    if cdev := _CDEV.fullmatch(name):
        return _existing(sys_root / "class/vfio-dev" / cdev["cdev"] / "device", name, sys_root)
    if group := _GROUP.fullmatch(name):
        return _in_group(group["group"], group["name"] or "", sys_root)
    if Path(name).is_relative_to(sys_root):
        return _from_sysfs_path(Path(name), sys_root)
    hint = "write 0000:3b:00.2, the UUID of an mdev, /dev/vfio/devices/vfio0 or a path in /sys"
    raise UsageError(f"{name!r} is no name of a device", device=name, hint=hint)


def _existing(path: Path, name: str, sys_root: Path) -> Path:
    if path.exists():
        return path.resolve()
    names = [entry.name for entry in _on_buses(sys_root)]
    similar = ", ".join(difflib.get_close_matches(Path(name).name.lower(), names))
    hint = f"similar: {similar}" if similar else "vfiomig list --all shows them"
    raise NoSuchDeviceError(f"{name}: no such device", device=name, hint=hint)


def _at_address(domain: str, rest: str, name: str, sys_root: Path) -> Path:
    directory = sys_root / "bus/pci/devices"
    matches = [] if domain else sorted(directory.glob(f"*:{rest}"))
    if len(matches) > 1:
        names = ", ".join(match.name for match in matches)
        raise UsageError(f"{name} fits several devices: {names}", hint="add the domain")
    found = matches[0] if matches else directory / f"{domain or '0000'}:{rest}"
    return _existing(found, name, sys_root)


def _in_group(group: str, name: str, sys_root: Path) -> Path:
    if not name:
        raise UsageError(f"/dev/vfio/{group} is a group, not a device", hint="add #0000:3b:00.2")
    path = _locate(name, sys_root)
    if (actual := _group_of(path, sys_root)) != group:
        where = f"in group {actual}" if actual else "in no IOMMU group"
        raise UsageError(f"{name} is {where}, not in {group}", device=name, hint="drop the group")
    return path


def _from_sysfs_path(path: Path, sys_root: Path) -> Path:
    real = _existing(path, str(path), sys_root)
    if real.parent.name == "vfio-dev":  # .../0000:3b:00.2/vfio-dev/vfio0
        real = real.parent.parent
    if not real.is_relative_to(sys_root.resolve()) or not (real / "subsystem").exists():
        raise UsageError(f"{path} is not the directory of a device", device=str(path))
    return real


def _describe(path: Path, sys_root: Path, aliases: list[tuple[str, str]]) -> HostDevice:
    debug = sys_root / "kernel/debug/vfio" / path.name
    facts = HostDevice(
        name=path.name,
        path=path,
        bus=link_name(path / "subsystem"),
        driver=link_name(path / "driver"),
        mdev_type=link_name(path / "mdev_type"),
        vendor_id=read_attribute(path / "vendor").removeprefix("0x"),
        device_id=read_attribute(path / "device").removeprefix("0x"),
        subsystem_vendor_id=read_attribute(path / "subsystem_vendor").removeprefix("0x"),
        subsystem_device_id=read_attribute(path / "subsystem_device").removeprefix("0x"),
        iommu_group=_group_of(path, sys_root),
        cdev=_cdev_of(path),
        features=" ".join(read_attribute(debug / "migration/features").split()),
        variant_driver=_variant_for(read_attribute(path / "modalias"), aliases),
    )
    verdict, reason, hint = _judge(facts, debug)
    return replace(facts, migratable=verdict, reason=reason, hint=hint)


def _judge(device: HostDevice, debug: Path) -> tuple[Verdict, str, str]:
    driver = device.driver
    if not is_vfio(device) or not driver:
        held = f"bound to {driver}, which is no VFIO driver" if driver else "bound to no driver"
        return Verdict.NO, f"it is {held}", _how_to_bind(device)
    # vfio_device_debugfs_init() makes migration/ exactly for devices with migration (Linux 6.8).
    if os.path.isdir(debug / "migration"):
        return Verdict.YES, f"the kernel says that {driver} can migrate it", ""
    needs = VARIANTS.get(_DRIVER_OF.get(_plain(driver), ""))
    if needs is not None and os.path.isdir(debug):
        return Verdict.NO, f"{driver} has migration, but not for this device", needs
    if driver == "mtty":  # samples/vfio-mdev/mtty.c, migration since Linux 6.7
        return Verdict.YES, "mtty, the kernel's sample device, has migration since Linux 6.7", ""
    if needs is not None:
        return Verdict.LIKELY, f"{driver} has migration, if the device offers it", needs
    if _plain(driver) in NOT_MIGRATABLE or os.path.isdir(debug):
        return Verdict.NO, f"the driver {driver} has no migration", _how_to_bind(device)
    return Verdict.UNKNOWN, f"vfiomig does not know {driver}", "vfiomig info --open asks the device"


def _how_to_bind(device: HostDevice) -> str:
    """Return the commands that bind the device to its variant driver, or why there are none."""
    if device.bus != "pci":
        return ""
    if not (variant := device.variant_driver):
        ids = f"{device.vendor_id}:{device.device_id}"
        return f"no driver with migration is installed for {ids}; vfio-pci alone has none"
    directory = f"/sys/bus/pci/devices/{device.name}"
    steps = [f"modprobe {_plain(variant)}", f"echo {variant} > {directory}/driver_override"]
    if device.driver:
        steps.append(f"echo {device.name} > {directory}/driver/unbind")
    return "; ".join([*steps, f"echo {device.name} > /sys/bus/pci/drivers_probe"])


def _variant_aliases(modules_root: Path) -> list[tuple[str, str]]:
    """Return (pattern, module) of the variant drivers that are installed or built in."""
    loadable = re.findall(
        r"alias (vfio_pci:\S+) (\S+)", read_attribute(modules_root / "modules.alias")
    )
    modinfo = read_attribute(modules_root / "modules.builtin.modinfo")
    built_in = re.findall(r"(\w+)\.alias=(vfio_pci:[^\0]+)", modinfo)
    pairs = loadable + [(pattern, module) for module, pattern in built_in]
    return [(pattern, module) for pattern, module in pairs if _plain(module) not in NOT_MIGRATABLE]


def _variant_for(modalias: str, aliases: list[tuple[str, str]]) -> str:
    """Return the driver of the alias that fits most exactly, as its name is registered."""
    wanted = modalias.replace("pci:", "vfio_pci:", 1)
    fitting = [(p.count("*"), module) for p, module in aliases if fnmatchcase(wanted, p)]
    module = min(fitting)[1] if fitting else ""
    return _DRIVER_OF.get(_plain(module), module)


def _cdev_of(path: Path) -> str:
    # Only with CONFIG_VFIO_DEVICE_CDEV is there a number "dev", and so a node (device_cdev.c).
    return next((e.name for e in entries(path / "vfio-dev") if (e / "dev").exists()), "")


def _group_of(path: Path, sys_root: Path) -> str:
    # Not iommu_group/name: group.c writes "vfio-noiommu" there for every mdev too.
    group = link_name(path / "iommu_group")
    return f"noiommu-{group}" if (sys_root / f"class/vfio/noiommu-{group}").exists() else group


def _plain(driver: str) -> str:
    return driver.replace("-", "_")


def _on_buses(sys_root: Path) -> list[Path]:
    return [p for bus in ("pci", "mdev") for p in entries(sys_root / "bus" / bus / "devices")]


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted; nothing where there is none."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def link_name(path: Path) -> str:
    """Return the last part of what a link points to, "" where there is none."""
    return path.resolve().name if path.exists() else ""


def read_attribute(path: Path) -> str:
    """Return what a small text file says, "" where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # the caller shows "", as for a device that just went
        return ""
