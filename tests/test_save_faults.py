"""save() and a device that fails: the rows A of the fault matrix (reliability.md).

After each: no file, the device is where the error says, no descriptor and no thread is left, and a
second attempt works.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stream_oracle
from devices import Simulated, failure_of, into_pipe, names_in, no_leak
from vfiomig import (
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceState,
    DeviceStateError,
    MigrationError,
    PreCopyLimits,
    QemuFraming,
    SaveOptions,
    inspect,
    save,
)

S = DeviceState
SIZE = 300_001
PLAIN, PRE_COPY = SaveOptions(), SaveOptions(pre_copy=PreCopyLimits())
MODES = {
    "plain": PLAIN,
    "pre-copy": PRE_COPY,
    "qemu": SaveOptions(framing=QemuFraming(), pre_copy=PreCopyLimits()),
    "spliced": SaveOptions(framing=QemuFraming(), digest=False),
}
EDGES = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, SIZE - 1, SIZE]
SCATTERED = [7919 * k % SIZE for k in range(1, 21)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


def failed_save(
    directory: Path, query: str, options: SaveOptions = PLAIN, *, lost: bool = False
) -> MigrationError:
    """Save a device with faults, which must fail; check what must be true of every failure.

    lost: whether the state is expected to be gone.
    """
    with Simulated(f"sim:?size={SIZE}&{query}") as device:
        before = device.content()
        err = failure_of(lambda: save(device, directory / "out", options))
        assert names_in(directory) == []
        assert device.state() is err.actual is S.RUNNING
        assert (device.content() == before) is not lost
        assert (err.device, err.phase) == (device.name, "save")
        if "was reset" in err.aftermath:
            assert err.aftermath == f"{device.name} was reset and is RUNNING: its state is lost"
            assert lost
        else:
            assert err.aftermath == f"{device.name} is RUNNING"
        report = save(device, directory / "second", options)
        found = inspect(directory / "second")
        assert (found.sound, found.device_bytes) == (True, report.device_bytes)
        assert report.digest in ("", found.digest)
    return err


# A1, A2, A4: reads of any size, and sinks that cannot take it all.


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_reads_of_one_byte(tmp_path: Path, options: SaveOptions) -> None:
    with Simulated("sim:?size=301&chunk=1") as device:
        report = save(device, tmp_path / "out", options)
    assert report.device_bytes >= 301
    assert inspect(tmp_path / "out").frames >= 301


@given(
    size=st.integers(0, 200_000),
    chunk=st.integers(1, 70_000),
    buffer=st.integers(4096, 70_000),
    zeros=st.sampled_from([0, 50, 100]),
)
@settings(max_examples=25, deadline=None)
def test_reads_of_any_size_give_the_same_bytes(
    size: int, chunk: int, buffer: int, zeros: int
) -> None:
    chunk = max(chunk, size // 200)
    with Simulated(f"sim:?size={size}&zeros={zeros}&chunk={chunk or 1}") as device:
        options = SaveOptions(buffer_bytes=buffer)
        stream = into_pipe(lambda fd: save(device, fd, options), nonblocking=bool(size % 2))
        assert stream_oracle.read(stream).states == [device.content()]


# A3.


def test_a_storm_of_signals_disturbs_nothing(
    tmp_path: Path, alarms: Callable[[Callable[[], object]], None]
) -> None:
    arrived: list[int] = []
    with Simulated("sim:?size=1M&bandwidth=10M") as device:
        alarms(lambda: arrived.append(1))
        report = save(device, tmp_path / "out", PRE_COPY)
        assert inspect(tmp_path / "out").digest == report.digest
    assert len(arrived) > 20


# A5.


@pytest.mark.parametrize("end", ["enomsg", "zero"])
def test_a_pre_copy_that_runs_dry_is_no_end(tmp_path: Path, end: str) -> None:
    with Simulated(f"sim:?profile=mlx5&size={SIZE}&precopy_end={end}") as device:
        report = save(device, tmp_path / "out", PRE_COPY)
    assert report.phases[1].name == "stop-copy"
    assert report.phases[1].device_bytes > 0  # the record that ends the updates
    assert inspect(tmp_path / "out").sound


def test_drained_in_stop_copy_is_an_error(tmp_path: Path) -> None:
    for byte in (0, 5000, SIZE):
        err = failed_save(tmp_path / str(make(tmp_path, byte)), f"fault=read:ENOMSG@{byte}*1")
        assert (type(err), err.code, err.errno) == (DeviceIOError, 6, errno.ENOMSG)
        assert "in STOP_COPY that it is drained" in str(err)


def make(directory: Path, name: object) -> object:
    (directory / str(name)).mkdir()
    return name


# A6.


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("byte", EDGES)
def test_a_read_error_at_an_edge(tmp_path: Path, byte: int, options: SaveOptions) -> None:
    err = failed_save(tmp_path, f"fault=read:EIO@{byte}*1", options)
    assert (type(err), err.code, err.errno) == (DeviceIOError, 6, errno.EIO)
    assert f"failed at byte {byte} of about {SIZE} of its state" in str(err)


@pytest.mark.parametrize("byte", SCATTERED)
def test_a_read_error_anywhere(tmp_path: Path, byte: int) -> None:
    numbers = ["EIO", "EINVAL", "EFAULT", "ENOMEM", "ETIMEDOUT", "EINTR", "EAGAIN"]
    number = numbers[byte % len(numbers)]
    err = failed_save(tmp_path, f"fault=read:{number}@{byte}*1")
    assert (err.code, err.errno) == (6, getattr(errno, number))
    assert f"at byte {byte} of about {SIZE}" in str(err)


# A7, A11, A12.


@pytest.mark.parametrize("byte", [0, 1, 4096, 150_000, SIZE - 1, SIZE])
@pytest.mark.parametrize("options", [PLAIN, PRE_COPY], ids=["plain", "pre-copy"])
def test_a_reset_underneath_is_told_as_such(
    tmp_path: Path, byte: int, options: SaveOptions
) -> None:
    err = failed_save(tmp_path, f"fault=async-reset:read@{byte}*1", options, lost=True)
    assert (err.code, err.errno) == (6, errno.ENODEV)
    assert "was reset during the copy" in str(err)


@pytest.mark.parametrize("state", ["PRE_COPY", "STOP_COPY"])
def test_a_reset_right_after_a_state_change_is_noticed(tmp_path: Path, state: str) -> None:
    err = failed_save(tmp_path, f"fault=async-reset:set@{state}*1", PRE_COPY, lost=True)
    assert (err.code, err.errno) == (6, errno.ENODEV)


# A8, A9, A10, A27, A28.


@pytest.mark.parametrize("number", ["EIO", "EINVAL", "EBUSY", "ENODEV", "ETIMEDOUT", "EPERM"])
@pytest.mark.parametrize("state", ["RUNNING_P2P", "STOP", "STOP_COPY", "PRE_COPY", "PRE_COPY_P2P"])
def test_a_refused_state_change_leaves_the_device_running(
    tmp_path: Path, number: str, state: str
) -> None:
    options = PRE_COPY if "PRE_COPY" in state else PLAIN
    err = failed_save(tmp_path, f"fault=set:{number}@{state}*1", options)
    assert (type(err), err.code) == (DeviceStateError, 6)
    assert (err.errno, err.wanted) == (getattr(errno, number), DeviceState[state])
    assert f"cannot enter {state}: {os.strerror(getattr(errno, number))}; it is in " in str(err)


@pytest.mark.parametrize("state", ["RUNNING_P2P", "STOP", "STOP_COPY", "PRE_COPY", "PRE_COPY_P2P"])
def test_a_device_in_error_is_reset_and_its_loss_is_told(tmp_path: Path, state: str) -> None:
    options = PRE_COPY if "PRE_COPY" in state else PLAIN
    err = failed_save(tmp_path, f"fault=set:EIO@{state}:ERROR*1", options, lost=True)
    assert (type(err), err.code, err.errno, err.wanted) == (
        DeviceStateError,
        6,
        5,
        DeviceState[state],
    )
    assert "it is in ERROR" in str(err)
    assert "was reset" in err.aftermath


def test_a_device_that_does_not_leave_pre_copy_is_reset(tmp_path: Path) -> None:
    query = "fault=read:EIO@5000*1&fault=set:EINVAL@RUNNING*1"
    err = failed_save(tmp_path, query, PRE_COPY, lost=True)
    assert (type(err), err.code, err.errno) == (DeviceIOError, 6, errno.EIO)
    assert "was reset" in err.aftermath


@pytest.mark.parametrize("state", ["STOP", "RUNNING_P2P", "RUNNING"])
def test_a_device_that_does_not_run_again_is_reset(tmp_path: Path, state: str) -> None:
    # A pre-copy has 64 bytes of records around its first copy of the state.
    query = f"fault=read:EIO@{SIZE + 65}*1&fault=set:EINVAL@{state}*1"
    err = failed_save(tmp_path, query, PRE_COPY, lost=True)
    assert (type(err), err.code, err.errno) == (DeviceIOError, 6, errno.EIO)
    assert "was reset" in err.aftermath


def test_a_resume_that_fails_after_the_copy_makes_no_file(tmp_path: Path) -> None:
    err = failed_save(tmp_path, "fault=set:EIO@RUNNING*1")
    assert (type(err), err.wanted, err.errno) == (DeviceStateError, S.RUNNING, errno.EIO)


def test_a_device_that_cannot_be_reset_is_code_20(tmp_path: Path) -> None:
    faults = "fault=set:EINVAL@STOP_COPY:ERROR*1&fault=reset:EIO*2"
    with Simulated(f"sim:?size=5000&{faults}") as device:
        err = failure_of(lambda: save(device, tmp_path / "out"))
        assert (type(err), err.code, err.errno) == (DeviceLostError, 20, errno.EIO)
        assert (err.wanted, err.actual, device.state()) == (S.RUNNING, S.ERROR, S.ERROR)
        assert "cannot be reset" in str(err)
        assert "it is in ERROR" in str(err)
        assert "by hand" in err.hint
        assert isinstance(err.__cause__, DeviceStateError)
        assert names_in(tmp_path) == []
        with pytest.raises(DeviceBusyError, match="in ERROR and not RUNNING"):
            save(device, tmp_path / "out")
        with pytest.raises(DeviceLostError):
            device.reset()
        device.reset()
        save(device, tmp_path / "out")


def test_a_device_that_says_nothing_any_more_is_code_20(tmp_path: Path) -> None:
    with Simulated("sim:?size=5000&fault=get:EIO&fault=reset:ENODEV") as device:
        err = failure_of(lambda: save(device, tmp_path / "out"))
        # The first look at its state fails: nothing was begun, so nothing has to be mended.
        assert (type(err), err.code, err.errno) == (DeviceIOError, 6, errno.EIO)
        with pytest.raises(DeviceLostError, match="its state cannot be read") as caught:
            device.recover(S.RUNNING)
        assert (caught.value.code, caught.value.actual) == (20, None)


@pytest.mark.parametrize("state", [S.STOP, S.RUNNING_P2P, S.PRE_COPY, S.STOP_COPY, S.RESUMING])
def test_a_device_that_somebody_left_is_not_touched(tmp_path: Path, state: S) -> None:
    with Simulated("sim:?size=5000") as device:
        device.set_state(state)
        err = failure_of(lambda: save(device, tmp_path / "out"))
        assert (type(err), err.code, err.actual) == (DeviceBusyError, 5, state)
        assert (err.wanted, device.state(), names_in(tmp_path)) == (S.RUNNING, state, [])
        assert state.name in str(err)
        device.reset()
        save(device, tmp_path / "out")
