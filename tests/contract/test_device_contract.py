"""What every migratable device keeps to, whatever is behind it: linux/vfio.h, asked by DeviceOps.

The devices are in conftest.py. The oracle of the state machine is the kernel's own table.
"""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from contract.driving import (
    DeviceFactory,
    begun,
    enter,
    errno_of_read,
    errno_of_write,
    load,
    outcome,
    read_to_end,
    read_until_nothing,
    save,
    write_all,
)
from vfiomig.channel import DataChannel
from vfiomig.device import DeviceOps
from vfiomig.errors import StaleChannelError
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

FSM = json.loads((Path(__file__).parents[1] / "data" / "fsm.json").read_text())
PRECOPY = (S.PRE_COPY, S.PRE_COPY_P2P)


def table_of(ops: DeviceOps) -> dict[str, Any]:
    flags = ops.get_migration_flags()
    found: dict[str, Any] = next(caps for caps in FSM["caps"].values() if caps["flags"] == flags)
    return found


def states_of(ops: DeviceOps) -> list[S]:
    return [S[name] for name in table_of(ops)["matrix"] if name != "ERROR"]


def needs(ops: DeviceOps, capability: Capability) -> None:
    if not ops.get_migration_flags() & capability:
        pytest.skip(f"the device has no {capability.name}")


def test_a_new_device_runs(ops: DeviceOps) -> None:
    assert ops.get_device_state() is S.RUNNING


@pytest.mark.parametrize("start", [state for state in S if state is not S.ERROR])
def test_every_target_is_answered_as_by_the_kernel(device_factory: DeviceFactory, start: S) -> None:
    table = table_of(device_factory())
    if start.name not in table["matrix"]:
        pytest.skip(f"the device has no {start.name}")
    stream = save(device_factory())
    found, expected = {}, {}
    for target in [*S, S(8), S(1000)]:
        ops = device_factory()
        enter(ops, start, stream)
        channel: list[DataChannel | None] = [None]

        def ask(ops: DeviceOps = ops, target: S = target, got: list[Any] = channel) -> None:
            got[0] = ops.set_device_state(target)

        error = outcome(ask)
        found[target.name] = (error, ops.get_device_state(), channel[0] is not None)
        path = table["matrix"][start.name].get(target.name)
        if path is None:
            expected[target.name] = (errno.EINVAL, start, False)
        else:
            gives = table["data_fd"][start.name][target.name] is not None
            expected[target.name] = (0, target, gives)
        ops.close()
    assert found == expected


def test_a_stopped_device_saves_the_same_twice(ops: DeviceOps) -> None:
    first = save(ops)
    assert ops.get_device_state() is S.STOP
    assert save(ops) == first


def test_what_is_loaded_is_what_is_saved(device_factory: DeviceFactory) -> None:
    stream = save(device_factory())
    destination = device_factory()
    destination.reset_device()
    load(destination, stream)
    assert destination.get_device_state() is S.STOP
    assert save(destination) == stream
    destination.set_device_state(S.RUNNING)
    assert destination.get_device_state() is S.RUNNING


def test_a_stream_may_be_written_a_byte_at_a_time(device_factory: DeviceFactory) -> None:
    stream = save(device_factory())
    head, rest = stream[:300], stream[300:]
    destination = device_factory()
    channel = begun(destination, S.RESUMING)
    for byte in head:
        write_all(channel, bytes([byte]))
    write_all(channel, rest)
    assert channel.failure() is None
    destination.set_device_state(S.STOP)
    assert save(destination) == stream


def test_the_end_of_a_save_stays_the_end(ops: DeviceOps) -> None:
    channel = begun(ops, S.STOP_COPY)
    read_to_end(channel)
    assert os.read(channel.fileno(), 10) == b""
    assert channel.failure() is None


def test_a_closed_save_begins_again_after_stop(ops: DeviceOps) -> None:
    needs_reading = save(ops)
    channel = begun(ops, S.STOP_COPY)
    read_to_end(channel)
    channel.close()
    assert ops.get_device_state() is S.STOP_COPY
    assert ops.set_device_state(S.STOP_COPY) is None
    ops.set_device_state(S.STOP)
    assert save(ops) == needs_reading


def test_precopy_and_stop_copy_are_one_stream(device_factory: DeviceFactory) -> None:
    source, destination = device_factory(), device_factory()
    needs(source, Capability.PRE_COPY)
    channel = begun(source, S.PRE_COPY)
    stream = b""
    for _ in range(3):
        piece, error = read_until_nothing(channel)
        assert error in (0, errno.ENOMSG)
        stream += piece
        channel.precopy_info()
    assert source.set_device_state(S.STOP_COPY) is None
    stream += read_to_end(channel)
    destination.reset_device()
    load(destination, stream)
    source.set_device_state(S.STOP)
    assert save(destination) == save(source)


def test_unread_precopy_data_is_read_in_stop_copy(device_factory: DeviceFactory) -> None:
    source, destination = device_factory(), device_factory()
    needs(source, Capability.PRE_COPY)
    channel = begun(source, S.PRE_COPY)
    source.set_device_state(S.STOP_COPY)
    load(destination, read_to_end(channel))
    source.set_device_state(S.STOP)
    assert save(destination) == save(source)


def test_initial_bytes_fall_to_nothing_as_they_are_read(ops: DeviceOps) -> None:
    needs(ops, Capability.PRE_COPY)
    channel = begun(ops, S.PRE_COPY)
    before = channel.precopy_info()
    assert before.initial_bytes > 0
    piece, _ = read_until_nothing(channel)
    assert len(piece) >= before.initial_bytes
    assert channel.precopy_info().initial_bytes == 0


def test_precopy_info_is_only_there_in_precopy(ops: DeviceOps) -> None:
    needs(ops, Capability.PRE_COPY)
    for state in (state for state in PRECOPY if state in states_of(ops)):
        channel = begun(ops, state)
        channel.precopy_info()
        ops.set_device_state(S.STOP_COPY)
        assert outcome(channel.precopy_info) == errno.EINVAL
        ops.set_device_state(S.RUNNING)
        assert outcome(channel.precopy_info) in (errno.ENODEV, errno.EINVAL)
        channel.close()


def test_precopy_info_is_not_there_in_other_sessions(ops: DeviceOps) -> None:
    channel = begun(ops, S.STOP_COPY)
    found = outcome(channel.precopy_info)
    assert found in (errno.EINVAL, errno.ENOTTY)
    read_to_end(channel)
    channel.close()
    channel = begun(ops, S.RESUMING)
    assert outcome(channel.precopy_info) == errno.ENOTTY


def test_precopy_may_be_given_up(ops: DeviceOps) -> None:
    needs(ops, Capability.PRE_COPY)
    before = save(ops)
    ops.set_device_state(S.RUNNING)
    channel = begun(ops, S.PRE_COPY)
    os.read(channel.fileno(), 10)
    ops.set_device_state(S.RUNNING)
    assert errno_of_read(channel) == errno.ENODEV
    channel.close()
    assert len(save(ops)) == len(before)


def test_a_reset_ends_every_session_and_the_device_runs(device_factory: DeviceFactory) -> None:
    stream = save(device_factory())
    for state in states_of(device_factory()):
        ops = device_factory()
        channel = enter(ops, state, stream)
        ops.reset_device()
        assert ops.get_device_state() is S.RUNNING
        if channel is not None:
            asks = errno_of_write if state is S.RESUMING else errno_of_read
            assert asks(channel) == errno.ENODEV
            channel.close()
        load(ops, stream)
        assert save(ops) == stream
        ops.close()


def test_an_aborted_load_changes_nothing_before_the_commit(ops: DeviceOps) -> None:
    channel = begun(ops, S.RESUMING)
    channel.close()
    ops.reset_device()
    blank = save(ops)
    ops.set_device_state(S.RUNNING)
    channel = begun(ops, S.RESUMING)
    write_all(channel, blank[:20])
    channel.close()
    ops.reset_device()
    assert save(ops) == blank


def test_closing_a_channel_changes_no_state(device_factory: DeviceFactory) -> None:
    stream = save(device_factory())
    for state in states_of(device_factory()):
        ops = device_factory()
        channel = enter(ops, state, stream)
        if channel is not None:
            channel.close()
            channel.close()
            with pytest.raises(StaleChannelError):
                channel.fileno()
        assert ops.get_device_state() is state
        assert ops.set_device_state(state) is None
        ops.close()


def test_a_load_whose_channel_is_closed_can_be_committed(device_factory: DeviceFactory) -> None:
    stream = save(device_factory())
    ops = device_factory()
    channel = begun(ops, S.RESUMING)
    write_all(channel, stream)
    channel.close()
    ops.set_device_state(S.STOP)
    assert save(ops) == stream


def test_the_last_close_of_the_device_ends_its_session(device_factory: DeviceFactory) -> None:
    for state in (S.STOP_COPY, S.RESUMING):
        ops = device_factory()
        channel = begun(ops, state)
        ops.close()
        asks = errno_of_write if state is S.RESUMING else errno_of_read
        # A file descriptor of a stopped state may still read; what it reads is then not trusted.
        assert asks(channel) == errno.ENODEV
        channel.close()


def test_a_data_fd_goes_one_way_and_does_not_survive_exec(ops: DeviceOps) -> None:
    channel = begun(ops, S.STOP_COPY)
    assert outcome(lambda: os.write(channel.fileno(), b"x")) == errno.EBADF
    assert fcntl.fcntl(channel.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not fcntl.fcntl(channel.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
    read_to_end(channel)
    channel.close()
    channel = begun(ops, S.RESUMING)
    assert outcome(lambda: os.read(channel.fileno(), 1)) == errno.EBADF
    assert fcntl.fcntl(channel.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not fcntl.fcntl(channel.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK


def test_the_size_query_answers_in_every_state(ops: DeviceOps) -> None:
    for state in states_of(ops):
        ops.reset_device()
        ops.set_device_state(state)
        assert ops.get_data_size() >= 0


def test_the_precopy_opt_in_is_there_with_precopy_only(ops: DeviceOps) -> None:
    assert ops.set_precopy_info_v2() is bool(ops.get_migration_flags() & Capability.PRE_COPY)


def test_a_device_leaves_no_descriptor_behind(device_factory: DeviceFactory) -> None:
    device_factory().close()  # whatever is opened once per process
    before = os.listdir("/proc/self/fd")
    ops = device_factory()
    stream = save(ops)
    ops.reset_device()
    load(ops, stream)
    for state in states_of(ops):
        ops.reset_device()
        channel = enter(ops, state, stream)
        if channel is not None:
            channel.close()
    ops.close()
    assert os.listdir("/proc/self/fd") == before
