"""The lender, with real sockets, threads and processes; bad lenders are in test_open_device.py."""

import array
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfiomig import errors, lending
from vfiomig.identity import Identity
from vfiomig.lending import Lendable, Lender

IDENTITY = Identity("mlx5_vfio_pci", vendor_id="15b3", device_id="101e")
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
SOURCES = str(Path(lending.__file__).parents[1])
# What a process of another user does; it imports while it may still read the sources.
FOREIGN = """
import os, sys
from vfiomig import errors, lending
os.setuid(65534)
try:
    lending.borrow(sys.argv[1])
except errors.MigrationError as err:
    print(type(err).__name__, err.code, err)
"""


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def one() -> Iterator[Lendable]:
    with os.fdopen(os.memfd_create("first"), "rb") as file:
        yield ("0000:3b:00.2", IDENTITY, file.fileno())


@pytest.fixture
def two(one: Lendable) -> Iterator[list[Lendable]]:
    with os.fdopen(os.memfd_create("second"), "rb") as file:
        yield [one, ("0000:3b:00.3", Identity("mtty"), file.fileno())]


@contextmanager
def serving(devices: list[Lendable], path: Path, timeout_s: float = 5.0) -> Iterator[Lender]:
    with Lender(devices, path, timeout_s=timeout_s) as lender:
        thread = threading.Thread(target=lender.serve)
        thread.start()
        try:
            yield lender
        finally:
            lender.stop()
            thread.join()


@contextmanager
def client_of(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(5)
        client.connect(str(path))
        yield client


def ask(path: Path, request: bytes) -> dict[str, object]:
    with client_of(path) as client:
        client.send(request)
        reply: dict[str, object] = json.loads(client.recv(65536))
        return reply


def same_file(one_fd: int, other_fd: int) -> bool:
    return os.path.samestat(os.fstat(one_fd), os.fstat(other_fd))


def test_the_only_device_needs_no_name(one: Lendable, tmp_path: Path) -> None:
    with serving([one], tmp_path / "s"):
        name, identity, device_fd = lending.borrow(str(tmp_path / "s"))
    with device_fd:
        assert (name, identity) == one[:2]
        assert same_file(device_fd.fileno(), one[2])
        assert not os.get_inheritable(device_fd.fileno())


def test_one_of_several_devices_is_chosen_by_name(two: list[Lendable], tmp_path: Path) -> None:
    with serving(two, tmp_path / "s"):
        assert lending.lent_names(str(tmp_path / "s")) == ("0000:3b:00.2", "0000:3b:00.3")
        name, identity, device_fd = lending.borrow(str(tmp_path / "s"), "0000:3b:00.3")
        with device_fd:
            assert (name, identity.driver) == ("0000:3b:00.3", "mtty")
            assert same_file(device_fd.fileno(), two[1][2])


@pytest.mark.parametrize(
    ("wanted", "kind"), [(None, errors.UsageError), ("x", errors.NoSuchDeviceError)]
)
def test_without_a_right_name_the_names_are_listed(
    two: list[Lendable], tmp_path: Path, wanted: str | None, kind: type[errors.MigrationError]
) -> None:
    with (
        serving(two, tmp_path / "s"),
        pytest.raises(kind, match=r"0000:3b:00\.2, 0000:3b:00\.3"),
    ):
        lending.borrow(str(tmp_path / "s"), wanted)


@pytest.mark.parametrize("umask", [0, 0o277])
def test_the_socket_is_for_its_owner_whatever_the_umask(
    one: Lendable, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        lender = Lender([one], tmp_path / "s")
    finally:
        os.umask(before)
    with lender:
        assert stat.S_IMODE((tmp_path / "s").lstat().st_mode) == 0o600
    assert not (tmp_path / "s").exists()


def test_the_socket_never_has_a_wider_mode(one: Lendable, tmp_path: Path) -> None:
    path, modes, watching = tmp_path / "s", list[int](), True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "os.chmod" and arguments[0] == str(path):
            modes.append(stat.S_IMODE(path.lstat().st_mode))

    sys.addaudithook(hook)  # it is called before os.chmod() does its work, and stays for ever
    before = os.umask(0)
    try:
        Lender([one], path).close()
    finally:
        os.umask(before)
        watching = False
    assert modes == [0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o600, "AccessError 4 .*Permission denied"), (0o666, "AccessError 4 .*user 65534 may not")],
)
def test_another_user_is_refused_and_logged(
    one: Lendable, mode: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "s"
        with serving([one], path):
            path.chmod(mode)  # 0666 takes the first gate away, so that the second one shows
            command = [sys.executable, "-c", FOREIGN, str(path)]
            environment = os.environ | {"PYTHONPATH": SOURCES}
            found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert re.search(words, found.stdout), found
    assert ("user 65534" in caplog.text) == (mode == 0o666)


BAD_REQUESTS = {
    "no JSON": b"hello\n",
    "no line": b'{"op": "list"}',
    "two lines": b'{"op":\n"list"}\n',
    "no object": b'["list"]\n',
    "unknown op": b'{"op": "open"}\n',
    "no op": b"{}\n",
    "no name": b'{"op": "borrow"}\n',
    "unknown key": b'{"op": "list", "name": null}\n',
    "number for a name": b'{"op": "borrow", "name": 3}\n',
    "list for a name": b'{"op": "borrow", "name": ["0000:3b:00.2"]}\n',
    "control characters": b'{"op": "borrow", "name": "\\u001b[2J"}\n',
    "key twice": b'{"op": "borrow", "op": "list"}\n',
    "no UTF-8": b'{"op": "\xff"}\n',
    "nested deeply": b"[" * 4000 + b"\n",
    "too long": b'{"op": "list"' + b" " * 4096 + b"}\n",
}


@pytest.mark.parametrize("request_", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_and_the_lender_goes_on(
    one: Lendable, tmp_path: Path, request_: bytes
) -> None:
    with serving([one], tmp_path / "s"):
        reply = ask(tmp_path / "s", request_)
        assert (reply["ok"], reply["code"]) == (False, 2)
        assert lending.lent_names(str(tmp_path / "s")) == (one[0],)


def break_off(path: Path) -> None:
    with client_of(path):
        pass


def break_off_after_asking(path: Path) -> None:
    with client_of(path) as client:
        client.send(b'{"op": "borrow", "name": null}\n')


def send_descriptors(path: Path) -> None:
    with client_of(path) as client:
        client.sendmsg([b'{"op": "list"}\n'], [(*RIGHTS, array.array("i", [0, 0]))])
        client.recv(4096)


def stay_silent(path: Path) -> None:
    with client_of(path) as client:
        assert client.recv(1) == b""  # the lender hangs up


@pytest.mark.parametrize(
    "client", [break_off, break_off_after_asking, send_descriptors, stay_silent]
)
def test_no_client_ends_the_lender(
    one: Lendable, tmp_path: Path, client: Callable[[Path], None]
) -> None:
    with serving([one], tmp_path / "s", timeout_s=0.05):
        client(tmp_path / "s")
        assert lending.lent_names(str(tmp_path / "s")) == (one[0],)


def test_stop_works_before_serve_during_a_client_and_after_close(
    one: Lendable, tmp_path: Path
) -> None:
    with Lender([one], tmp_path / "early") as lender, client_of(tmp_path / "early") as queued:
        lender.stop()
        lender.serve()
        lender.close()
        with pytest.raises(ConnectionResetError):
            queued.recv(1)  # not even a client in the queue is served any more
    lender.stop()
    lender.close()
    with serving([one], tmp_path / "s"), client_of(tmp_path / "s"):
        pass  # stopped while this client is silent: serve() must not wait 5 s for it


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(one: Lendable, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as killed:
        killed.bind(str(path))
    with serving([one], path):
        with pytest.raises(errors.DeviceBusyError, match="serves there already"):
            Lender([one], path)
        assert lending.lent_names(str(path)) == (one[0],)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("x")])
def test_what_is_no_socket_of_ours_is_left_alone(
    one: Lendable, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "s")
    with pytest.raises(errors.LocalIOError, match="no socket of ours"):
        Lender([one], tmp_path / "s")
    assert os.path.lexists(tmp_path / "s")


def test_a_socket_that_replaced_ours_is_not_removed(one: Lendable, tmp_path: Path) -> None:
    with Lender([one], tmp_path / "s"):
        (tmp_path / "s").unlink()
        (tmp_path / "s").touch()
    assert (tmp_path / "s").exists()


@pytest.mark.parametrize("path", ["missing/s", "s" * 200])
def test_a_path_that_cannot_be_made_is_an_error(one: Lendable, tmp_path: Path, path: str) -> None:
    with pytest.raises(errors.LocalIOError, match="cannot create"):
        Lender([one], tmp_path / path)


def test_what_cannot_be_lent_is_refused(one: Lendable, tmp_path: Path) -> None:
    for devices in ([], [one, one], [(f"{n:036}", IDENTITY, 0) for n in range(100)]):
        with pytest.raises(errors.UsageError):
            Lender(devices, tmp_path / "s")
    assert not (tmp_path / "s").exists()
