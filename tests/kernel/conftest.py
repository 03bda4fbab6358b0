"""Devices of the lab (tests/vm), each RUNNING with known registers when a test begins."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kernel import migtest
from kernel.live import Ends
from kernel.mtty import DESTINATION, PORTS, SOURCE, Mtty, Port, state_bytes
from kernel.streams import PIPE_BYTES, saved
from vfiomig import ioctl
from vfiomig.fd import OwnedFd
from vfiomig.uapi import DeviceState

PAGE_BYTES = 4096


@pytest.fixture(scope="session")
def lab() -> list[Mtty]:
    """The devices that VFIOMIG_MTTY names."""
    text = os.environ.get("VFIOMIG_MTTY", "")
    devices = [Mtty(*entry.split(":")) for entry in text.split(",") if entry]
    kinds = [device.kind for device in devices]
    if all(kinds.count(kind) >= 2 for kind in PORTS):
        return devices
    reason = "needs two mtty-1 and two mtty-2 devices, in VFIOMIG_MTTY: see tests/vm/README.md"
    if os.environ.get("VFIOMIG_REQUIRE_KERNEL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def driver() -> None:
    """The module of the test device, which makes devices as kernel/migtest.py asks for them."""
    if migtest.is_there():
        return
    reason = "needs the module vfiomig_test of the folder driver: see tests/vm/README.md"
    if os.environ.get("VFIOMIG_REQUIRE_KERNEL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_descriptor_is_left(lab: list[Mtty]) -> Iterator[None]:
    """Every test here needs the lab, and leaves no descriptor behind."""
    before = _open_files()
    yield
    assert _open_files() == before


@pytest.fixture
def source(lab: list[Mtty]) -> Iterator[Mtty]:
    """An mtty-2 that holds SOURCE."""
    yield from _prepared(lab, "mtty-2", 0, SOURCE)


@pytest.fixture
def destination(lab: list[Mtty]) -> Iterator[Mtty]:
    """Another mtty-2, which holds DESTINATION."""
    yield from _prepared(lab, "mtty-2", 1, DESTINATION)


@pytest.fixture
def small_source(lab: list[Mtty]) -> Iterator[Mtty]:
    """An mtty-1 that holds the first port of SOURCE."""
    yield from _prepared(lab, "mtty-1", 0, SOURCE[:1])


@pytest.fixture
def small_destination(lab: list[Mtty]) -> Iterator[Mtty]:
    """Another mtty-1, which holds the first port of DESTINATION."""
    yield from _prepared(lab, "mtty-1", 1, DESTINATION[:1])


@pytest.fixture
def stream(source: Mtty) -> bytes:
    """The state of source, with SOURCE in it, as a native stream."""
    return saved(source)


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    """The commands send and receive."""
    return Ends(tmp_path)


@pytest.fixture
def almost_full_pipe(stream: bytes) -> Iterator[tuple[int, int]]:
    """A pipe that takes a stream up to the middle of the state, and then nothing more."""
    room = stream.index(state_bytes(SOURCE)) + 48
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd):
        size = fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        # Written so, each page of the pipe is full, and what is written later goes into the last.
        assert os.write(write_fd, bytes(size - PAGE_BYTES)) == size - PAGE_BYTES
        assert os.write(write_fd, bytes(PAGE_BYTES - room)) == PAGE_BYTES - room
        yield read_fd, write_fd


def _prepared(lab: list[Mtty], kind: str, index: int, ports: Sequence[Port]) -> Iterator[Mtty]:
    mtty = [device for device in lab if device.kind == kind][index]
    with mtty.opened() as device:
        device.install(ports)
        assert device.registers.scratch == [port.scratch for port in ports]
    yield mtty
    with mtty.opened() as device:
        if ioctl.get_device_state(device.device_fd) is not DeviceState.RUNNING:
            ioctl.reset_device(device.device_fd)


def _open_files() -> list[str]:
    return sorted(entry.name for entry in os.scandir("/proc/self/fd"))
