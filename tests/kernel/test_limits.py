"""Descriptors that run out, and sessions that somebody else ends: the device runs afterwards."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from kernel.command import start
from kernel.mtty import DESTINATION, SOURCE, Mtty
from kernel.streams import piped
from vfiomig import (
    Device,
    DeviceIOError,
    DeviceState,
    DeviceStateError,
    MigrationError,
    PreCopyLimits,
    SaveOptions,
    load,
    save,
)
from vfiomig.backends import borrow
from vfiomig.fd import OwnedFd
from vfiomig.report import Event, OnEvent, StateChange


@contextmanager
def descriptors_run_out_after(state: DeviceState) -> Iterator[OnEvent]:
    """Give an on_event: once state is reached, this process can open nothing more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:

        def watch(event: Event) -> None:
            if isinstance(event, StateChange) and event.wanted is state and not event.errno:
                use_them_up(taken)

        yield watch
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def use_them_up(taken: ExitStack) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    with contextlib.suppress(OSError):
        while True:
            taken.enter_context(OwnedFd(os.dup(0)))


def test_a_session_without_a_descriptor_ends_a_save_and_the_device_runs(source: Mtty) -> None:
    with source.opened() as mtty, descriptors_run_out_after(DeviceState.STOP) as watch:
        err, events = failure_of_save(mtty.device, watch)
        assert mtty.device.state() is DeviceState.RUNNING
    assert isinstance(err, DeviceStateError)
    assert (err.code, err.errno, err.wanted) == (15, errno.EMFILE, DeviceState.STOP_COPY)
    assert (err.actual, err.aftermath) == (DeviceState.RUNNING, f"{source.uuid} is RUNNING")
    # The kernel had moved the device: only the descriptor was missing.
    failed = [(event.wanted, event.actual) for event in events if event.errno]
    assert failed == [(DeviceState.STOP_COPY, DeviceState.STOP_COPY)]
    assert source.is_untouched(SOURCE)


def test_a_session_without_a_descriptor_ends_a_load_and_the_device_runs(
    stream: bytes, destination: Mtty
) -> None:
    with destination.opened() as mtty, piped(stream) as read_end:
        with (
            descriptors_run_out_after(DeviceState.STOP) as watch,
            pytest.raises(DeviceStateError) as caught,
        ):
            load(read_end, mtty.device, on_event=watch)
        assert mtty.device.state() is DeviceState.RUNNING
    err = caught.value
    assert (err.code, err.errno, err.wanted) == (15, errno.EMFILE, DeviceState.RESUMING)
    assert "was reset and is RUNNING; nothing is loaded" in err.aftermath
    assert destination.is_untouched(DESTINATION)


@pytest.mark.parametrize("free", range(3, 14))
def test_with_few_descriptors_a_command_works_or_says_so(source: Mtty, free: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))

    with start("save", source.uuid, "/dev/null", before=limit) as saving:
        done = saving.finish()
    assert done.code in (0, 10, 15), done.err
    assert done.code == 0 or "Too many open files" in done.err
    assert source.is_untouched(SOURCE)


def test_a_reset_by_somebody_else_ends_a_save(source: Mtty) -> None:
    with source.opened() as mtty, borrow(f"fd:{mtty.device_fd}") as other:
        err, _ = failure_of_save(mtty.device, resets(other, DeviceState.STOP_COPY))
        assert mtty.device.state() is DeviceState.RUNNING
    assert isinstance(err, DeviceIOError)
    assert (err.code, err.errno, err.actual) == (6, errno.ENODEV, DeviceState.RUNNING)
    assert "was reset during the copy, at byte 0 of about 96" in str(err)


def test_a_reset_by_somebody_else_in_precopy_ends_a_save(source: Mtty) -> None:
    options = SaveOptions(pre_copy=PreCopyLimits())
    with source.opened() as mtty, borrow(f"fd:{mtty.device_fd}") as other:
        err, _ = failure_of_save(mtty.device, resets(other, DeviceState.PRE_COPY), options)
        assert mtty.device.state() is DeviceState.RUNNING
    assert isinstance(err, DeviceIOError)
    assert err.actual is DeviceState.RUNNING
    assert source.is_untouched(SOURCE)


def resets(other: Device, after: DeviceState) -> OnEvent:
    def on_event(event: Event) -> None:
        if isinstance(event, StateChange) and event.wanted is after:
            other.reset()

    return on_event


def failure_of_save(
    device: Device, on_event: OnEvent, options: SaveOptions | None = None
) -> tuple[MigrationError, list[StateChange]]:
    """Return how a save fails, and the state changes on the way."""
    changes: list[StateChange] = []

    def note(event: Event) -> None:
        if isinstance(event, StateChange):
            changes.append(event)
        on_event(event)

    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd), pytest.raises(MigrationError) as caught:
        save(device, write_fd, options or SaveOptions(), on_event=note)
    return caught.value, changes
