"""The faults, and the pace, of simulated devices."""

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contract.driving import (
    begun,
    errno_of_read,
    errno_of_write,
    load,
    outcome,
    read_until_nothing,
    save,
    write_all,
)
from vfiomig.errors import ResourceLimitError, UsageError
from vfiomig.simulator.device import SimulatedOps
from vfiomig.uapi import DeviceState as S

Open = Callable[[str], SimulatedOps]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(SimulatedOps.open(url)))


@pytest.mark.parametrize("chunk", [1, 7, 1000, 4096, 6000, 70000])
def test_no_read_gives_more_than_a_chunk(chunk: int, opened: Open) -> None:
    size = min(chunk * 300, 200_000)
    ops = opened(f"sim:?size={size}&chunk={chunk}")
    channel = begun(ops, S.STOP_COPY)
    pieces = []
    while piece := os.read(channel.fileno(), 1 << 20):
        pieces.append(piece)
    assert max(len(piece) for piece in pieces) <= chunk
    assert b"".join(pieces) == ops.read_state()


def test_bandwidth_limits_reads_and_writes(opened: Open) -> None:
    ops = opened("sim:?size=1M&bandwidth=10M")
    started = time.monotonic()
    stream = save(ops)
    saved = time.monotonic()
    load(ops, stream)
    assert saved - started > 0.07
    assert time.monotonic() - saved > 0.07


def test_each_burst_of_reads_is_late(opened: Open) -> None:
    started = time.monotonic()
    save(opened("sim:?size=100K&chunk=10K&latency=5ms"))
    assert time.monotonic() - started >= 0.05


def test_the_reported_size_may_lie(opened: Open) -> None:
    assert opened("sim:?size=5").get_data_size() == 5
    assert opened("sim:?size=5&reported_size=1T").get_data_size() == 1 << 40
    assert opened("sim:?size=5&reported_size=0").get_data_size() == 0
    assert opened("sim:?size=5&reported_size=max").get_data_size() == 2**64 - 1
    for text, error in (("error", errno.EIO), ("ENOTTY", errno.ENOTTY)):
        ops = opened(f"sim:?size=5&reported_size={text}")
        assert outcome(ops.get_data_size) == error


@pytest.mark.parametrize("state", [S.STOP_COPY, S.PRE_COPY])
@pytest.mark.parametrize("byte", [0, 1, 4096, 300_000])
def test_a_read_fails_at_its_byte(state: S, byte: int, opened: Open) -> None:
    ops = opened(f"sim:?size=300000&fault=read:EIO@{byte}*1")
    channel = begun(ops, state)
    stream, error = read_until_nothing(channel)
    assert (len(stream), error) == (byte, errno.EIO)
    assert errno_of_read(channel) == errno.EIO
    ops.set_device_state(S.STOP)
    assert len(save(ops)) == 300_000  # it happens once


@pytest.mark.parametrize("byte", [0, 4096, 299_999])
def test_a_write_fails_at_its_byte(byte: int, opened: Open) -> None:
    ops = opened(f"sim:?size=300000&fault=write:ENOSPC@{byte}*1")
    stream = ops.read_state()
    channel = begun(ops, S.RESUMING)
    error = outcome(lambda: write_all(channel, stream))
    assert error in (0, errno.EPIPE)
    assert errno_of_write(channel) == errno.ENOSPC
    ops.reset_device()
    load(ops, stream)
    assert ops.read_state() == stream


def test_a_write_that_does_not_reach_the_byte_does_not_fail(opened: Open) -> None:
    ops = opened("sim:?size=4K&fault=write:ENOSPC@4K")
    load(ops, ops.read_state())


def test_a_state_change_fails_and_changes_nothing(opened: Open) -> None:
    ops = opened("sim:?size=4K&fault=set:EIO@STOP_COPY*2")
    for _ in range(2):
        assert outcome(lambda: ops.set_device_state(S.STOP_COPY)) == errno.EIO
        assert ops.get_device_state() is S.STOP
    save(ops)


def test_a_state_change_fails_into_error(opened: Open) -> None:
    ops = opened("sim:?size=4K&fault=set:EIO@STOP:ERROR*1")
    channel = begun(ops, S.PRE_COPY)
    assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EIO
    assert ops.get_device_state() is S.ERROR
    assert errno_of_read(channel) == errno.ENODEV
    assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EINVAL
    ops.reset_device()
    assert ops.get_device_state() is S.RUNNING


def test_a_state_change_may_be_done_and_fail(opened: Open) -> None:
    ops = opened("sim:?size=4K&fault=set-after:EMFILE@STOP_COPY*1")
    assert outcome(lambda: ops.set_device_state(S.STOP_COPY)) == errno.EMFILE
    assert ops.get_device_state() is S.STOP_COPY
    ops.set_device_state(S.STOP)
    save(ops)


@pytest.mark.parametrize(
    ("fault", "ask"),
    [
        ("get:EIO", SimulatedOps.get_device_state),
        ("caps:ENOTTY", SimulatedOps.get_migration_flags),
        ("size:EIO", SimulatedOps.get_data_size),
        ("reset:EIO", SimulatedOps.reset_device),
    ],
)
def test_a_request_fails_as_often_as_it_is_told(
    fault: str, ask: Callable[[SimulatedOps], object], opened: Open
) -> None:
    ops = opened(f"sim:?size=4K&fault={fault}*2")
    number = getattr(errno, fault.partition(":")[2])
    assert [outcome(lambda: ask(ops)) for _ in range(3)] == [number, number, 0]


def test_precopy_info_may_fail_lie_or_start_over(opened: Open) -> None:
    ops = opened("sim:?size=4K&fault=info:EBUSY*1&fault=info:GARBAGE*1&fault=info:REINIT*2")
    channel = begun(ops, S.PRE_COPY)
    read_until_nothing(channel)
    assert outcome(channel.precopy_info) == errno.EBUSY
    assert channel.precopy_info().dirty_bytes == 2**64 - 1
    assert not channel.precopy_info().reinit  # without the opt-in
    assert ops.set_precopy_info_v2()
    found = channel.precopy_info()
    assert found.reinit
    assert found.initial_bytes > 8192
    read_until_nothing(channel)
    assert channel.precopy_info().initial_bytes == 0


@pytest.mark.parametrize("state", [S.STOP_COPY, S.PRE_COPY])
def test_a_reset_underneath_ends_a_save(state: S, opened: Open) -> None:
    ops = opened("sim:?size=100000&fault=async-reset:read@4096*1")
    channel = begun(ops, state)
    stream, error = read_until_nothing(channel)
    assert (len(stream), error) == (4096, errno.ENODEV)
    assert ops.get_device_state() is S.RUNNING
    assert ops.read_state() == bytes(100000)
    assert outcome(channel.precopy_info) == errno.ENODEV
    assert len(save(ops)) == 100000


def test_a_reset_underneath_ends_a_load(opened: Open) -> None:
    ops = opened("sim:?size=100000&fault=async-reset:write@4096*1")
    channel = begun(ops, S.RESUMING)
    assert outcome(lambda: write_all(channel, bytes(100000))) in (0, errno.EPIPE)
    assert errno_of_write(channel) == errno.ENODEV
    assert ops.get_device_state() is S.RUNNING


def test_a_reset_underneath_follows_a_state_change(opened: Open) -> None:
    ops = opened("sim:?size=100000&fault=async-reset:set@STOP_COPY*1")
    channel = begun(ops, S.STOP_COPY)
    assert ops.get_device_state() is S.RUNNING
    assert errno_of_read(channel) == errno.ENODEV


@pytest.mark.parametrize("state", [S.STOP_COPY, S.PRE_COPY])
def test_what_is_left_in_the_pipe_of_an_ended_session_is_lost(state: S, opened: Open) -> None:
    channel = begun(ops := opened("sim:?size=100K&chunk=20K"), state)
    os.read(channel.fileno(), 10)
    ops.set_device_state(S.STOP)
    assert read_until_nothing(channel) == (b"", errno.ENODEV)


@pytest.mark.parametrize("place", ["read:4096", "set:STOP_COPY", "get", "reset", "write:4096"])
def test_a_hang_is_only_a_delay(place: str, opened: Open) -> None:
    ops = opened(f"sim:?size=8K&fault=hang:30ms@{place}*1")
    started = time.monotonic()
    ops.get_device_state()
    stream = save(ops)
    load(ops, stream)
    ops.reset_device()
    assert time.monotonic() - started >= 0.03


@pytest.mark.parametrize("place", ["read:4096", "set:STOP_COPY"])
def test_a_close_ends_a_hang(place: str, opened: Open) -> None:
    ops = opened(f"sim:?size=8K&fault=hang:10m@{place}")
    found: list[Any] = []

    def work() -> None:
        try:
            channel = begun(ops, S.STOP_COPY)
            found.append(read_until_nothing(channel)[1])
        except OSError as err:
            found.append(err.errno)

    thread = threading.Thread(target=work)
    thread.start()
    ops.close()
    thread.join()
    assert found[0] in (errno.ENODEV, errno.EBADF)


@pytest.mark.parametrize(
    "fault", ["read:EIO@100", "write:EIO@100", "async-reset:read", "hang:1h@read"]
)
def test_faults_leave_no_descriptor_and_no_thread(fault: str) -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count()
    for state in (S.STOP_COPY, S.PRE_COPY, S.RESUMING):
        ops = SimulatedOps.open(f"sim:?size=100000&fault={fault}")
        channel = begun(ops, state)
        if state is S.RESUMING:
            outcome(partial(write_all, channel, bytes(500)))
        channel.close()
        ops.close()
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before


@pytest.mark.parametrize("left", range(14))
@pytest.mark.parametrize(
    "url", ["sim:?size=100K", "sim:?size=100K&bandwidth=1G", "sim:?profile=qat"]
)
def test_without_descriptors_it_fails_and_leaves_none_behind(left: int, url: str) -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in before[0]}
    free = [number for number in range(1000) if number not in taken]
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[left], limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with suppress(ResourceLimitError):
            ops = stack.enter_context(closing(SimulatedOps.open(url)))
            for state in (S.STOP_COPY, S.RESUMING, S.PRE_COPY):
                with suppress(OSError):
                    ops.reset_device()
                    channel = stack.enter_context(closing(begun(ops, state)))
                    if state is S.PRE_COPY:
                        read_until_nothing(channel)
                        ops.set_device_state(S.STOP_COPY)
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before


def test_no_signal_is_delivered_to_the_threads(opened: Open) -> None:
    begun(opened("sim:?size=4M&chunk=4K"), S.STOP_COPY)
    thread = next(thread for thread in threading.enumerate() if "feeder" in thread.name)
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if "SigBlk" in line).split()[1], 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        assert blocked >> (number - 1) & 1


@pytest.mark.parametrize(
    "fault",
    [
        "raed:EIO",
        "read:EWHAT",
        "read:EIO@x",
        "set:EIO@NOWHERE",
        "set:EIO@STOP:RUNNING",
        "get:EIO@4096",
        "hang:5@set",
        "hang:5s@size",
        "async-reset:get",
        "read:EIO*0",
        "read:EIO*x",
        "",
    ],
)
def test_unknown_faults_are_refused(fault: str) -> None:
    with pytest.raises(UsageError):
        SimulatedOps.open(f"sim:?fault={fault}")


def test_an_unknown_fault_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="known are read, write, set, set-after, get, caps"):
        SimulatedOps.open("sim:?fault=raed:EIO")
