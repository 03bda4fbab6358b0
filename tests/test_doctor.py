"""The doctor against a small host: what is missing is found, and its remedy can be typed."""

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faketree import MLX5_ALIAS, FakeTree, opens_recorded
from vfiomig import doctor
from vfiomig.doctor import Finding, Status
from vfiomig.sysfs import HostDevice, find

VF = "0000:3b:00.2"
RELEASE = "6.12.0"


@pytest.fixture
def tree(tmp_path: Path) -> FakeTree:
    return FakeTree(tmp_path)


@pytest.fixture
def nobody_tree() -> Iterator[FakeTree]:
    """A tree of an unprivileged user, and the test run as that user: to root nothing is refused."""
    with tempfile.TemporaryDirectory() as root:
        euid = os.geteuid()
        if euid == 0:
            os.chown(root, 65534, -1)
            os.seteuid(65534)  # the kernel then drops CAP_DAC_OVERRIDE
        try:
            yield FakeTree(Path(root))
        finally:
            os.seteuid(euid)


def device_of(tree: FakeTree, name: str = VF) -> HostDevice:
    return find(name, sys_root=tree.sys, modules_root=tree.modules)


def examined(
    tree: FakeTree, device: HostDevice | None = None, release: str = RELEASE
) -> dict[str, Finding]:
    findings = doctor.examine(
        device,
        sys_root=tree.sys,
        dev_root=tree.dev,
        proc_root=tree.proc,
        modules_root=tree.modules,
        release=release,
    )
    return {finding.subject.replace(f"{tree.dev}/", ""): finding for finding in findings}


def healthy(tree: FakeTree) -> HostDevice:
    """A host on which a ConnectX virtual function can be opened by its own node."""
    path = tree.pci(VF, "mlx5_vfio_pci", "3")
    tree.vfio_dev(path, "vfio0")
    for node in ("vfio/vfio", "iommu", "vfio/devices/vfio0", "vfio/3"):
        tree.write(tree.dev / node)
    tree.write(tree.sys / "class/iommu/dmar0")
    for module in ("vfio", "vfio_iommu_type1", "iommufd", "vfio_pci"):
        (tree.sys / "module" / module).mkdir(parents=True)
    return device_of(tree)


def test_a_healthy_host_has_no_finding_but_ok(tree: FakeTree) -> None:
    findings = examined(tree, healthy(tree))
    assert {f.status for f in findings.values()} == {Status.OK}
    assert findings.keys() >= {"kernel", "module vfio", "iommu", "IOMMU", f"{VF} group"}


def test_a_bare_host_is_told_what_to_load(tree: FakeTree) -> None:
    findings = examined(tree)
    assert findings["vfio/vfio"].status is Status.FAIL
    assert findings["iommu"] == Finding(
        Status.FAIL,
        str(tree.dev / "iommu"),
        "absent: no device opens by /dev/vfio/devices",
        "modprobe iommufd",
    )


@pytest.mark.parametrize(
    ("release", "status", "said"),
    [
        ("5.10.0-28-amd64", Status.FAIL, "has no migration"),
        ("5.14.0-427.el9.x86_64", Status.WARN, "backported"),
        ("6.1.0", Status.WARN, "PRE_COPY"),
        ("6.2.0", Status.OK, "iommufd"),
        ("6.7.1", Status.OK, "debugfs"),
        ("6.12.117+deb12-amd64", Status.OK, "6.12.117+deb12-amd64"),
        ("10.0", Status.OK, "Linux 10.0"),
        ("unknown", Status.WARN, "no release of Linux"),
    ],
)
def test_the_kernel_is_told_by_its_release(release: str, status: Status, said: str) -> None:
    finding = doctor.check_kernel(release)
    assert finding.status is status
    assert said in finding.text


def test_a_module_is_ok_when_loaded_or_built_in_and_else_has_to_be_loaded(tree: FakeTree) -> None:
    (tree.sys / "module/vfio").mkdir(parents=True)
    tree.write(tree.modules / "modules.builtin", "kernel/drivers/vfio/vfio_iommu_type1.ko\n")
    dependencies = "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n"
    tree.write(tree.modules / "modules.dep", dependencies)
    findings = examined(tree)
    assert findings["module vfio"].status is Status.OK
    assert findings["module vfio_iommu_type1"].status is Status.OK
    assert findings["module vfio_pci"].remedy == "modprobe vfio_pci"
    assert findings["module iommufd"].status is Status.WARN
    assert "CONFIG_IOMMUFD" in findings["module iommufd"].remedy


def test_a_kernel_without_vfio_fails(tree: FakeTree) -> None:
    tree.write(tree.modules / "modules.dep", "kernel/fs/ext4/ext4.ko:\n")
    assert examined(tree)["module vfio"].status is Status.FAIL


def test_one_way_to_a_device_is_enough(tree: FakeTree) -> None:
    tree.write(tree.dev / "vfio/vfio")
    findings = examined(tree)
    assert findings["vfio/vfio"].status is Status.OK
    assert findings["iommu"].status is Status.WARN


def test_iommufd_without_device_nodes_is_noticed(tree: FakeTree) -> None:
    tree.write(tree.dev / "iommu")
    assert "CONFIG_VFIO_DEVICE_CDEV" in examined(tree)["vfio/devices"].text


def test_a_node_one_may_not_write_comes_with_its_udev_rule(nobody_tree: FakeTree) -> None:
    device = healthy(nobody_tree)
    for node in ("vfio/vfio", "iommu", "vfio/devices/vfio0"):
        (nobody_tree.dev / node).chmod(0o400)
    findings = examined(nobody_tree, device)
    assert findings["vfio/devices/vfio0"].status is Status.FAIL
    remedy = findings["vfio/devices/vfio0"].remedy
    assert f'SUBSYSTEM=="vfio-dev", KERNELS=="{VF}", GROUP="vfio", MODE="0660";' in remedy
    assert f"chown {os.geteuid()} {nobody_tree.dev}/vfio/devices/vfio0" in remedy
    assert 'KERNEL=="iommu", SUBSYSTEM=="misc"' in findings["iommu"].remedy
    assert 'KERNEL=="vfio", SUBSYSTEM=="misc"' in findings["vfio/vfio"].remedy


def test_the_rule_for_a_device_without_cdev_is_of_its_group(nobody_tree: FakeTree) -> None:
    nobody_tree.pci(VF, "mlx5_vfio_pci", "3")
    nobody_tree.write(nobody_tree.dev / "vfio/3").chmod(0)
    finding = examined(nobody_tree, device_of(nobody_tree))["vfio/3"]
    assert 'SUBSYSTEM=="vfio", KERNEL=="3", GROUP="vfio"' in finding.remedy


@pytest.mark.parametrize(
    ("cmdline", "remedy"),
    [("quiet", "boot with intel_iommu=on"), ("quiet intel_iommu=off", "remove intel_iommu=off")],
)
def test_a_missing_iommu_comes_with_what_to_change(
    tree: FakeTree, cmdline: str, remedy: str
) -> None:
    tree.write(tree.proc / "cmdline", f"{cmdline}\n")
    finding = examined(tree)["IOMMU"]
    assert finding.status is Status.WARN
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("limit", "status"),
    [(1023, Status.WARN), (1024, Status.OK), (resource.RLIM_INFINITY, Status.OK)],
)
def test_a_low_limit_of_open_files_is_noticed(limit: int, status: Status) -> None:
    assert doctor.check_open_files(limit).status is status


@pytest.mark.parametrize(
    ("scope", "euid", "status"),
    [
        ("", 1000, Status.OK),
        ("0", 1000, Status.OK),
        ("1", 1000, Status.WARN),
        ("1", 0, Status.OK),
        ("2", 0, Status.OK),
        ("3", 0, Status.WARN),
    ],
)
def test_borrowing_by_pid_follows_ptrace_scope(
    tree: FakeTree, scope: str, euid: int, status: Status
) -> None:
    if scope:
        tree.write(tree.proc / "sys/kernel/yama/ptrace_scope", f"{scope}\n")
    assert doctor.check_borrowing(tree.proc, euid).status is status


def test_a_device_on_plain_vfio_pci_fails_with_the_commands_to_bind_it(tree: FakeTree) -> None:
    tree.pci(VF, "vfio-pci", "3")
    tree.aliases(MLX5_ALIAS)
    finding = examined(tree, device_of(tree))[f"{VF} driver"]
    assert finding.status is Status.FAIL
    assert finding.remedy.startswith("modprobe mlx5_vfio_pci; ")


def test_a_group_shared_with_a_host_driver_fails(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_vfio_pci", "3")
    tree.pci("0000:3b:00.3", "mlx5_core", "3")
    finding = examined(tree, device_of(tree))[f"{VF} group"]
    assert finding.status is Status.FAIL
    assert "0000:3b:00.3 (mlx5_core)" in finding.text


def test_a_group_shared_with_bridges_and_vfio_is_well(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_vfio_pci", "3")
    for name, driver in (
        ("0000:3b:00.0", "pcieport"),
        ("0000:3b:00.1", ""),
        ("0000:3b:00.3", "vfio-pci"),
    ):
        tree.pci(name, driver, "3")
    tree.vfio_dev(tree.pci("0000:3b:00.4", "nvidia", "3"), "vfio4")
    assert examined(tree, device_of(tree))[f"{VF} group"].status is Status.OK


def test_a_device_without_group_or_node_cannot_be_opened(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_core")
    findings = examined(tree, device_of(tree))
    assert findings[f"{VF} group"].status is Status.FAIL
    assert findings[f"{VF} node"].status is Status.FAIL


def test_who_holds_the_device_is_named(tree: FakeTree) -> None:
    device = healthy(tree)
    tree.process(1, "init", {0: "/dev/null"})
    tree.process(42, "qemu", {3: "socket:[1]", 17: str(tree.dev / "vfio/devices/vfio0")})
    finding = examined(tree, device)[f"{VF} users"]
    assert finding.status is Status.WARN
    assert finding.text == "held by qemu (pid 42, fd 17)"


def test_a_descriptor_of_the_group_path_is_recognised_by_its_fdinfo(tree: FakeTree) -> None:
    device = healthy(tree)
    path = tree.process(42, "qemu", {9: "anon_inode:[vfio-device]", 10: "anon_inode:[vfio-device]"})
    for number, name in ((9, "0000:3b:00.7"), (10, VF)):
        line = f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:3a/{name}\n"
        tree.write(path / "fdinfo" / str(number), line)
    assert examined(tree, device)[f"{VF} users"].text == "held by qemu (pid 42, fd 10)"


def test_processes_that_may_not_be_looked_into_are_counted(nobody_tree: FakeTree) -> None:
    device = healthy(nobody_tree)
    path = nobody_tree.process(42, "qemu", {})
    (path / "fd").chmod(0)
    finding = examined(nobody_tree, device)[f"{VF} users"]
    (path / "fd").chmod(0o700)
    assert finding.status is Status.OK
    assert "1 processes are hidden" in finding.text


def test_the_doctor_opens_no_device_node(tree: FakeTree) -> None:
    device = healthy(tree)
    with opens_recorded() as opened:
        examined(tree, device)
    assert str(tree.modules / "modules.dep") in opened
    assert [path for path in opened if path.startswith((str(tree.dev), "/dev"))] == []
