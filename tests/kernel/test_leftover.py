"""What a process that was killed leaves behind, and how a device comes back from it.

Of RESUMING nobody here asks STOP once the process that loaded has gone: mtty follows a pointer to
its session, which is NULL then, and the kernel oopses (mtty_load_state(), Linux 6.12 and 7.3).
"""

import os

import pytest

from kernel.command import run, start
from kernel.mtty import DESTINATION, SOURCE, Mtty, state_bytes
from kernel.streams import loaded
from vfiomig import DeviceState
from vfiomig.fd import OwnedFd


@pytest.fixture
def half_loaded(stream: bytes, destination: Mtty) -> Mtty:
    """A device whose load was killed in the middle."""
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd):
        os.write(write_fd, stream[: stream.index(state_bytes(SOURCE)) + 48])
        with start("load", "-", destination.uuid, "-v", stdin=read_fd) as loading:
            loading.wait_for_talk("STOP -> RESUMING")
            loading.kill()
    return destination


def test_a_killed_load_leaves_resuming_and_the_old_registers(half_loaded: Mtty) -> None:
    assert run("state", half_loaded.uuid).text == "RESUMING\n"
    assert half_loaded.ports() == list(DESTINATION)


@pytest.mark.parametrize("command", ["save", "load"])
def test_a_device_left_in_resuming_is_refused_by_name_of_its_state(
    half_loaded: Mtty, stream: bytes, command: str
) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd) as reader, OwnedFd(write_fd) as writer:
        os.write(write_fd, stream)
        writer.close()
        words = [half_loaded.uuid, "-"] if command == "save" else ["-", half_loaded.uuid]
        done = run(command, *words, stdin=reader.fileno())
    assert done.code == 5
    assert f"{half_loaded.uuid} is in RESUMING and not RUNNING" in done.err
    assert "vfiomig reset makes it RUNNING" in done.err
    assert half_loaded.state() is DeviceState.RESUMING


@pytest.mark.parametrize("target", ["STOP", "RUNNING", "STOP_COPY", "PRE_COPY", "running-p2p"])
def test_no_state_can_be_asked_of_a_device_left_in_resuming(half_loaded: Mtty, target: str) -> None:
    done = run("state", half_loaded.uuid, "--set", target)
    assert done.code == 3
    assert "leaving it commits whatever was written" in done.err
    assert "vfiomig reset drops it" in done.err
    assert half_loaded.state() is DeviceState.RESUMING


def test_a_reset_makes_it_run_and_a_load_works_again(half_loaded: Mtty, stream: bytes) -> None:
    done = run("reset", half_loaded.uuid)
    assert done.code == 0
    assert done.text == f"{half_loaded.uuid}: RESUMING -> RUNNING by a reset\n"
    assert half_loaded.is_untouched(DESTINATION)
    loaded(stream, half_loaded)
    assert half_loaded.is_untouched(SOURCE)


def test_a_load_resets_it_itself_if_told_to(half_loaded: Mtty, stream: bytes) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd) as reader, OwnedFd(write_fd) as writer:
        os.write(write_fd, stream)
        writer.close()
        done = run("load", "-", half_loaded.uuid, "--force-reset", stdin=reader.fileno())
    assert done.code == 0
    assert "is in RESUMING: resetting it" in done.err
    assert half_loaded.is_untouched(SOURCE)


@pytest.fixture
def half_saved(source: Mtty, almost_full_pipe: tuple[int, int]) -> Mtty:
    """A device whose save was killed in the middle."""
    _, write_fd = almost_full_pipe
    with start("save", source.uuid, "-", "-v", stdout=write_fd) as saving:
        saving.wait_for_talk("STOP -> STOP_COPY")
        saving.kill()
    return source


def test_a_killed_save_leaves_stop_copy_and_no_state_is_lost(half_saved: Mtty) -> None:
    done = run("save", half_saved.uuid, "-")
    assert done.code == 5
    assert f"{half_saved.uuid} is in STOP_COPY and not RUNNING" in done.err
    assert run("state", half_saved.uuid, "--set", "RUNNING").text == "RUNNING\n"
    assert half_saved.is_untouched(SOURCE)
