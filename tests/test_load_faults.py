"""load() and a device that fails, a process that dies, an event that raises: matrix rows B."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices import Simulated, entered, failure_of, into_pipe, no_leak
from vfiomig import (
    Chunk,
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceState,
    DeviceStateError,
    Event,
    LoadOptions,
    MigrationError,
    Progress,
    QemuFraming,
    SaveOptions,
    StateChange,
    load,
    save,
)

S = DeviceState
SIZE = 300_001
EDGES = [0, 1, 4095, 4096, 65536, 150_000, SIZE - 1]
SCATTERED = [7919 * k % SIZE for k in range(1, 21)]
REFUSALS = ["EIO", "EINVAL", "ENOMEM", "ENOSPC", "EFAULT", "EMSGSIZE", "EPIPE"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """A file with the state of a device of SIZE bytes."""
    with Simulated(f"sim:?size={SIZE}&seed=1") as device:
        save(device, tmp_path / "stream")
    return tmp_path / "stream"


def failed_load(
    stream: Path,
    query: str,
    options: LoadOptions = LoadOptions(),  # noqa: B008
) -> MigrationError:
    """Load into a device with faults, which must fail; check what must be true of every failure."""
    with Simulated(f"sim:?size={SIZE}&seed=2&{query}") as device:
        before = device.content()
        err = failure_of(lambda: load(stream, device, options))
        assert device.state() is err.actual is S.RUNNING
        assert (err.device, err.phase) == (device.name, "load")
        expected = {
            f"{device.name} was reset and is RUNNING; nothing is loaded": bytes(SIZE),
            f"{device.name} is RUNNING with what it held before": before,
        }
        assert device.content() == expected[err.aftermath]
        load(stream, device)
        assert device.content() != before
    return err


# B1 to B3, B7: writes.


@pytest.mark.parametrize("shape", ["bandwidth=20M", "bandwidth=100M&chunk=1000"])
def test_a_slow_device_loads_the_same(
    stream: Path, shape: str, alarms: Callable[[Callable[[], object]], None]
) -> None:
    alarms(lambda: None)
    with Simulated(f"sim:?size={SIZE}&{shape}") as device:
        load(stream, device, LoadOptions(buffer_bytes=4096))
        with Simulated(f"sim:?size={SIZE}&seed=1") as source:
            assert device.content() == source.content()


@pytest.mark.parametrize("byte", [*EDGES, *SCATTERED])
def test_a_refused_write_ends_in_a_reset(stream: Path, byte: int) -> None:
    number = REFUSALS[byte % len(REFUSALS)]
    err = failed_load(stream, f"fault=write:{number}@{byte}*1")
    assert (type(err), err.code, err.errno) == (DeviceIOError, 6, getattr(errno, number))
    assert "refused its state at byte" in str(err)
    assert "was reset" in err.aftermath


@pytest.mark.parametrize("byte", EDGES)
def test_a_reset_underneath_is_told_as_such(stream: Path, byte: int) -> None:
    err = failed_load(stream, f"fault=async-reset:write@{byte}*1")
    assert (err.code, err.errno) == (6, errno.ENODEV)
    assert "was reset during the load" in str(err)


def test_a_reset_right_after_resuming_is_not_committed(stream: Path) -> None:
    err = failed_load(stream, "fault=async-reset:set@RESUMING*1")
    assert (err.code, err.errno) == (6, errno.ENODEV)


# Before RESUMING, B4, B10, and after the commit.


@pytest.mark.parametrize("number", ["EIO", "EINVAL", "EBUSY"])
@pytest.mark.parametrize("state", ["RUNNING_P2P", "STOP", "RESUMING"])
def test_a_device_that_does_not_get_to_resuming_keeps_its_state(
    stream: Path, state: str, number: str
) -> None:
    err = failed_load(stream, f"fault=set:{number}@{state}*1")
    assert (type(err), err.code, err.errno) == (DeviceStateError, 6, getattr(errno, number))
    assert "with what it held before" in err.aftermath
    assert err.wanted is DeviceState[state]


@pytest.mark.parametrize("state", ["STOP", "RESUMING"])
def test_a_device_in_error_is_reset(stream: Path, state: str) -> None:
    err = failed_load(stream, f"fault=set:EIO@{state}:ERROR*1")
    assert (err.code, err.errno, "was reset" in err.aftermath) == (6, errno.EIO, True)


@pytest.mark.parametrize("number", ["EMFILE", "EFAULT"])
def test_resuming_that_was_entered_and_failed_is_reset(stream: Path, number: str) -> None:
    err = failed_load(stream, f"fault=set-after:{number}@RESUMING*1")
    assert (err.code, err.errno) == (15 if number == "EMFILE" else 6, getattr(errno, number))
    assert "was reset" in err.aftermath


MISFITS = {
    "another size": ("sim:?size=5000", "sim:?size=5001&accept=exact", errno.EINVAL),
    "too large": ("sim:?size=5000", "sim:?size=4999&accept=fits", errno.EINVAL),
    "cut": ("sim:?size=5000", "sim:?size=6000&accept=complete", errno.EINVAL),
    "smaller xe": ("sim:?profile=xe&size=5000", "sim:?profile=xe&size=6000", errno.EIO),
    "smaller pds": ("sim:?profile=pds", "sim:?profile=pds&size=4096", errno.EINVAL),
}


@pytest.mark.parametrize(("source", "target", "number"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_refused(
    tmp_path: Path, source: str, target: str, number: int
) -> None:
    with Simulated(source) as device:
        save(device, tmp_path / "stream")
    with Simulated(target) as device:
        err = failure_of(lambda: load(tmp_path / "stream", device))
        assert (err.code, err.errno, err.actual) == (6, number, S.RUNNING)
        assert err.aftermath == f"{device.name} was reset and is RUNNING; nothing is loaded"
        assert device.state() is S.RUNNING
        assert not any(device.content())


def test_what_was_loaded_stays_when_only_the_resume_fails(stream: Path) -> None:
    # RUNNING_P2P is passed on the way down as well: the second time is the way back.
    with Simulated(f"sim:?size={SIZE}&fault=set:EIO@RUNNING*1") as device:
        err = failure_of(lambda: load(stream, device))
        assert (type(err), err.wanted, err.errno) == (DeviceStateError, S.RUNNING, errno.EIO)
        assert err.aftermath == f"{device.name} is RUNNING with what was loaded"
        assert device.state() is err.actual is S.RUNNING
        with Simulated(f"sim:?size={SIZE}&seed=1") as source:
            assert device.content() == source.content()


def test_a_device_that_will_not_run_is_reset_after_the_commit(stream: Path) -> None:
    err = failed_load(stream, "fault=set:EIO@RUNNING*2")
    assert (err.code, err.wanted, "nothing is loaded" in err.aftermath) == (6, S.RUNNING, True)


@pytest.mark.parametrize("fault", ["write:EIO@1000*1", "set:EIO@RESUMING:ERROR*1"])
def test_a_device_that_cannot_be_reset_is_code_20(stream: Path, fault: str) -> None:
    with Simulated(f"sim:?size={SIZE}&fault={fault}&fault=reset:EIO*1") as device:
        err = failure_of(lambda: load(stream, device))
        assert (type(err), err.code, err.errno) == (DeviceLostError, 20, errno.EIO)
        left = S.ERROR if "ERROR" in fault else S.RESUMING
        assert (err.wanted, err.actual, device.state()) == (S.RUNNING, left, left)
        assert isinstance(err.__cause__, DeviceIOError | DeviceStateError)
        with pytest.raises(DeviceBusyError, match=f"in {left.name} and not RUNNING"):
            load(stream, device)
        device.reset()
        load(stream, device)


@pytest.mark.parametrize(
    "state", [S.STOP, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY, S.RESUMING]
)
def test_a_device_that_somebody_left_is_not_touched(stream: Path, state: DeviceState) -> None:
    with Simulated(f"sim:?size={SIZE}") as device:
        device.set_state(state)
        err = failure_of(lambda: load(stream, device))
        assert (type(err), err.code, err.actual) == (DeviceBusyError, 5, state)
        assert device.state() is state


# B5: a driver that takes anything. The stream is what is checked.


@pytest.mark.parametrize("framing", ["native", QemuFraming()], ids=["native", "qemu"])
def test_a_cut_stream_never_gets_a_device_out_of_resuming(framing: str | QemuFraming) -> None:
    with Simulated("sim:?profile=mlx5&size=700") as device:
        options = SaveOptions(framing=framing, config=b"x" * 100)
        stream = into_pipe(lambda fd: save(device, fd, options))
    for length in range(0, len(stream), 16):
        changes: list[Event] = []
        with Simulated("sim:?profile=mlx5&size=700&seed=1") as device:
            before = device.content()
            with os.fdopen(os.memfd_create("cut"), "w+b") as file:
                file.write(stream[:length])
                file.seek(0)
                err = failure_of(lambda: load(file, device, on_event=changes.append))  # noqa: B023
            left = [(c.before, c.by) for c in changes if isinstance(c, StateChange)]
            assert (S.RESUMING, "set") not in left
            assert (err.code, device.state()) == (7, S.RUNNING)
            assert device.content() in (before, bytes(700))


# F10: events that raise.


class Odd(OSError):
    """What a caller's own code raises; an OSError, which is not to be taken for a device's."""


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "always": lambda _: True,
    "chunk": lambda event: isinstance(event, Chunk),
    "progress": lambda event: isinstance(event, Progress),
} | {state.name: entered(state) for state in (S.RUNNING_P2P, S.STOP, S.RESUMING, S.RUNNING)}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_an_exception_in_on_event_rolls_back_and_propagates(
    stream: Path, moment: Callable[[Event], bool]
) -> None:
    def on_event(event: Event) -> None:
        if moment(event):
            raise Odd

    with Simulated(f"sim:?size={SIZE}") as device:
        with pytest.raises(Odd):
            load(stream, device, LoadOptions(chunk_events=True), on_event=on_event)
        assert device.state() is S.RUNNING
        load(stream, device)


# A process that dies.


def test_a_killed_load_leaves_resuming_and_only_a_reset_helps(stream: Path, tmp_path: Path) -> None:
    url = f"sim:{tmp_path}/device?size={SIZE}"
    program = (
        "import sys, vfiomig\n"
        "def tell(event):\n"
        "    print(getattr(getattr(event, 'actual', None), 'name', ''), flush=True)\n"
        "with vfiomig.open_device(sys.argv[1]) as device:\n"
        "    vfiomig.load(sys.stdin.buffer, device, on_event=tell)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(stream.read_bytes()[:50_000])
        child.stdin.flush()
        assert any(line == b"RESUMING\n" for line in child.stdout)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with Simulated(url) as device:
        assert device.state() is S.RESUMING
        for job in (lambda: load(stream, device), lambda: save(device, tmp_path / "out")):
            err = failure_of(job)
            assert (err.code, err.actual, device.state()) == (5, S.RESUMING, S.RESUMING)
            assert "reset" in err.hint
        device.reset()
        load(stream, device)
        assert device.state() is S.RUNNING
