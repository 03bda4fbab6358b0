"""The kernel backend on real descriptors; only functions of ioctl.py are replaced."""

import ctypes
import errno
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import isfunction
from pathlib import Path

import pytest

from faketree import FakeTree
from vfiomig import errors, ioctl, sysfs
from vfiomig.backends import kernel
from vfiomig.device import Device
from vfiomig.identity import Identity
from vfiomig.sysfs import HostDevice
from vfiomig.uapi import DeviceState

NAME = "0000:3b:00.2"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


class FakeKernel:
    """Answers in place of ioctl.py, and keeps what it was asked and of which files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tree, self.asked = FakeTree(root), list[str]()
        self.errors: dict[str, int] = {}
        self.answers: dict[str, object] = {"get_group_status": 1, "get_migration_flags": 7}
        for call, function in vars(ioctl).copy().items():
            if isfunction(function):
                monkeypatch.setattr(ioctl, call, self._function(call))
        self.device = self.tree.pci(NAME, driver="mlx5_vfio_pci", group="12")
        for node in ("vfio/vfio", "vfio/12", "device"):
            self.tree.write(self.tree.dev / node)

    def _function(self, call: str) -> Callable[..., object]:
        def answer(fd: int, *arguments: object) -> object:
            target = Path(os.readlink(f"/proc/self/fd/{fd}"))
            words = [name_of(one) if call in OF_TWO_FILES else str(one) for one in arguments]
            self.asked.append(" ".join([call, target.name, *words]))
            if call == "set_device_state":  # the kernel moves the device before it makes the fd
                self.answers["get_device_state"] = arguments[0]
            if code := self.errors.get(call):
                raise OSError(code, os.strerror(code))
            if call == "get_device_fd":
                return os.open(self.tree.dev / "device", os.O_RDWR)
            return self.answers.get(call, 0)

        return answer

    def add_cdev(self) -> None:
        self.tree.vfio_dev(self.device, "vfio0")
        for node in ("iommu", "vfio/devices/vfio0"):
            self.tree.write(self.tree.dev / node)

    def host(self) -> HostDevice:
        return sysfs.find(NAME, sys_root=self.tree.sys, modules_root=self.tree.modules)

    def open(self) -> kernel.KernelOps:
        return kernel.open_ops(self.host(), dev_root=self.tree.dev)


OF_TWO_FILES = ("bind_iommufd", "set_container")
BY_CDEV = ["bind_iommufd vfio0 iommu"]
BY_GROUP = [
    "get_api_version vfio",
    "get_group_status 12",
    "set_container 12 vfio",
    "set_iommu vfio 3",
    f"get_device_fd 12 {NAME}",
]


def name_of(fd: object) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(tmp_path, monkeypatch)


def test_a_cdev_is_bound_to_an_iommufd(fake: FakeKernel) -> None:
    fake.add_cdev()
    ops = fake.open()
    assert fake.asked == BY_CDEV
    assert name_of(ops.fileno()) == "vfio0"
    ops.close()
    assert ops.fileno() == -1


def test_a_group_gives_its_device(fake: FakeKernel) -> None:
    ops = fake.open()
    assert fake.asked == BY_GROUP
    assert name_of(ops.fileno()) == "device"
    ops.close()


@pytest.mark.parametrize("missing", ["iommu", "vfio/devices/vfio0"])
def test_without_both_nodes_of_the_cdev_the_group_is_used(fake: FakeKernel, missing: str) -> None:
    fake.add_cdev()
    (fake.tree.dev / missing).unlink()
    fake.open().close()
    assert fake.asked == BY_GROUP


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP])
def test_a_device_that_iommufd_does_not_take_is_opened_by_its_group(
    fake: FakeKernel, code: int
) -> None:
    fake.add_cdev()
    fake.errors["bind_iommufd"] = code
    fake.open().close()
    assert fake.asked == BY_CDEV + BY_GROUP


@pytest.mark.parametrize(
    ("code", "kind", "hint"),
    [
        (errno.EINVAL, errors.DeviceBusyError, "pid:PID/fd:N"),
        (errno.EBUSY, errors.DeviceBusyError, "its group is open"),
        (errno.EPERM, errors.AccessError, "bind every device"),
        (errno.ENODEV, errors.NoSuchDeviceError, ""),
        (errno.EMFILE, errors.ResourceLimitError, ""),
        (errno.EBADFD, errors.DeviceIOError, ""),
    ],
)
def test_a_refused_bind_says_what_to_do(
    fake: FakeKernel, code: int, kind: type[errors.MigrationError], hint: str
) -> None:
    fake.add_cdev()
    (fake.tree.dev / "vfio/12").unlink()
    fake.errors["bind_iommufd"] = code
    with pytest.raises(kind, match=f"{NAME}: VFIO_DEVICE_BIND_IOMMUFD: ") as caught:
        fake.open()
    assert (caught.value.device, caught.value.errno) == (NAME, code)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("call", "code", "kind", "hint"),
    [
        ("get_api_version", errno.ENOTTY, errors.DeviceIOError, ""),
        ("get_group_status", errno.EIO, errors.DeviceIOError, ""),
        ("set_container", errno.EPERM, errors.AccessError, "iommu_groups/12/devices"),
        ("set_container", errno.EBUSY, errors.DeviceBusyError, "iommu_groups/12/devices"),
        ("set_iommu", errno.ENODEV, errors.NoSuchDeviceError, "modprobe -a vfio vfio_iommu"),
        ("get_device_fd", errno.ENODEV, errors.NoSuchDeviceError, "bind it to a VFIO driver"),
        ("get_device_fd", errno.EINVAL, errors.DeviceIOError, "dmesg"),
    ],
)
def test_a_refused_step_of_the_group_says_what_to_do(
    fake: FakeKernel, call: str, code: int, kind: type[errors.MigrationError], hint: str
) -> None:
    fake.errors[call] = code
    with pytest.raises(kind, match=NAME) as caught:
        fake.open()
    assert (caught.value.device, caught.value.errno) == (NAME, code)
    assert caught.value.phase.startswith("VFIO_")
    assert hint in caught.value.hint


def test_a_group_with_a_host_driver_and_an_unknown_api_are_refused(fake: FakeKernel) -> None:
    fake.answers["get_group_status"] = 0
    with pytest.raises(errors.DeviceBusyError, match="group 12 is not viable"):
        fake.open()
    fake.answers["get_api_version"] = 1
    with pytest.raises(errors.DeviceIOError, match="API version 1"):
        fake.open()


@pytest.mark.parametrize(
    ("missing", "hint"), [("vfio/vfio", "modprobe -a vfio"), ("vfio/12", "bind the device")]
)
def test_a_missing_node_says_what_makes_it(fake: FakeKernel, missing: str, hint: str) -> None:
    (fake.tree.dev / missing).unlink()
    with pytest.raises(errors.NoSuchDeviceError, match=missing) as caught:
        fake.open()
    assert hint in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's rights")
@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("vfio/12", 'chown 65534 {}; to last, a udev rule: SUBSYSTEM=="vfio", KERNEL=="12"'),
        ("vfio/vfio", "chmod 0666 {}"),
        ("vfio/devices/vfio0", 'SUBSYSTEM=="vfio-dev", KERNEL=="vfio0"'),
        ("iommu", 'SUBSYSTEM=="misc", KERNEL=="iommu"'),
    ],
)
def test_without_rights_the_hint_is_the_remedy(
    node: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        fake = FakeKernel(Path(root), monkeypatch)
        if node in ("iommu", "vfio/devices/vfio0"):
            fake.add_cdev()
        for path in fake.tree.dev.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o666)
        (fake.tree.dev / node).chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(errors.AccessError) as caught:
                fake.open()
        finally:
            os.seteuid(0)
    assert (caught.value.code, caught.value.errno) == (4, errno.EACCES)
    assert words.format(fake.tree.dev / node) in caught.value.hint
    assert fake.asked == []


@pytest.mark.parametrize(
    ("group", "kind"), [("", errors.NoSuchDeviceError), ("noiommu-0", errors.NotMigratableError)]
)
def test_a_device_without_an_iommu_is_refused(
    fake: FakeKernel, group: str, kind: type[errors.MigrationError]
) -> None:
    with pytest.raises(kind) as caught:
        kernel.open_ops(replace(fake.host(), iommu_group=group), dev_root=fake.tree.dev)
    assert "IOMMU" in caught.value.hint


def closing_order(paths: list[Path], close: Callable[[], None]) -> list[str]:
    """Return the names of the files in the order in which close() closed them: by inotify."""
    libc = ctypes.CDLL(None)
    watch_fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    close_write = 0x8  # IN_CLOSE_WRITE, include/uapi/linux/inotify.h
    names = {libc.inotify_add_watch(watch_fd, bytes(p), close_write): p.name for p in paths}
    close()
    with os.fdopen(watch_fd, "rb") as watch:
        return [names[event[0]] for event in struct.iter_unpack("=iIII", watch.read())]


@pytest.mark.parametrize("cdev", [True, False])
def test_the_device_is_closed_before_what_it_hangs_on(fake: FakeKernel, *, cdev: bool) -> None:
    if cdev:
        fake.add_cdev()
    nodes = ["vfio/devices/vfio0", "iommu"] if cdev else ["device", "vfio/12", "vfio/vfio"]
    paths = [fake.tree.dev / node for node in nodes]
    assert closing_order(paths, fake.open().close) == [path.name for path in paths]


def test_no_child_inherits_a_descriptor(fake: FakeKernel) -> None:
    with kernel.open_kernel(fake.host(), dev_root=fake.tree.dev):
        child = ["ls", "-l", "/proc/self/fd"]
        seen = subprocess.run(child, close_fds=False, capture_output=True, text=True, check=True)
    assert str(fake.tree.dev) not in seen.stdout


def test_the_device_is_named_and_identified(fake: FakeKernel) -> None:
    with kernel.open_kernel(fake.host(), dev_root=fake.tree.dev) as opened:
        assert opened.name == NAME
        assert opened.identity == Identity("mlx5_vfio_pci", "", "15b3", "101e", "15b3", "0058")


def test_a_device_without_migration_is_closed_again(fake: FakeKernel) -> None:
    fake.errors["get_migration_flags"] = errno.ENOTTY
    fake.answers["get_device_info"] = (0, 9, 5)
    with pytest.raises(errors.NotMigratableError):
        kernel.open_kernel(fake.host(), dev_root=fake.tree.dev)


def test_a_device_whose_regions_cannot_be_asked_for_is_closed_again(fake: FakeKernel) -> None:
    fake.errors["get_migration_flags"] = errno.ENOTTY
    fake.errors["get_device_info"] = errno.EIO
    with pytest.raises(errors.DeviceIOError, match="looking for a migration region"):
        kernel.open_kernel(fake.host(), dev_root=fake.tree.dev)


def test_a_set_that_lost_its_data_fd_tells_the_state_it_reached(fake: FakeKernel) -> None:
    fake.answers["get_device_state"] = DeviceState.STOP
    with Device(NAME, kernel.identity_of(fake.host()), fake.open()) as opened:
        fake.errors["set_device_state"] = errno.EMFILE
        with pytest.raises(errors.DeviceStateError) as caught:
            opened.set_state(DeviceState.STOP_COPY)
    assert (caught.value.errno, caught.value.actual) == (errno.EMFILE, DeviceState.STOP_COPY)


def test_a_session_is_a_channel_of_the_data_fd(fake: FakeKernel) -> None:
    ops = fake.open()
    fake.answers["set_device_state"] = -1
    assert ops.set_device_state(DeviceState.STOP) is None
    data_fd = fake.answers["set_device_state"] = os.memfd_create("data_fd")
    channel = ops.set_device_state(DeviceState.STOP_COPY)
    assert channel is not None
    assert channel.fileno() == data_fd
    channel.close()
    ops.close()


def test_other_files_are_refused_before_any_ioctl_and_closed(fake: FakeKernel) -> None:
    for fd in (os.memfd_create("device"), os.open("/dev/null", os.O_RDWR), os.eventfd(0)):
        with pytest.raises(errors.NoSuchDeviceError, match="is no VFIO device"):
            kernel.device_from_fd(fd, f"fd:{fd}")
    assert fake.asked == []
