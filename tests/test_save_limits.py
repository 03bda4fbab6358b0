"""save() and what a device says or gives that cannot be: sizes, sessions, endless states."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices import Simulated, failure_of, names_in, no_leak
from test_save_faults import PLAIN, PRE_COPY, failed_save
from vfiomig import (
    DeviceIOError,
    DeviceState,
    DeviceStateError,
    Event,
    IllegalArcError,
    MigrationError,
    NotMigratableError,
    OutOfSyncError,
    PreCopyLimits,
    QemuFraming,
    ResourceLimitError,
    SaveOptions,
    StaleChannelError,
    inspect,
    load,
    save,
)

S = DeviceState


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


# A13 to A16.


def test_a_session_that_has_ended_is_not_used_again() -> None:
    with Simulated("sim:?size=5000") as device:
        channel = device.set_state(S.STOP_COPY)
        assert channel is not None
        device.set_state(S.RUNNING)
        with pytest.raises(StaleChannelError, match="has ended"):
            channel.fileno()


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE"])
@pytest.mark.parametrize("state", ["STOP_COPY", "PRE_COPY"])
def test_a_descriptor_that_was_missing_is_a_limit(tmp_path: Path, number: str, state: str) -> None:
    options = PRE_COPY if state == "PRE_COPY" else PLAIN
    err = failed_save(tmp_path, f"fault=set-after:{number}@{state}*1", options)
    assert (type(err), err.code, err.errno) == (DeviceStateError, 15, getattr(errno, number))
    assert (err.wanted, f"it is in {state}" in str(err)) == (DeviceState[state], True)


@pytest.mark.parametrize("state", ["STOP_COPY", "PRE_COPY", "STOP", "RUNNING"])
def test_a_state_change_that_was_done_and_failed(tmp_path: Path, state: str) -> None:
    options = PRE_COPY if state == "PRE_COPY" else PLAIN
    err = failed_save(tmp_path, f"fault=set-after:EFAULT@{state}*1", options)
    assert (type(err), err.code, err.errno) == (DeviceStateError, 6, errno.EFAULT)
    assert f"it is in {state}" in str(err)


def test_what_the_device_does_not_offer_is_not_asked_for(tmp_path: Path) -> None:
    with Simulated("sim:?profile=xe&size=5000") as device:
        err = failure_of(lambda: save(device, tmp_path / "out", PRE_COPY))
        assert (type(err), err.code) == (NotMigratableError, 3)
        err = failure_of(lambda: device.set_state(S.PRE_COPY))
        assert (type(err), err.code, err.wanted) == (IllegalArcError, 3, S.PRE_COPY)
        save(device, tmp_path / "out")


def test_a_second_session_while_one_is_open_is_out_of_sync(tmp_path: Path) -> None:
    query = "fault=async-reset:set@PRE_COPY_P2P*1"
    err = failed_save(tmp_path, query, PRE_COPY, lost=True)
    assert (type(err), err.code, err.errno) == (OutOfSyncError, 6, errno.EBADF)
    assert "reset by somebody else" in str(err)


# A17, A19.


@pytest.mark.parametrize("options", [PLAIN, PRE_COPY], ids=["plain", "pre-copy"])
@pytest.mark.parametrize("most", [0, 1, 4096, 300_000])
def test_a_state_larger_than_allowed_is_a_limit(
    tmp_path: Path, most: int, options: SaveOptions
) -> None:
    limited = SaveOptions(pre_copy=options.pre_copy, max_state_bytes=most)
    with Simulated("sim:?size=300001") as device:
        before = device.content()
        err = failure_of(lambda: save(device, tmp_path / "out", limited))
        assert (type(err), err.code, err.actual) == (ResourceLimitError, 15, S.RUNNING)
        assert f"larger than the {most} bytes allowed" in str(err)
        assert (device.state(), device.content(), names_in(tmp_path)) == (S.RUNNING, before, [])


def test_a_state_exactly_as_large_as_allowed_is_saved(tmp_path: Path) -> None:
    with Simulated("sim:?size=300001") as device:
        report = save(device, tmp_path / "out", SaveOptions(max_state_bytes=300_001))
    assert report.device_bytes == 300_001


def test_a_device_that_never_converges_is_bounded(tmp_path: Path) -> None:
    options = SaveOptions(pre_copy=PreCopyLimits(rounds=1 << 30), max_state_bytes=8 << 20)
    with Simulated("sim:?size=1M&dirty=10G") as device:
        err = failure_of(lambda: save(device, tmp_path / "out", options))
        assert (err.code, device.state()) == (15, S.RUNNING)


# A20 to A22.


@pytest.mark.parametrize("reported", ["0", "1", "1000", "30000", "1T", "max", "error", "ENOTTY"])
@pytest.mark.parametrize("framing", ["native", QemuFraming()], ids=["native", "qemu"])
def test_a_size_that_lies_does_no_harm(
    tmp_path: Path, reported: str, framing: str | QemuFraming
) -> None:
    options = SaveOptions(framing=framing, pre_copy=PreCopyLimits())
    with Simulated(f"sim:?size=2000001&reported_size={reported}") as device:
        report = save(device, tmp_path / "out", options)
        unknown = reported in ("error", "ENOTTY")
        assert any("does not tell its size" in text for text in report.warnings) is unknown
    assert inspect(tmp_path / "out").digest == report.digest


@pytest.mark.parametrize("number", ["EIO", "ENOTTY", "EINVAL", "ENODEV"])
def test_pre_copy_sizes_that_cannot_be_read_end_the_save(tmp_path: Path, number: str) -> None:
    err = failed_save(tmp_path, f"fault=info:{number}*1", PRE_COPY)
    assert (type(err), err.code, err.errno) == (DeviceIOError, 6, getattr(errno, number))
    assert "does not tell its pre-copy sizes" in str(err)


@pytest.mark.parametrize(
    "fault",
    ["info:GARBAGE", "info:GARBAGE*1", "info:REINIT", "info:REINIT*2"],
)
def test_pre_copy_sizes_that_cannot_be_are_only_hints(tmp_path: Path, fault: str) -> None:
    with Simulated(f"sim:?size=300001&dirty=1M&fault={fault}") as device:
        report = save(device, tmp_path / "out", PRE_COPY)
        content = device.content()
    assert inspect(tmp_path / "out").digest == report.digest
    with Simulated("sim:?size=300001") as destination:
        load(tmp_path / "out", destination)
        assert destination.content() == content


# E14, F9: descriptors.


def test_no_descriptor_of_ours_is_inherited(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    inherited: list[str] = []

    def look(_: Event) -> None:
        for name in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                if os.get_inheritable(int(name)):
                    inherited.append(os.readlink(f"/proc/self/fd/{name}"))

    options = SaveOptions(pre_copy=PreCopyLimits(), chunk_events=True)
    with Simulated("sim:?size=300001&chunk=64K") as device:
        report = save(device, tmp_path / "out", options, on_event=look)
        load(tmp_path / "out", device, on_event=look)
    assert len(report.state_changes) == 6
    assert inherited == []


def test_every_missing_descriptor_is_an_error_that_leaves_the_device_running(
    tmp_path: Path,
) -> None:
    """The n-th descriptor that is opened is one too many, for each n until all are there."""

    def attempt(spare: int) -> None:
        with Simulated("sim:?size=300001") as device:
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, 4096))
            try:
                save(device, tmp_path / "out", PRE_COPY)
            except (MigrationError, OSError) as err:
                is_limit = err.errno == errno.EMFILE and getattr(err, "code", 15) in (10, 15)
                os._exit(1 if is_limit and device.state() is S.RUNNING else 2)
            os._exit(0)

    codes: list[int] = []
    while not codes or codes[-1] == 1:
        assert len(codes) < 40
        if (child := os.fork()) == 0:
            attempt(len(codes))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes[-1] == 0
    assert len(codes) > 4
    assert names_in(tmp_path) == ["out"]


def test_both_sides_count_the_same_frames_in_qemu_framing(tmp_path: Path) -> None:
    options = SaveOptions(framing=QemuFraming(), pre_copy=PreCopyLimits(), config=b"blob")
    with Simulated("sim:?size=300001") as device:
        report = save(device, tmp_path / "out", options)
    assert report.frames == inspect(tmp_path / "out").frames
