"""list, info and doctor on a live device, and who is refused: by the command itself."""

import os
from pathlib import Path

import pytest

from kernel.command import NOBODY, installed, run
from kernel.mtty import Mtty
from vfiomig import AccessError, DeviceBusyError, NoSuchDeviceError, open_device, sysfs
from vfiomig.sysfs import device_nodes

UNKNOWN = "5a5a0000-0000-4000-8000-0000000000ff"


@pytest.fixture
def bare_pci_device() -> str:
    """A PCI device of the guest without a VFIO driver."""
    names = os.listdir("/sys/bus/pci/devices")
    if not names:
        pytest.skip("this machine has no PCI device")
    return sorted(names)[0]


def test_list_shows_every_device_of_the_lab(lab: list[Mtty]) -> None:
    done = installed("list")
    assert done.code == 0
    head, *rows = done.text.splitlines()
    assert head.split() == ["DEVICE", "CDEV", "GROUP", "DRIVER", "MIGRATABLE", "WHY"]
    assert {(row.split()[0], *row.split()[3:6]) for row in rows} >= {
        (device.uuid, "mtty", device.kind, "yes") for device in lab
    }


def test_list_says_the_same_in_json(lab: list[Mtty]) -> None:
    done = installed("list", "--json")
    assert done.code == 0
    (record,) = done.records
    assert (record["type"], record["command"]) == ("result", "list")
    found = {
        (device["name"], device["mdev_type"], device["bus"], device["migratable"])
        for device in record["devices"]
    }
    assert found >= {(device.uuid, device.kind, "mdev", "yes") for device in lab}


def test_list_and_info_open_no_device(source: Mtty) -> None:
    with source.opened() as mtty:
        assert installed("list").code == 0
        assert installed("info", source.uuid).code == 0
        # That a device which is open cannot be opened again is what makes this a proof.
        done = run("info", source.uuid, "--open")
        assert done.code == 5
        assert "borrow it" in done.err
        mtty.device.state()


def test_whoever_may_not_open_a_device_may_list_it(source: Mtty) -> None:
    done = run("list", "--json", uid=NOBODY)
    assert done.code == 0
    assert source.uuid in [device["name"] for device in done.records[0]["devices"]]
    assert run("info", source.uuid, uid=NOBODY).code == 0


def test_info_names_the_nodes_and_the_verdict(source: Mtty) -> None:
    done = run("info", source.uuid)
    rows = dict(line.split(maxsplit=1) for line in done.text.splitlines())
    assert (rows["device"], rows["driver"]) == (source.uuid, "mtty mtty-2")
    nodes = [str(node) for node in device_nodes(sysfs.find(source.uuid))]
    assert rows["nodes"] == ", ".join(nodes)
    assert rows["migratable"].startswith("yes: ")
    assert "state" not in rows


def test_info_that_opens_shows_what_the_device_says(source: Mtty) -> None:
    done = run("info", source.uuid, "--open", "--json")
    (told,) = done.of_type("result")
    assert done.code == 0
    assert told["capabilities"] == ["STOP_COPY", "P2P", "PRE_COPY"]
    assert (told["protocol"], told["state"], told["stop_copy_length"]) == ("v2", "RUNNING", 96)
    assert "reset" in done.of_type("warning")[0]["text"]


@pytest.mark.parametrize("form", ["/sys/bus/mdev/devices/{}", "/dev/vfio/{group}#{}"])
def test_a_device_has_several_names(source: Mtty, form: str) -> None:
    with open_device(form.format(source.uuid, group=source.group)) as device:
        assert device.name == source.uuid


def test_doctor_finds_nothing_that_prevents_a_migration(source: Mtty) -> None:
    done = run("doctor", source.uuid, "--json")
    assert done.code == 0
    findings = {found["subject"]: found for found in done.records[0]["findings"]}
    assert findings[f"{source.uuid} driver"]["status"] == "ok"
    assert findings[f"{source.uuid} group"]["status"] == "ok"
    assert findings[f"{source.uuid} users"]["text"] == "none"


def test_doctor_names_the_process_that_holds_a_device(source: Mtty) -> None:
    with source.opened():
        done = run("doctor", source.uuid)
    assert f"(pid {os.getpid()}, fd " in done.text


def test_doctor_tells_a_user_without_rights_what_to_do(source: Mtty) -> None:
    done = run("doctor", source.uuid, uid=NOBODY)
    assert done.code == 3
    node = device_nodes(sysfs.find(source.uuid))[-1]
    assert f"fail  {node}: you may not read and write it" in done.text
    assert f"chown {NOBODY} {node}" in done.text


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(NoSuchDeviceError, match=f"{UNKNOWN}: no such device"):
        open_device(UNKNOWN)
    done = run("info", UNKNOWN)
    assert done.code == 5
    assert "similar: 5a5a0000-0000-4000-8000-00000000000" in done.err


@pytest.mark.parametrize("command", [["save", "{}", "-"], ["state", "{}"], ["reset", "{}"]])
def test_a_device_that_somebody_holds_is_busy(source: Mtty, command: list[str]) -> None:
    with source.opened() as mtty:
        done = run(*(word.format(source.uuid) for word in command))
        assert mtty.device.state().name == "RUNNING"
    assert (done.code, done.out) == (5, b"")
    assert "borrow it from the process that runs it" in done.err


def test_a_device_that_is_open_here_is_busy(source: Mtty) -> None:
    with source.opened(), pytest.raises(DeviceBusyError) as caught:
        open_device(source.uuid)
    assert (caught.value.code, caught.value.device) == (5, source.uuid)


def test_a_user_without_rights_is_told_what_to_do_and_that_it_helps(source: Mtty) -> None:
    changed: list[Path] = []
    try:
        while (done := run("info", source.uuid, "--open", uid=NOBODY)).code != 0:
            assert done.code == 4, done.err
            node = Path(done.err.partition("chown 65534 ")[2].partition(";")[0])
            assert node not in changed
            assert node in device_nodes(sysfs.find(source.uuid))
            os.chown(node, NOBODY, 0)
            changed.append(node)
    finally:
        for node in changed:
            os.chown(node, 0, 0)
    assert changed
    assert "RUNNING" in done.text


def test_a_user_without_rights_gets_an_error_of_its_own_kind(source: Mtty) -> None:
    done = run("save", source.uuid, "-", "--json", uid=NOBODY)
    assert done.code == AccessError.code
    assert '"AccessError"' in done.err
    assert '"EACCES"' in done.err


def test_a_device_without_a_vfio_driver_is_not_migratable(bare_pci_device: str) -> None:
    done = run("info", bare_pci_device, "--json")
    assert done.code == 3
    assert done.records[0]["migratable"] == "no"
    done = run("save", bare_pci_device, "-")
    assert done.code == 5
    assert "bind it to a VFIO driver" in done.err


def test_dry_runs_change_nothing(source: Mtty, stream: bytes, tmp_path: Path) -> None:
    file = tmp_path / "state"
    done = run("save", source.uuid, str(file), "--dry-run", "--json")
    (told,) = done.of_type("result")
    assert (done.code, told["ready"], told["stop_copy_length"]) == (0, True, 96)
    assert not done.of_type("transition")
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(stream)
    done = run("load", str(file), source.uuid, "--dry-run", "--json")
    (told,) = done.of_type("result")
    assert (done.code, told["ready"], told["device_bytes"]) == (0, True, 96)
