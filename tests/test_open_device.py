"""Devices by name: dispatch, descriptors of other processes, and lenders that answer badly."""

import array
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfiomig import backends, errors, lending
from vfiomig.uapi import DeviceState

RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
SOURCES = str(Path(lending.__file__).parents[1])
ENVIRONMENT = os.environ | {"PYTHONPATH": SOURCES}


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def memfd() -> Iterator[int]:
    with os.fdopen(os.memfd_create("stand-in"), "rb") as file:
        yield file.fileno()


@contextmanager
def answering(path: Path, reply: bytes, fds: list[int]) -> Iterator[None]:
    """A lender that answers one client with these very bytes and descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendmsg([reply], [(*RIGHTS, array.array("i", fds))] if fds else [])

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("name", "borrowed", "opened"),
    [
        ("sim:?size=1M", False, False),
        ("fd:3", True, False),
        ("pid:1/fd:3", True, False),
        ("unix:/run/s#0000:3b:00.2", True, False),
        ("0000:3b:00.2", False, True),
        ("vfio0", False, True),
    ],
)
def test_a_name_tells_whether_a_device_will_be_opened(
    name: str, *, borrowed: bool, opened: bool
) -> None:
    assert (backends.is_borrowed(name), backends.opens_by_name(name)) == (borrowed, opened)


def test_a_simulated_device_is_opened() -> None:
    with backends.open_device("sim:?size=1M") as device:
        assert device.state() is DeviceState.RUNNING


def test_other_names_are_looked_up_on_this_host() -> None:
    with pytest.raises(errors.NoSuchDeviceError, match=r"ffff:ff:1f\.7"):
        backends.open_device("ffff:ff:1f.7")


@pytest.mark.parametrize(
    "name", ["fd:", "fd:x", "fd:-1", "fd:\u0663", "pid:0/fd:3", "pid:1", "pid:1/fd:", "unix:"]
)
def test_names_that_borrow_nothing_are_refused(name: str) -> None:
    with pytest.raises(errors.UsageError, match="names no descriptor"):
        backends.open_device(name)


def test_a_descriptor_that_is_no_device_is_refused_and_left_open(memfd: int) -> None:
    with pytest.raises(errors.NoSuchDeviceError, match=r"no VFIO device: .*memfd:stand-in"):
        backends.open_device(f"fd:{memfd}")
    os.fstat(memfd)


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    with pytest.raises(errors.NoSuchDeviceError, match="has no descriptor 999999") as caught:
        backends.open_device("fd:999999")
    assert caught.value.errno == errno.EBADF


@contextmanager
def process_with(fd: int) -> Iterator[int]:
    """Give the id of a child that has a copy of fd, and waits."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd]) as child:
        yield child.pid
        assert child.stdin is not None
        child.stdin.close()


def test_a_descriptor_of_another_process_is_copied(memfd: int) -> None:
    # That it was refused as what it is shows that it arrived.
    with process_with(memfd) as pid:
        with pytest.raises(errors.NoSuchDeviceError, match=r"no VFIO device: .*memfd:stand-in"):
            backends.open_device(f"pid:{pid}/fd:{memfd}")
        with pytest.raises(errors.NoSuchDeviceError, match="has no descriptor 9999"):
            backends.open_device(f"pid:{pid}/fd:9999")


def test_a_process_that_is_gone_has_no_device(memfd: int) -> None:
    with process_with(memfd) as pid:
        pass
    with pytest.raises(errors.NoSuchDeviceError, match="does not exist") as caught:
        backends.open_device(f"pid:{pid}/fd:{memfd}")
    assert caught.value.errno == errno.ESRCH


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_that_may_not_be_traced_says_what_right_it_takes(memfd: int) -> None:
    code = (
        # Everything imported first: the other user may not be able to read it.
        "import ctypes, os, sys; from vfiomig import backends, errors, lending\n"
        "from vfiomig.backends import kernel; os.setuid(65534)\n"
        "try: backends.open_device(sys.argv[1])\n"
        "except errors.AccessError as err: print(err.code, err.errno, err.hint)"
    )
    command = [sys.executable, "-c", code, f"pid:{os.getpid()}/fd:{memfd}"]
    found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.stdout.startswith(f"4 {errno.EPERM} "), found
    assert "CAP_SYS_PTRACE" in found.stdout


# In a /dev of its own /dev/vfio/devices/vfio0 is a twin of /dev/null: its name is a device's, and
# so the checks let it pass. Only what the kernel would answer is replaced.
IN_A_DEV_OF_ITS_OWN = """
import errno, os, threading
from pathlib import Path
from vfiomig import backends, errors, ioctl, lending
from vfiomig.identity import Identity
ioctl.get_migration_flags = lambda device_fd: 7
ioctl.get_device_info = lambda device_fd: (0, 0, 0)
fd = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
for name in (f"fd:{fd}", f"pid:{os.getpid()}/fd:{fd}"):
    with backends.open_device(name) as device:
        assert (device.name, device.identity) == (name, Identity(driver=""))
        assert len(os.listdir("/proc/self/fd")) == 6
with lending.Lender([("0000:3b:00.2", Identity("mtty"), fd)], Path("/dev/s")) as lender:
    thread = threading.Thread(target=lender.serve)
    thread.start()
    for name in ("unix:/dev/s", "unix:/dev/s#0000:3b:00.2"):
        with backends.open_device(name) as device:
            assert (device.name, device.identity.driver) == ("0000:3b:00.2", "mtty")
    lender.stop()
    thread.join()
def unbound(device_fd):
    raise OSError(errno.EINVAL, "Invalid argument")
ioctl.get_device_info = unbound
try:
    backends.open_device(f"fd:{fd}")
except errors.DeviceBusyError as err:
    print(err)
print(len(os.listdir("/proc/self/fd")))
"""


def may_mount() -> bool:
    """Root in a container, or below a chroot, may still not have mounts of its own."""
    unshare = shutil.which("unshare")
    return (
        unshare is not None and subprocess.run([unshare, "-m", "true"], check=False).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="a /dev of its own takes the right to mount")
def test_a_borrowed_cdev_becomes_a_device_and_an_unbound_one_is_refused() -> None:
    setup = (
        "mount -t tmpfs none /dev && mkdir -p /dev/vfio/devices && mknod /dev/null c 1 3"
        ' && mknod /dev/vfio/devices/vfio0 c 1 3 && exec "$0" -c "$1"'
    )
    command = ["unshare", "-m", "sh", "-c", setup, sys.executable, IN_A_DEV_OF_ITS_OWN]
    found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    # 0, 1, 2, the device, and the directory that is being listed
    assert found.stdout.splitlines()[1:] == ["5"], found
    assert "has not bound this descriptor to an iommufd" in found.stdout


GOOD = {"ok": True, "name": "x", "identity": {"driver": "mtty"}}
BAD_REPLIES = {
    "none": (GOOD, 0),
    "two": (GOOD, 2),
    "truncated control data": (GOOD, 5),
    "refused with one": ({"ok": False, "error": "no"}, 1),
    "truncated": (GOOD | {"name": "x" * 5000}, 1),
    "no identity": ({"ok": True, "name": "x"}, 1),
    "unknown field": (GOOD | {"identity": {"driver": "mtty", "colour": "red"}}, 1),
    "no driver": (GOOD | {"identity": {"model": "x"}}, 1),
    "unknown key": (GOOD | {"more": 1}, 1),
    "control characters": (GOOD | {"name": "\x1b[2J"}, 1),
    "no object": ([GOOD], 1),
}


@pytest.mark.parametrize(("reply", "count"), BAD_REPLIES.values(), ids=BAD_REPLIES.keys())
def test_a_bad_answer_is_refused_and_its_descriptors_closed(
    memfd: int, tmp_path: Path, reply: object, count: int
) -> None:
    data = json.dumps(reply).encode() + b"\n"
    with answering(tmp_path / "s", data, [memfd] * count), pytest.raises(errors.PeerError):
        backends.open_device(f"unix:{tmp_path}/s")


def test_a_refusal_cannot_steer_the_terminal(tmp_path: Path) -> None:
    data = b'{"ok": false, "code": 4, "error": "\\u001b[2J"}\n'
    with answering(tmp_path / "s", data, []), pytest.raises(errors.AccessError) as caught:
        backends.open_device(f"unix:{tmp_path}/s")
    assert str(caught.value).isprintable()


def test_a_lender_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "s"))
        with pytest.raises(errors.NoSuchDeviceError, match="nobody lends") as caught:
            backends.open_device(f"unix:{tmp_path}/s")
        assert caught.value.errno == errno.ECONNREFUSED
        silent.listen()
        with pytest.raises(errors.PeerError, match="said nothing"):
            backends.open_device(f"unix:{tmp_path}/s")


def test_where_nobody_lends_there_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(errors.NoSuchDeviceError, match="nobody lends"):
        backends.open_device(f"unix:{tmp_path}/missing#name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        with pytest.raises(errors.NoSuchDeviceError, match="nobody lends"):
            backends.open_device(f"unix:{tmp_path}/s")
    with pytest.raises(errors.UsageError, match="too long"):
        backends.open_device("unix:/" + "s" * 200)
