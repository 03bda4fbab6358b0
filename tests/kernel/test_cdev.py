"""A device by its own node and an iommufd, where the kernel has them (lab.py run --kernel cdev)."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.command import run, start
from kernel.mtty import SOURCE, Mtty, state_bytes
from kernel.streams import loaded, state_in
from vfiomig import (
    DeviceBusyError,
    DeviceState,
    PreCopyLimits,
    SaveOptions,
    load,
    open_device,
    save,
    sysfs,
)
from vfiomig.backends import borrow
from vfiomig.fd import OwnedFd


@pytest.fixture(autouse=True)
def needs_cdev(lab: list[Mtty]) -> None:
    if os.path.exists("/dev/iommu") and sysfs.find(lab[0].uuid).cdev:
        return
    reason = "this kernel has no /dev/vfio/devices with /dev/iommu: lab.py run --kernel cdev"
    if os.environ.get("VFIOMIG_REQUIRE_CDEV") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def node(mtty: Mtty) -> str:
    return f"/dev/vfio/devices/{sysfs.find(mtty.uuid).cdev}"


def vfio_files(pid: int | str = "self") -> list[str]:
    files = f"/proc/{pid}/fd"
    # The descriptor of the listing itself has gone by then.
    links = [
        os.readlink(f"{files}/{fd}") for fd in os.listdir(files) if os.path.exists(f"{files}/{fd}")
    ]
    return sorted(link for link in links if re.match(r"/dev/(vfio|iommu)|anon_inode:\[vfio", link))


NAMES: list[Callable[[Mtty], str]] = [
    lambda mtty: mtty.uuid,
    node,
    lambda mtty: sysfs.find(mtty.uuid).cdev,
]


@pytest.mark.parametrize("name", NAMES, ids=["uuid", "node", "vfioN"])
def test_whatever_its_name_it_is_opened_by_its_node_and_an_iommufd(
    source: Mtty, name: Callable[[Mtty], str]
) -> None:
    with open_device(name(source)) as device:
        assert vfio_files() == ["/dev/iommu", node(source)]
        assert (device.name, device.state()) == (source.uuid, DeviceState.RUNNING)
    assert vfio_files() == []


def test_it_saves_and_loads(source: Mtty, destination: Mtty, tmp_path: Path) -> None:
    file = tmp_path / "state"
    with open_device(node(source)) as device:
        save(device, file, SaveOptions(pre_copy=PreCopyLimits()))
    assert state_in(file.read_bytes()) == state_bytes(SOURCE)
    with open_device(node(destination)) as device:
        load(file, device)
    assert destination.is_untouched(SOURCE)


def test_the_command_takes_the_node(source: Mtty, destination: Mtty, tmp_path: Path) -> None:
    file = str(tmp_path / "state")
    assert run("save", node(source), file).code == 0
    assert run("load", file, node(destination)).code == 0
    assert destination.is_untouched(SOURCE)


def hide_iommufd(patch: pytest.MonkeyPatch) -> None:
    exists = os.path.exists
    patch.setattr(os.path, "exists", lambda path: str(path) != "/dev/iommu" and exists(path))


def test_without_an_iommufd_its_group_opens_it(
    source: Mtty, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hide_iommufd(patch)
        with source.opened() as mtty:
            group = f"/dev/vfio/{source.group}"
            assert vfio_files() == [group, "/dev/vfio/vfio", "anon_inode:[vfio-device]"]
            assert mtty.device.state() is DeviceState.RUNNING


def test_a_stream_of_a_node_loads_by_a_group(
    stream: bytes, destination: Mtty, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hide_iommufd(patch)
        loaded(stream, destination)
    assert destination.is_untouched(SOURCE)


def test_its_group_is_busy_while_its_node_is_bound(source: Mtty) -> None:
    with source.opened() as mtty:
        with pytest.raises(OSError, match="busy"):
            os.open(f"/dev/vfio/{source.group}", os.O_RDWR)
        with pytest.raises(DeviceBusyError) as caught:
            open_device(node(source))
        assert caught.value.code == 5
        assert mtty.device.state() is DeviceState.RUNNING


def test_the_hint_for_a_busy_device_names_the_node_that_is_open(source: Mtty) -> None:
    with source.opened(), pytest.raises(DeviceBusyError) as caught:
        open_device(node(source))
    assert f"fuser -v {node(source)} " in caught.value.hint


def test_its_node_is_busy_while_its_group_is_open(source: Mtty) -> None:
    with OwnedFd(os.open(f"/dev/vfio/{source.group}", os.O_RDWR | os.O_CLOEXEC)):
        done = run("state", source.uuid)
    assert done.code == 5
    assert "its group is open" in done.err


def test_a_bound_node_is_borrowed(source: Mtty) -> None:
    with source.opened() as mtty:
        with borrow(f"fd:{mtty.device_fd}") as device:
            read_fd, write_fd = os.pipe()
            with OwnedFd(read_fd), OwnedFd(write_fd):
                save(device, write_fd)
                assert state_in(os.read(read_fd, 1 << 20)) == state_bytes(SOURCE)
        assert mtty.device.state() is DeviceState.RUNNING


def test_a_node_that_is_not_bound_is_not_borrowed(source: Mtty) -> None:
    with (
        OwnedFd(os.open(node(source), os.O_RDWR | os.O_CLOEXEC)) as unbound,
        pytest.raises(DeviceBusyError, match="has not bound this descriptor"),
    ):
        borrow(f"fd:{unbound.fileno()}")


def test_hold_lends_a_node(source: Mtty, destination: Mtty, tmp_path: Path) -> None:
    socket = tmp_path / "x.sock"
    with start("hold", node(source), "--socket", str(socket), "-v") as holding:
        holding.wait_for_talk("holding")
        assert vfio_files(holding.pid) == ["/dev/iommu", node(source)]
        done = run("save", f"unix:{socket}", str(tmp_path / "state"))
        assert done.code == 0
    assert run("load", str(tmp_path / "state"), destination.uuid).code == 0
    assert destination.is_untouched(SOURCE)


def test_list_shows_the_nodes(lab: list[Mtty]) -> None:
    done = run("list", "--json")
    cdevs = {device["name"]: device["cdev"] for device in done.records[0]["devices"]}
    for device in lab:
        assert Path("/dev/vfio/devices", cdevs[device.uuid]).is_char_device()


def test_debugfs_and_the_device_tell_the_same_state(source: Mtty) -> None:
    with source.opened() as mtty:
        for state in (DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.RUNNING):
            mtty.device.set_state(state)
            told = sysfs.state_in_debugfs(sysfs.find(source.uuid))
            if not told:
                pytest.skip("this kernel has no state in debugfs")
            assert told == state.name
    assert source.is_untouched(SOURCE)
