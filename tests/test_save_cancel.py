"""save() is stopped: cancelled at every phase, by an event's exception, one of many."""

import errno
import fcntl
import os
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from devices import Simulated, Trigger, entered, failure_of, names_in, no_leak
from vfiomig import (
    Cancellation,
    CancelledError,
    Chunk,
    DeviceState,
    Event,
    PreCopyLimits,
    Progress,
    SaveOptions,
    StateChange,
    inspect,
    save,
)
from vfiomig.report import Warning as WarningEvent

S = DeviceState
OPTIONS = SaveOptions(pre_copy=PreCopyLimits(), chunk_events=True, buffer_bytes=1 << 16)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


def pre_copied(event: Event) -> bool:
    return isinstance(event, Chunk) and event.device_offset >= 100_000


def stop_copied(event: Event) -> bool:
    return isinstance(event, Chunk) and event.device_offset > 300_000


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "warning": lambda event: isinstance(event, WarningEvent),
    "progress": lambda event: isinstance(event, Progress),
    "first chunk": lambda event: isinstance(event, Chunk),
    "pre-copy": pre_copied,
    "stop-copy": stop_copied,
} | {
    state.name: entered(state)
    for state in (S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY, S.STOP, S.RUNNING_P2P, S.RUNNING)
}
URL = "sim:?size=300001&reported_size=error"


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_cancel_at_any_moment_rolls_back(tmp_path: Path, moment: Callable[[Event], bool]) -> None:
    with Simulated(URL) as device, closing(Cancellation()) as cancellation:
        before = device.content()
        trigger = Trigger(moment, cancellation.cancel)
        err = failure_of(
            lambda: save(
                device, tmp_path / "out", OPTIONS, on_event=trigger, cancellation=cancellation
            )
        )
        assert isinstance(err, CancelledError)
        assert trigger.fired
        assert (err.code, err.actual, device.state()) == (14, S.RUNNING, S.RUNNING)
        assert err.aftermath == f"{device.name} is RUNNING"
        assert (device.content(), names_in(tmp_path)) == (before, [])
        assert save(device, tmp_path / "out", OPTIONS).device_bytes >= len(before)


def test_a_cancel_before_the_beginning_changes_no_state(tmp_path: Path) -> None:
    events: list[Event] = []
    with Simulated("sim:?size=5000") as device, closing(Cancellation()) as cancellation:
        cancellation.cancel()
        with pytest.raises(CancelledError):
            save(device, tmp_path / "out", on_event=events.append, cancellation=cancellation)
        assert (device.state(), names_in(tmp_path)) == (S.RUNNING, [])


def test_a_cancel_that_comes_too_late_does_nothing(tmp_path: Path) -> None:
    with Simulated("sim:?size=5000") as device, closing(Cancellation()) as cancellation:
        report = save(device, tmp_path / "out", cancellation=cancellation)
        cancellation.cancel()
    assert inspect(tmp_path / "out").digest == report.digest


def wait_until_full(pipe_fd: int) -> None:
    """Return once nobody could write a page more."""
    most = fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ)
    while most - int.from_bytes(fcntl.ioctl(pipe_fd, termios.FIONREAD, bytes(4)), "little") > 4096:
        os.sched_yield()
        most = fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ)


def test_a_cancel_reaches_a_save_that_waits_for_its_reader() -> None:
    read_fd, write_fd = os.pipe()
    with (
        open(read_fd, "rb") as reader,
        open(write_fd, "wb", buffering=0) as writer,
        Simulated("sim:?size=8M") as device,
        closing(Cancellation()) as cancellation,
    ):

        def stop() -> None:
            wait_until_full(reader.fileno())
            cancellation.cancel()

        thread = threading.Thread(target=stop)
        thread.start()
        err = failure_of(lambda: save(device, writer, cancellation=cancellation))
        thread.join()
        assert (err.code, device.state()) == (14, S.RUNNING)


def test_of_many_saves_at_once_only_the_cancelled_one_fails(tmp_path: Path) -> None:
    results: dict[int, bool] = {}

    def one(index: int) -> None:
        url = f"sim:?size=2000001&seed={index}&chunk=100K"
        with Simulated(url) as device, closing(Cancellation()) as cancellation:
            wanted = entered(S.STOP_COPY) if index == 3 else lambda _: False
            trigger = Trigger(wanted, cancellation.cancel)
            try:
                report = save(
                    device, tmp_path / str(index), on_event=trigger, cancellation=cancellation
                )
            except CancelledError:
                results[index] = False
            else:
                results[index] = inspect(tmp_path / str(index)).digest == report.digest
            assert device.state() is S.RUNNING

    threads = [threading.Thread(target=one, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: index != 3 for index in range(8)}
    assert names_in(tmp_path) == ["0", "1", "2", "4", "5", "6", "7"]


# Exceptions of on_event.


class Odd(Exception):
    """What a caller's own code raises."""


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_an_exception_in_on_event_rolls_back_and_propagates(
    tmp_path: Path, moment: Callable[[Event], bool]
) -> None:
    raised: list[Event] = []

    def on_event(event: Event) -> None:
        if not raised and moment(event):
            raised.append(event)
            raise Odd("once")

    with Simulated(URL) as device:
        before = device.content()
        with pytest.raises(Odd, match="once"):
            save(device, tmp_path / "out", OPTIONS, on_event=on_event)
        assert (device.state(), device.content(), names_in(tmp_path)) == (S.RUNNING, before, [])
        save(device, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_an_on_event_that_goes_on_raising_cannot_stop_the_roll_back(
    tmp_path: Path, moment: Callable[[Event], bool]
) -> None:
    raised: list[Event] = []

    def on_event(event: Event) -> None:
        if raised or moment(event):
            raised.append(event)
            raise Odd(str(len(raised)))

    with Simulated(URL) as device:
        with pytest.raises(Odd, match=r"^1$"):
            save(device, tmp_path / "out", OPTIONS, on_event=on_event)
        assert (device.state(), names_in(tmp_path)) == (S.RUNNING, [])
        save(device, tmp_path / "out", OPTIONS)


def test_a_failed_state_change_is_reported_before_what_on_event_raises(tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, StateChange) and event.errno:
            raise Odd

    with Simulated("sim:?size=5000&fault=set:EIO@STOP_COPY*1") as device:
        err = failure_of(lambda: save(device, tmp_path / "out", on_event=on_event))
        assert (err.code, err.errno, device.state()) == (6, errno.EIO, S.RUNNING)
        assert err.__notes__ == ["on_event raised as well: Odd()"]
