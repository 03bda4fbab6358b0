"""hold, and the three ways to borrow what it holds: unix:PATH, pid:PID/fd:N, fd:N."""

import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.command import NOBODY, Running, installed, run, start
from kernel.mtty import DESTINATION, SOURCE, Mtty, state_bytes
from kernel.streams import state_in
from vfiomig import DeviceState, NoSuchDeviceError, SaveOptions, lending, open_device, save
from vfiomig.fd import OwnedFd


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "x.sock"


@pytest.fixture
def holder(source: Mtty, destination: Mtty, socket_path: Path) -> Iterator[Running]:
    """A process that holds both devices, and lends them at socket_path."""
    words = ["hold", source.uuid, destination.uuid, "--socket", str(socket_path), "-v"]
    with start(*words) as holding:
        holding.wait_for_talk("holding")
        yield holding


def device_fds(pid: int) -> list[int]:
    """Return the descriptors of a process that are VFIO devices, in order."""
    wanted = re.compile(r"anon_inode:\[vfio-device\]|/dev/vfio/devices/vfio\d+")
    return sorted(fd for fd, link in open_files(pid).items() if wanted.fullmatch(link))


def open_files(pid: int) -> dict[int, str]:
    folder = Path(f"/proc/{pid}/fd")
    return {int(entry.name): os.readlink(entry) for entry in folder.iterdir()}


def test_a_device_that_is_held_is_saved_and_loaded_at_the_socket(
    source: Mtty, destination: Mtty, holder: Running, socket_path: Path, tmp_path: Path
) -> None:
    file = str(tmp_path / "state")
    done = installed("save", f"unix:{socket_path}#{source.uuid}", file)
    assert done.code == 0
    assert "opening" not in done.err
    assert run("load", file, f"unix:{socket_path}#{destination.uuid}").code == 0
    holder.signal(signal.SIGTERM)
    assert holder.finish().code == 128 + signal.SIGTERM
    assert source.is_untouched(SOURCE)
    assert destination.is_untouched(SOURCE)


def test_the_lent_device_says_what_it_is(source: Mtty, holder: Running, socket_path: Path) -> None:
    with open_device(f"unix:{socket_path}#{source.uuid}") as device:
        assert (device.name, device.identity.model) == (source.uuid, "mtty-2")
        assert device.state() is DeviceState.RUNNING
    assert lending.lent_names(str(socket_path))[0] == source.uuid


def test_whoever_borrows_has_to_say_which(holder: Running, socket_path: Path) -> None:
    done = run("state", f"unix:{socket_path}")
    assert done.code == 2
    assert "add #NAME" in done.err
    assert run("state", f"unix:{socket_path}#vfio99").code == 5


def test_a_held_device_is_busy_for_those_who_open_it(source: Mtty, holder: Running) -> None:
    assert run("state", source.uuid).code == 5


def test_a_device_is_borrowed_from_the_descriptors_of_a_process(
    source: Mtty, holder: Running
) -> None:
    name = f"pid:{holder.pid}/fd:{device_fds(holder.pid)[0]}"
    done = run("save", name, "-")
    assert done.code == 0, done.err
    assert state_in(done.out) == state_bytes(SOURCE)


def test_a_descriptor_that_is_no_device_is_refused_before_any_ioctl(holder: Running) -> None:
    links = open_files(holder.pid)
    others = {fd: link for fd, link in links.items() if fd not in device_fds(holder.pid)}
    # A container takes the number of VFIO_DEVICE_FEATURE for another request.
    assert {"/dev/vfio/vfio", "/dev/iommu"} & set(others.values())
    for fd in others:
        with pytest.raises(NoSuchDeviceError, match="is no VFIO device"):
            open_device(f"pid:{holder.pid}/fd:{fd}")


def test_a_descriptor_that_is_not_there_is_refused(holder: Running) -> None:
    for name in (f"pid:{holder.pid}/fd:999", "pid:4194300/fd:3", "fd:999"):
        done = run("info", name)
        assert done.code == 5, done.err


def test_a_child_uses_a_device_that_it_inherited(source: Mtty) -> None:
    with source.opened() as mtty:
        done = run("save", f"fd:{mtty.device_fd}", "-", keep=[mtty.device_fd])
        assert done.code == 0, done.err
        assert mtty.device.state() is DeviceState.RUNNING
    assert state_in(done.out) == state_bytes(SOURCE)


def test_the_socket_is_for_its_user_alone(holder: Running, socket_path: Path) -> None:
    node = socket_path.stat()
    assert stat.S_ISSOCK(node.st_mode)
    assert (stat.S_IMODE(node.st_mode), node.st_uid) == (0o600, os.geteuid())


def test_another_user_is_refused_by_the_mode_and_by_the_lender(
    source: Mtty, holder: Running, socket_path: Path, tmp_path: Path
) -> None:
    for folder in tmp_path.parents:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    tmp_path.chmod(0o755)
    name = f"unix:{socket_path}#{source.uuid}"
    done = run("info", name, uid=NOBODY)
    assert done.code == 4
    assert "only the user who runs the lender, and root, may borrow" in done.err
    # Whoever opens the socket to all still has the lender to pass.
    socket_path.chmod(0o666)
    done = run("info", name, uid=NOBODY)
    assert done.code == 4
    assert f"user {NOBODY} may not borrow from user 0" in done.err


def test_another_user_may_not_take_a_descriptor(holder: Running) -> None:
    done = run("info", f"pid:{holder.pid}/fd:{device_fds(holder.pid)[0]}", uid=NOBODY)
    assert done.code == 4
    assert "the right to ptrace" in done.err


def test_a_borrowed_device_outlives_its_killed_holder(
    source: Mtty, holder: Running, socket_path: Path
) -> None:
    name = f"unix:{socket_path}#{source.uuid}"
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd), open_device(name) as device:
        holder.kill()
        report = save(device, write_fd, SaveOptions())
        assert report.device_bytes == 96
        # And nobody else can have it as long as it is open here.
        assert run("state", source.uuid).code == 5
    assert source.is_untouched(SOURCE)


def test_a_killed_holder_leaves_a_socket_that_the_next_one_replaces(
    source: Mtty, destination: Mtty, holder: Running, socket_path: Path
) -> None:
    holder.kill()
    assert socket_path.exists()
    done = run("info", f"unix:{socket_path}#{source.uuid}")
    assert done.code == 5
    assert "nobody lends devices there" in done.err
    with start("hold", source.uuid, "--socket", str(socket_path), "-v") as second:
        second.wait_for_talk("holding")
        assert run("state", f"unix:{socket_path}").text == "RUNNING\n"
        second.signal(signal.SIGINT)
        assert second.finish().code == 128 + signal.SIGINT
    assert not socket_path.exists()
    assert destination.is_untouched(DESTINATION)


def test_a_path_where_somebody_serves_is_not_taken(
    small_source: Mtty, holder: Running, socket_path: Path
) -> None:
    done = run("hold", small_source.uuid, "--socket", str(socket_path))
    assert done.code == 5
    assert "somebody serves there already" in done.err


def test_hold_says_whom_it_serves_in_json(source: Mtty, socket_path: Path) -> None:
    with start("hold", source.uuid, "--socket", str(socket_path), "--json") as holding:
        holding.wait_for_output("holding")
        holding.signal(signal.SIGTERM)
        done = holding.finish()
    (told,) = done.of_type("holding")
    assert (told["devices"], told["pid"]) == ([source.uuid], holding.pid)
