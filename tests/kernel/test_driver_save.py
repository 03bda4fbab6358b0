"""Saves of the test device that go wrong, one way each: what is raised, and what it is left in."""

import errno
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kernel.migtest import MigTest, OpenMigTest
from vfiomig import (
    CancelledError,
    DeviceIOError,
    DeviceLostError,
    DeviceState,
    DeviceStateError,
    MigrationError,
    PreCopyLimits,
    ResourceLimitError,
    SaveOptions,
    load,
    save,
)
from vfiomig.report import Event, StateChange
from vfiomig.worker import Cancellation

pytestmark = pytest.mark.usefixtures("driver")

SIZE = 300_001
PRE_COPY = SaveOptions(pre_copy=PreCopyLimits())
# One read is one buffer, and what fails in its middle shows where.
SMALL = SaveOptions(buffer_bytes=4096)


@pytest.fixture
def device() -> Iterator[MigTest]:
    """A device whose state after a reset is that which it had before."""
    with MigTest.created(state_bytes=SIZE, seed=7) as made:
        yield made


def failure(opened: OpenMigTest, folder: Path, options: SaveOptions = SMALL) -> MigrationError:
    """Return how a save fails; nothing is left of its file."""
    with pytest.raises(MigrationError) as caught:
        save(opened.device, folder / "state", options)
    assert list(folder.iterdir()) == []
    return caught.value


def moves_whole(source: MigTest, opened: OpenMigTest, folder: Path) -> bool:
    """Whether it can be saved now, and loaded into another that then holds the same."""
    save(opened.device, folder / "state")
    with MigTest.created(seed=8) as destination, destination.opened() as there:
        load(folder / "state", there.device)
        return destination.contents == source.contents


@pytest.mark.parametrize("at", [0, 1, 4096, 150_000, SIZE - 1])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_an_error_of_a_read_is_told_with_its_place_and_the_device_runs_on(
    device: MigTest, tmp_path: Path, at: int, number: int
) -> None:
    before = device.contents
    device.set("fault", f"read {at} errno {number} 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceIOError)
        assert (err.code, err.errno, err.actual) == (6, number, DeviceState.RUNNING)
        assert f"failed at byte {at} of about {SIZE} of its state" in str(err)
        assert err.aftermath == f"{device.uuid} is RUNNING"
        assert opened.device.state() is DeviceState.RUNNING
        assert device.contents == before
        assert moves_whole(device, opened, tmp_path)


def test_a_device_that_goes_to_error_in_a_read_is_reset(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "read 150000 error 5 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceIOError)
        assert (err.code, err.actual) == (6, DeviceState.RUNNING)
        assert err.aftermath == f"{device.uuid} was reset and is RUNNING: its state is lost"
        assert moves_whole(device, opened, tmp_path)


def test_a_reset_in_the_middle_is_said_to_be_one(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "read 150000 reset 0 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceIOError)
        assert (err.code, err.errno, err.actual) == (6, errno.ENODEV, DeviceState.RUNNING)
        assert f"was reset during the copy, at byte 150000 of about {SIZE}" in str(err)
        assert moves_whole(device, opened, tmp_path)


@pytest.mark.parametrize("at", [0, 60_000])
def test_an_error_in_pre_copy_ends_pre_copy_as_well(
    device: MigTest, tmp_path: Path, at: int
) -> None:
    device.set("fault", f"read {at} errno 5 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path, PRE_COPY)
        assert (type(err), err.errno) == (DeviceIOError, errno.EIO)
        assert opened.device.state() is DeviceState.RUNNING


def test_sizes_of_pre_copy_that_are_not_told_end_it(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "info 0 errno 5 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path, PRE_COPY)
        assert "does not tell its pre-copy sizes" in str(err)
        assert (err.code, err.errno) == (6, errno.EIO)
        assert opened.device.state() is DeviceState.RUNNING


def test_a_cancellation_ends_it_after_the_read_that_hangs(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "read 150000 hang 300 1")
    with device.opened() as opened, closing(Cancellation()) as cancellation:
        hangs = threading.Event()

        def look(event: Event) -> None:
            if isinstance(event, StateChange) and event.wanted is DeviceState.STOP_COPY:
                hangs.set()

        def cancel() -> None:
            hangs.wait()
            cancellation.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(CancelledError) as caught:
            save(
                opened.device,
                tmp_path / "state",
                SMALL,
                on_event=look,
                cancellation=cancellation,
            )
        thread.join()
        assert (caught.value.code, caught.value.actual) == (14, DeviceState.RUNNING)
        assert list(tmp_path.iterdir()) == []
        assert moves_whole(device, opened, tmp_path)


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY])
@pytest.mark.parametrize("hook", ["enter", "entered"])
def test_a_state_that_is_refused_is_told_and_the_device_runs_on(
    device: MigTest, tmp_path: Path, state: DeviceState, hook: str
) -> None:
    device.set("fault", f"{hook} {int(state)} errno 16 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceStateError)
        assert (err.code, err.errno, err.wanted) == (6, errno.EBUSY, state)
        assert err.actual is opened.device.state() is DeviceState.RUNNING
        assert moves_whole(device, opened, tmp_path)


def test_a_driver_without_a_descriptor_to_give_is_a_limit(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", f"entered {int(DeviceState.STOP_COPY)} errno {errno.EMFILE} 1")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert (err.code, err.errno) == (15, errno.EMFILE)
        assert opened.device.state() is DeviceState.RUNNING


def test_a_device_that_cannot_go_on_afterwards_is_reset(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", f"enter {int(DeviceState.RUNNING)} errno 5")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceStateError)
        assert (err.wanted, err.actual) == (DeviceState.RUNNING, DeviceState.RUNNING)
        assert "was reset and is RUNNING: its state is lost" in err.aftermath


def test_a_device_that_cannot_even_be_reset_is_lost(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "read 0 error 5")
    device.set("fault", "reset 0 errno 5")
    with device.opened() as opened:
        err = failure(opened, tmp_path)
        assert isinstance(err, DeviceLostError)
        assert (err.code, err.errno, err.actual) == (20, errno.EIO, DeviceState.ERROR)


def test_a_state_without_an_end_is_given_up(tmp_path: Path) -> None:
    with MigTest.created(state_bytes=1 << 50, zero_percent=100) as device:
        before = device.held_bytes
        with device.opened() as opened:
            err = failure(opened, tmp_path, SaveOptions(max_state_bytes=1 << 20))
            assert isinstance(err, ResourceLimitError)
            assert opened.device.state() is DeviceState.RUNNING
        assert device.held_bytes == before


def test_a_size_that_is_not_told_is_only_a_warning(device: MigTest, tmp_path: Path) -> None:
    device.set("fault", "size 0 errno 5")
    with device.opened() as opened:
        report = save(opened.device, tmp_path / "state")
    assert any("does not tell its size" in warning for warning in report.warnings)
    assert report.device_bytes == SIZE
