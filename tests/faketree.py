"""A small /sys, /dev, /proc and /lib/modules in a directory, laid out as Linux 6.12 does."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The device modalias and the line in modules.alias of a ConnectX virtual function (mlx5, 101e).
MLX5_MODALIAS = "pci:v000015B3d0000101Esv000015B3sd00000058bc02sc00i00"
MLX5_ALIAS = "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci"
ANY_ALIAS = "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci"


@contextmanager
def opens_recorded() -> Iterator[list[str]]:
    """Give the list of the paths that this process opens in the with block."""
    opened: list[str] = []
    recording = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if recording and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)  # it cannot be removed: it only stops recording
    try:
        yield opened
    finally:
        recording = False


class FakeTree:
    """Builds devices below root; sys, dev, proc and modules are the roots to hand in."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev, self.proc = root / "sys", root / "dev", root / "proc"
        self.modules = root / "modules"
        for directory in (self.sys, self.dev, self.proc, self.modules):
            directory.mkdir()

    def write(self, path: Path, text: str = "") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def link(self, path: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def aliases(self, *lines: str) -> None:
        self.write(self.modules / "modules.alias", "\n".join(lines) + "\n")

    def pci(self, name: str, driver: str = "", group: str = "", *, vf: bool = False) -> Path:
        path = self.sys / "devices/pci0000:3a" / name
        path.mkdir(parents=True)
        self.link(self.sys / "bus/pci/devices" / name, path)
        self.link(path / "subsystem", self.sys / "bus/pci")
        for attribute, text in (
            ("vendor", "0x15b3"),
            ("device", "0x101e"),
            ("subsystem_vendor", "0x15b3"),
            ("subsystem_device", "0x0058"),
            ("modalias", MLX5_MODALIAS),
        ):
            self.write(path / attribute, text + "\n")
        if vf:
            self.link(path / "physfn", self.sys / "devices/pci0000:3a/0000:3b:00.0")
        self._bind(path, "pci", driver, group)
        return path

    def mdev(self, uuid: str, parent: str, kind: str, driver: str, group: str = "7") -> Path:
        path = self.sys / "devices/virtual" / parent / parent / uuid
        path.mkdir(parents=True)
        self.link(self.sys / "bus/mdev/devices" / uuid, path)
        self.link(path / "subsystem", self.sys / "bus/mdev")
        self.link(path / "mdev_type", path.parent / "mdev_supported_types" / kind)
        self._bind(path, "mdev", driver, group)
        # group.c names the group of every mdev so, though its node is /dev/vfio/7.
        self.write(self.sys / "kernel/iommu_groups" / group / "name", "vfio-noiommu\n")
        self.link(self.sys / "class/vfio" / group, self.sys / "devices/virtual/vfio" / group)
        return path

    def vfio_dev(self, path: Path, name: str, *, node: bool = True) -> None:
        """Show the device in /sys/class/vfio-dev; node: with CONFIG_VFIO_DEVICE_CDEV."""
        self.link(path / "vfio-dev" / name / "device", path)
        self.link(self.sys / "class/vfio-dev" / name, path / "vfio-dev" / name)
        if node:
            self.write(path / "vfio-dev" / name / "dev", "510:0\n")

    def debugfs(self, name: str, state: str = "", features: str = "") -> None:
        directory = self.sys / "kernel/debug/vfio" / name
        directory.mkdir(parents=True)
        if state:
            self.write(directory / "migration/state", f"{state}\n")
            self.write(directory / "migration/features", features.replace(" ", "\n") + "\n")

    def process(self, pid: int, comm: str, descriptors: dict[int, str]) -> Path:
        path = self.proc / str(pid)
        (path / "fd").mkdir(parents=True)
        self.write(path / "comm", f"{comm}\n")
        for number, target in descriptors.items():
            os.symlink(target, path / "fd" / str(number))
        return path

    def _bind(self, path: Path, bus: str, driver: str, group: str) -> None:
        if driver:
            self.link(path / "driver", self.sys / "bus" / bus / "drivers" / driver)
        if group:
            directory = self.sys / "kernel/iommu_groups" / group
            self.link(path / "iommu_group", directory)
            self.link(directory / "devices" / path.name, path)
