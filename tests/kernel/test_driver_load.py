"""Loads into the test device that go wrong, one way each; and what a driver that does not check."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import stream_oracle
from kernel.migtest import MigTest, OpenMigTest
from vfiomig import (
    DeviceIOError,
    DeviceLostError,
    DeviceState,
    DeviceStateError,
    LoadOptions,
    MigrationError,
    TransferReport,
    ioctl,
    load,
    save,
)
from vfiomig.report import Event, StateChange

pytestmark = pytest.mark.usefixtures("driver")

SIZE = 300_001
# Small buffers: what fails in the middle of the state fails after some of it was taken.
SMALL = LoadOptions(buffer_bytes=4096)
STOP = int(DeviceState.STOP)
# The state changes of a load: RUNNING_P2P, STOP, RESUMING, STOP (the commit), …
COMMIT = 4


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """The state of a device, saved."""
    file = tmp_path / "state"
    with MigTest.created(state_bytes=SIZE, seed=7) as source, source.opened() as opened:
        save(opened.device, file)
    return file


@pytest.fixture
def device() -> Iterator[MigTest]:
    """A device whose state after a reset is that which it had before."""
    with MigTest.created(state_bytes=SIZE, seed=8) as made:
        yield made


def failure(opened: OpenMigTest, stream: Path) -> MigrationError:
    """Return how a load fails; the device is RUNNING afterwards."""
    with pytest.raises(MigrationError) as caught:
        load(stream, opened.device, SMALL)
    assert opened.device.state() is DeviceState.RUNNING
    return caught.value


def arrives(stream: Path, opened: OpenMigTest) -> TransferReport:
    """Load it now."""
    return load(stream, opened.device, SMALL)


def raw_state(device: MigTest) -> bytes:
    """Return its state as its data_fd gives it."""
    pieces = []
    with device.opened() as opened:
        data_fd = ioctl.set_device_state(opened.device_fd, DeviceState.STOP_COPY)
        while piece := os.read(data_fd, 1 << 20):
            pieces.append(piece)
        os.close(data_fd)
        ioctl.set_device_state(opened.device_fd, DeviceState.RUNNING)
    return b"".join(pieces)


def written(file: Path, state: bytes) -> Path:
    """Write a sound stream of whatever state."""
    described = stream_oracle.manifest()
    described["devices"][0]["identity"] |= {
        "driver": "vfiomig_test",
        "model": "vfiomig_test-v2",
    }
    frames = [stream_oracle.data(state)] if state else []
    file.write_bytes(stream_oracle.write(frames, described))
    return file


@pytest.mark.parametrize("at", [0, 1, 4096, 150_000, SIZE - 1])
def test_an_error_of_a_write_is_told_with_its_place_and_ends_in_a_reset(
    device: MigTest, stream: Path, at: int
) -> None:
    before = device.contents
    device.set("fault", f"write {at} errno 28 1")
    with device.opened() as opened:
        err = failure(opened, stream)
        assert isinstance(err, DeviceIOError)
        assert (err.code, err.errno, err.phase) == (6, errno.ENOSPC, "load")
        assert "was reset and is RUNNING; nothing is loaded" in err.aftermath
        assert device.contents == before
        arrives(stream, opened)
        assert device.contents != before


@pytest.mark.parametrize(("fault", "number"), [("error 5", errno.EIO), ("reset 0", errno.ENODEV)])
def test_a_device_that_fails_or_is_reset_in_a_write_is_running_and_not_loaded(
    device: MigTest, stream: Path, fault: str, number: int
) -> None:
    before = device.contents
    device.set("fault", f"write 150000 {fault} 1")
    with device.opened() as opened:
        err = failure(opened, stream)
        assert (type(err), err.errno) == (DeviceIOError, number)
        assert device.contents == before
        arrives(stream, opened)


def test_a_commit_that_is_refused_loads_nothing(device: MigTest, stream: Path) -> None:
    before = device.contents
    device.set("fault", f"arc {COMMIT} errno 22 1")
    with device.opened() as opened:
        err = failure(opened, stream)
        assert isinstance(err, DeviceStateError)
        assert (err.code, err.errno, err.wanted) == (6, errno.EINVAL, DeviceState.STOP)
        assert "was reset and is RUNNING; nothing is loaded" in err.aftermath
        assert device.contents == before
        arrives(stream, opened)
        assert device.contents != before


def test_until_the_commit_it_holds_what_it_held(device: MigTest, stream: Path) -> None:
    before, seen = device.contents, []

    def look(event: Event) -> None:
        if isinstance(event, StateChange):
            seen.append((event.wanted.name, device.contents == before))

    with device.opened() as opened:
        load(stream, opened.device, on_event=look)
    assert seen == [
        ("RUNNING_P2P", True),
        ("STOP", True),
        ("RESUMING", True),
        ("STOP", False),
        ("RUNNING_P2P", False),
        ("RUNNING", False),
    ]


def test_what_is_loaded_stays_when_it_cannot_run_unless_it_takes_a_reset(
    device: MigTest, stream: Path
) -> None:
    device.set("fault", f"enter {int(DeviceState.RUNNING_P2P)} errno 5")
    with device.opened() as opened:
        # The way to RESUMING goes through RUNNING_P2P as well: let it.
        device.set("fault", "clear")
        device.set("fault", f"arc {COMMIT + 1} errno 5 1")
        with pytest.raises(DeviceStateError) as caught:
            load(stream, opened.device)
        err = caught.value
        assert (err.errno, err.wanted) == (errno.EIO, DeviceState.RUNNING_P2P)
        assert err.aftermath == f"{device.uuid} is RUNNING with what was loaded"
        assert opened.device.state() is DeviceState.RUNNING


@pytest.mark.parametrize("check", ["write", "commit"])
@pytest.mark.parametrize("at", [8, 4096, SIZE - 1])
def test_a_state_that_the_device_can_tell_is_wrong_is_not_loaded(
    device: MigTest, tmp_path: Path, check: str, at: int
) -> None:
    device.set("check", check)
    before, state = device.contents, bytearray(raw_state(device))
    state[at] ^= 1
    with device.opened() as opened:
        err = failure(opened, written(tmp_path / "damaged", bytes(state)))
        assert isinstance(err, DeviceIOError if check == "write" else DeviceStateError)
        assert err.code == 6
        assert device.contents == before


@pytest.mark.parametrize("cut", [1, 4096, SIZE])
def test_a_state_that_is_too_short_is_not_committed(
    device: MigTest, tmp_path: Path, cut: int
) -> None:
    before, state = device.contents, raw_state(device)
    with device.opened() as opened:
        err = failure(opened, written(tmp_path / "cut", state[: SIZE - cut]))
        assert isinstance(err, DeviceStateError)
        assert (err.wanted, err.errno) == (DeviceState.STOP, errno.EINVAL)
        assert device.contents == before


def test_more_than_a_state_is_refused_by_the_write(device: MigTest, tmp_path: Path) -> None:
    before, state = device.contents, raw_state(device)
    with device.opened() as opened:
        err = failure(opened, written(tmp_path / "long", state + b"x"))
        assert isinstance(err, DeviceIOError)
        assert device.contents == before


def test_only_the_digest_shows_what_a_driver_without_checks_has_taken(
    device: MigTest, tmp_path: Path
) -> None:
    """As some drivers do: the commit succeeds, and proves nothing."""
    device.set("check", "none")
    before, state = device.contents, bytearray(raw_state(device))
    state[100_000] ^= 1
    with device.opened() as opened:
        load(written(tmp_path / "damaged", bytes(state)), opened.device)
        assert device.held_bytes == SIZE
        assert device.contents != before
        load(written(tmp_path / "sound", raw_of(state)), opened.device)
        assert device.contents == before


def raw_of(damaged: bytearray) -> bytes:
    return bytes(damaged[:100_000]) + bytes([damaged[100_000] ^ 1]) + bytes(damaged[100_001:])


def test_a_device_that_cannot_be_reset_after_a_failed_load_is_lost(
    device: MigTest, stream: Path
) -> None:
    device.set("fault", "write 5000 errno 5 1")
    device.set("fault", "reset 0 errno 5")
    with device.opened() as opened, pytest.raises(DeviceLostError) as caught:
        load(stream, opened.device, SMALL)
    assert (caught.value.code, caught.value.actual) == (20, DeviceState.RESUMING)
    device.recovered()
