"""The test device of driver/: made and removed through sysfs, shaped and spoiled by its settings.

Each is an mdev of its own, so a test makes what it needs and leaves nothing behind.
"""

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vfiomig import ioctl, sysfs
from vfiomig.backends import kernel
from vfiomig.backends.kernel_region import by_protocol
from vfiomig.device import Device
from vfiomig.uapi import DeviceState

PARENT = Path("/sys/class/mdev_bus/vfiomig_test")
DEVICES = Path("/sys/bus/mdev/devices")
KINDS = ("v2", "v1")
# What guest.py loads, for who takes it out and puts it in again.
MODULE = Path("/run/lab/vfiomig_test.ko")


def is_there() -> bool:
    """Whether the module is loaded."""
    return PARENT.exists()


def create(kind: str = "v2", name: str | None = None) -> "MigTest":
    """Make a device. kind: v2 or v1."""
    name = name or str(uuid.uuid4())
    _write(PARENT / f"mdev_supported_types/vfiomig_test-{kind}/create", name)
    return MigTest(name)


@dataclass(frozen=True)
class OpenMigTest:
    """A device that is open. device_fd stays the device's."""

    device: Device
    device_fd: int

    def read_bar(self, offset: int) -> int:
        """Read a register of BAR0: driver/README.md lists them."""
        return int.from_bytes(os.pread(self.device_fd, 8, offset), "little")

    def write_bar(self, offset: int, value: int) -> None:
        """Write a register of BAR0."""
        assert os.pwrite(self.device_fd, value.to_bytes(8, "little"), offset) == 8


@dataclass(frozen=True)
class MigTest:
    """A test device, as sysfs shows it."""

    uuid: str

    @classmethod
    @contextmanager
    def created(
        cls, kind: str = "v2", /, **settings: int | str | Sequence[str]
    ) -> Iterator["MigTest"]:
        """Make a device with such settings for a while.

        settings: by the names of the files, state_bytes=4096. A list, as fault takes it, is written
        one by one: fault=["read 65536 errno 5"].
        """
        device = create(kind)
        try:
            for name, value in settings.items():
                each = [value] if isinstance(value, int | str) else value
                for one in each:
                    device.set(name, one)
            yield device
        finally:
            device.remove()

    @property
    def path(self) -> Path:
        """The folder of its settings."""
        return DEVICES / self.uuid / "test"

    def get(self, name: str) -> str:
        """Return what a setting says."""
        return (self.path / name).read_text().strip()

    def set(self, name: str, value: int | str) -> None:
        """Change a setting. Raises OSError: EBUSY for a shape while the device is open."""
        _write(self.path / name, f"{value}" or "\n")

    def remove(self) -> None:
        """Remove it, if it is still there. Waits until nobody has it open."""
        try:
            _write(DEVICES / self.uuid / "remove", "1")
        except OSError as err:
            # ENODEV: somebody else is removing it.
            if err.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    @property
    def digest(self) -> str:
        """The digest of the state that it holds now, 16 hex digits."""
        return self.get("digest")

    @property
    def held_bytes(self) -> int:
        """The size of the state that it holds now."""
        return int(self.get("held_bytes"))

    @property
    def contents(self) -> tuple[str, int]:
        """Digest and size of the state that it holds now."""
        return self.digest, self.held_bytes

    @property
    def state(self) -> DeviceState:
        """The state it is in, of which the device itself need not be opened."""
        return DeviceState[self.get("state")]

    @property
    def group(self) -> str:
        """The number of its IOMMU group."""
        return sysfs.find(self.uuid).iommu_group

    @contextmanager
    def opened(self) -> Iterator[OpenMigTest]:
        """Open it through vfiomig. Nobody else can, meanwhile."""
        host = sysfs.find(self.uuid)
        ops = kernel.open_ops(host)
        device_fd = ops.fileno()
        spoken = by_protocol(host.name, device_fd, ops)
        with Device(host.name, kernel.identity_of(host), spoken) as device:
            yield OpenMigTest(device, device_fd)

    def recovered(self) -> None:
        """Open it, with no faults and no deviations, and make it RUNNING."""
        self.set("fault", "clear")
        self.set("deviation", "")
        with self.opened() as opened:
            if ioctl.get_device_state(opened.device_fd) is not DeviceState.RUNNING:
                ioctl.reset_device(opened.device_fd)


def _write(file: Path, text: str) -> None:
    """Write into a file of sysfs, in one go: each write is taken for a whole value."""
    # Not by write_text(): what has just gone cannot be created, and that would be EACCES.
    fd = os.open(file, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
