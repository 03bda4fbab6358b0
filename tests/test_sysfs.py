"""Discovery against a small sysfs: names, verdicts, nodes."""

from pathlib import Path

import pytest

from faketree import ANY_ALIAS, MLX5_ALIAS, FakeTree, opens_recorded
from vfiomig.errors import NoSuchDeviceError, UsageError
from vfiomig.sysfs import HostDevice, Verdict, device_nodes, find, list_devices, state_in_debugfs

VF = "0000:3b:00.2"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> FakeTree:
    return FakeTree(tmp_path)


def found(tree: FakeTree, name: str) -> HostDevice:
    return find(name, sys_root=tree.sys, modules_root=tree.modules)


def listed(tree: FakeTree, *, include_all: bool = False) -> list[str]:
    devices = list_devices(include_all=include_all, sys_root=tree.sys, modules_root=tree.modules)
    return [device.name for device in devices]


@pytest.mark.parametrize(
    "name",
    [
        VF,
        VF.removeprefix("0000:"),
        VF.upper(),
        f"pci/{VF}",
        "vfio0",
        "/dev/vfio/devices/vfio0",
        f"/dev/vfio/3#{VF}",
        "/dev/vfio/3#3b:00.2",
        "{sys}/bus/pci/devices/0000:3b:00.2",
        "{sys}/devices/pci0000:3a/0000:3b:00.2",
        "{sys}/class/vfio-dev/vfio0",
        "{sys}/class/vfio-dev/vfio0/device",
    ],
)
def test_every_way_to_name_a_pci_device_finds_it(tree: FakeTree, name: str) -> None:
    path = tree.pci(VF, "mlx5_vfio_pci", "3")
    tree.vfio_dev(path, "vfio0")
    device = found(tree, name.replace("{sys}", str(tree.sys)))
    assert (device.name, device.path, device.bus, device.cdev) == (VF, path, "pci", "vfio0")


@pytest.mark.parametrize("name", [UUID, UUID.upper(), "{sys}/bus/mdev/devices/" + UUID])
def test_an_mdev_is_found_by_its_uuid_in_any_case(tree: FakeTree, name: str) -> None:
    tree.mdev(UUID, "mtty", "mtty-2", "mtty")
    device = found(tree, name.replace("{sys}", str(tree.sys)))
    assert (device.name, device.bus, device.mdev_type) == (UUID, "mdev", "mtty-2")
    assert (device.vendor_id, device.device_id) == ("", "")


def test_the_ids_of_a_pci_device_are_read(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_core", "3")
    device = found(tree, VF)
    assert (device.vendor_id, device.device_id) == ("15b3", "101e")
    assert (device.subsystem_vendor_id, device.subsystem_device_id) == ("15b3", "0058")


def test_an_address_without_domain_finds_the_only_device_whatever_its_domain(
    tree: FakeTree,
) -> None:
    tree.pci("10000:3b:00.2")
    assert found(tree, "3b:00.2").name == "10000:3b:00.2"


def test_an_address_that_fits_two_domains_is_refused_with_both_names(tree: FakeTree) -> None:
    tree.pci(VF)
    tree.pci("0001:3b:00.2")
    with pytest.raises(UsageError, match=r"0000:3b:00\.2, 0001:3b:00\.2"):
        found(tree, "3b:00.2")


def test_a_device_named_with_the_wrong_group_is_refused(tree: FakeTree) -> None:
    tree.pci(VF, "vfio-pci", "3")
    with pytest.raises(UsageError, match="in group 3, not in 4"):
        found(tree, f"/dev/vfio/4#{VF}")


def test_a_group_alone_names_no_device(tree: FakeTree) -> None:
    with pytest.raises(UsageError, match="is a group"):
        found(tree, "/dev/vfio/3")


def test_an_unknown_device_is_reported_with_similar_names(tree: FakeTree) -> None:
    tree.pci(VF)
    with pytest.raises(NoSuchDeviceError) as caught:
        found(tree, "0000:3b:00.3")
    assert VF in caught.value.hint


@pytest.mark.parametrize("name", [UUID, "vfio9", "7f:00.0"])
def test_where_nothing_is_similar_the_hint_is_the_list(tree: FakeTree, name: str) -> None:
    with pytest.raises(NoSuchDeviceError) as caught:
        found(tree, name)
    assert "vfiomig list --all" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["", "eth0", "0000:3b:00.9", "0000:3b:40.0", "/etc/passwd", "vfio"]
)
def test_what_is_no_name_is_a_usage_error(tree: FakeTree, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a device"):
        found(tree, name)


@pytest.mark.parametrize(
    "name", ["bus/pci", "../outside", "devices/pci0000:3a/0000:3b:00.2/vendor"]
)
def test_a_path_that_is_no_device_of_sysfs_is_a_usage_error(tree: FakeTree, name: str) -> None:
    tree.pci(VF)
    tree.link(tree.sys.parent / "outside/subsystem", tree.sys / "bus/pci")
    with pytest.raises(UsageError, match="not the directory of a device"):
        found(tree, f"{tree.sys}/{name}")


@pytest.mark.parametrize(
    "driver", ["mlx5_vfio_pci", "mlx5-vfio-pci", "xe-vfio-pci", "qat_vfio_pci"]
)
def test_a_variant_driver_makes_migration_likely_however_it_is_spelt(
    tree: FakeTree, driver: str
) -> None:
    tree.pci(VF, driver, "3")
    device = found(tree, VF)
    assert device.migratable is Verdict.LIKELY
    assert driver in device.reason


def test_plain_vfio_pci_cannot_migrate_and_the_variant_driver_is_named(tree: FakeTree) -> None:
    tree.pci(VF, "vfio-pci", "3")
    tree.aliases(ANY_ALIAS, MLX5_ALIAS)
    device = found(tree, VF)
    assert (device.migratable, device.variant_driver) == (Verdict.NO, "mlx5_vfio_pci")
    assert device.hint == (
        "modprobe mlx5_vfio_pci;"
        f" echo mlx5_vfio_pci > /sys/bus/pci/devices/{VF}/driver_override;"
        f" echo {VF} > /sys/bus/pci/devices/{VF}/driver/unbind;"
        f" echo {VF} > /sys/bus/pci/drivers_probe"
    )


def test_driver_override_gets_the_name_the_driver_registers_not_that_of_its_module(
    tree: FakeTree,
) -> None:
    tree.pci(VF)
    tree.aliases(MLX5_ALIAS.replace("mlx5_vfio_pci", "xe_vfio_pci"))
    assert "modprobe xe_vfio_pci; echo xe-vfio-pci >" in found(tree, VF).hint


def test_a_variant_driver_that_is_built_in_is_found_too(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_core", "3")
    pattern = MLX5_ALIAS.split()[1]
    modinfo = f"ext4.license=GPL\0mlx5_vfio_pci.alias={pattern}\0mlx5_vfio_pci.license=GPL\0"
    tree.write(tree.modules / "modules.builtin.modinfo", modinfo)
    assert found(tree, VF).variant_driver == "mlx5_vfio_pci"


def test_the_most_exact_alias_wins(tree: FakeTree) -> None:
    tree.pci(VF)
    tree.aliases("alias vfio_pci:v000015B3d*sv*sd*bc*sc*i* other_vfio_pci", MLX5_ALIAS)
    assert found(tree, VF).variant_driver == "mlx5_vfio_pci"


def test_the_variant_driver_of_another_device_is_not_proposed(tree: FakeTree) -> None:
    tree.pci(VF)
    tree.aliases(MLX5_ALIAS.replace("101E", "101F"))
    assert found(tree, VF).variant_driver == ""


def test_a_variant_driver_without_migration_is_not_proposed(tree: FakeTree) -> None:
    tree.pci(VF, "vfio-pci", "3")
    tree.aliases(ANY_ALIAS, MLX5_ALIAS.replace("mlx5_vfio_pci", "nvgrace_gpu_vfio_pci"))
    device = found(tree, VF)
    assert device.variant_driver == ""
    assert "no driver with migration is installed for 15b3:101e" in device.hint


def test_a_device_bound_to_its_host_driver_says_who_holds_it(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_core", "3")
    device = found(tree, VF)
    assert device.migratable is Verdict.NO
    assert "mlx5_core, which is no VFIO driver" in device.reason
    assert device_nodes(device) == []


@pytest.mark.parametrize(
    ("driver", "verdict"),
    [
        ("mtty", Verdict.YES),
        ("mdpy", Verdict.NO),
        ("mbochs", Verdict.NO),
        ("vfio_ap_mdev", Verdict.NO),
        ("nvidia-vgpu", Verdict.UNKNOWN),
    ],
)
def test_an_mdev_is_judged_by_its_driver(tree: FakeTree, driver: str, verdict: Verdict) -> None:
    tree.mdev(UUID, "parent", "parent-1", driver)
    assert found(tree, UUID).migratable is verdict


def test_debugfs_is_believed_before_the_table_of_drivers(tree: FakeTree) -> None:
    path = tree.pci(VF, "nvidia", "3")
    tree.vfio_dev(path, "vfio0")
    tree.debugfs(VF, "RUNNING", "stop-copy p2p")
    device = found(tree, VF)
    assert (device.migratable, device.features) == (Verdict.YES, "stop-copy p2p")
    assert state_in_debugfs(device, sys_root=tree.sys) == "RUNNING"


def test_a_variant_driver_that_debugfs_shows_without_migration_cannot(tree: FakeTree) -> None:
    tree.pci(VF, "mlx5_vfio_pci", "3")
    tree.debugfs(VF)
    device = found(tree, VF)
    assert device.migratable is Verdict.NO
    assert "migratable enable" in device.hint
    assert state_in_debugfs(device, sys_root=tree.sys) == ""


def test_a_device_with_a_cdev_opens_by_iommufd(tree: FakeTree) -> None:
    tree.vfio_dev(tree.pci(VF, "mlx5_vfio_pci", "3"), "vfio0")
    nodes = device_nodes(found(tree, VF), dev_root=Path("/dev"))
    assert nodes == [Path("/dev/iommu"), Path("/dev/vfio/devices/vfio0")]


def test_without_a_device_number_there_is_no_cdev_and_the_group_opens_it(tree: FakeTree) -> None:
    tree.vfio_dev(tree.pci(VF, "mlx5_vfio_pci", "3"), "vfio0", node=False)
    device = found(tree, "vfio0")
    assert device.cdev == ""
    assert device_nodes(device) == [Path("/dev/vfio/vfio"), Path("/dev/vfio/3")]


def test_the_group_of_a_device_without_iommu_has_its_prefix(tree: FakeTree) -> None:
    tree.pci(VF, "vfio-pci", "0")
    tree.link(tree.sys / "class/vfio/noiommu-0", tree.sys / "devices/virtual/vfio/noiommu-0")
    assert found(tree, f"/dev/vfio/noiommu-0#{VF}").iommu_group == "noiommu-0"


def test_the_group_of_an_mdev_has_no_prefix_whatever_the_group_calls_itself(tree: FakeTree) -> None:
    tree.mdev(UUID, "mtty", "mtty-2", "mtty", group="7")
    assert found(tree, UUID).iommu_group == "7"


def test_the_list_holds_what_is_bound_to_vfio_once_each(tree: FakeTree) -> None:
    tree.vfio_dev(tree.pci(VF, "mlx5_vfio_pci", "3"), "vfio0")
    tree.pci("0000:3b:00.3", "vfio-pci", "4")
    tree.pci("0000:3b:00.4", "mlx5_core", "5", vf=True)
    tree.mdev(UUID, "mtty", "mtty-2", "mtty")
    assert listed(tree) == [VF, "0000:3b:00.3", UUID]


def test_the_list_finds_a_device_of_another_bus_by_its_class(tree: FakeTree) -> None:
    path = tree.sys / "devices/platform/fff51000.ethernet"
    tree.link(path / "subsystem", tree.sys / "bus/platform")
    tree.link(path / "driver", tree.sys / "bus/platform/drivers/vfio-platform")
    tree.vfio_dev(path, "vfio1")
    assert listed(tree) == ["fff51000.ethernet"]


def test_the_whole_list_adds_virtual_functions_and_what_has_a_variant_driver(
    tree: FakeTree,
) -> None:
    tree.pci("0000:3b:00.4", "mlx5_core", "5", vf=True)
    other = tree.pci("0000:3b:00.5", "mlx5_core", "6")
    assert listed(tree, include_all=True) == ["0000:3b:00.4"]
    tree.aliases(MLX5_ALIAS)
    assert listed(tree, include_all=True) == ["0000:3b:00.4", other.name]
    assert listed(tree) == []


def test_a_host_without_vfio_has_an_empty_list(tree: FakeTree) -> None:
    assert listed(tree, include_all=True) == []


def test_discovery_opens_no_device_node(tree: FakeTree) -> None:
    tree.vfio_dev(tree.pci(VF, "mlx5_vfio_pci", "3"), "vfio0")
    with opens_recorded() as opened:
        assert listed(tree) == [VF]
        device = found(tree, "/dev/vfio/devices/vfio0")
    assert str(device.path / "vendor") in opened
    assert [path for path in opened if path.startswith("/dev")] == []
