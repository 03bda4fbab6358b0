"""The pre-copy of simulated devices: what changes, what is read again, and the replay."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.driving import (
    begun,
    load,
    outcome,
    read_to_end,
    read_until_nothing,
    write_all,
)
from vfiomig.channel import DataChannel
from vfiomig.fd import OwnedFd
from vfiomig.simulator import precopy
from vfiomig.simulator.content import Dirtier
from vfiomig.simulator.device import SimulatedOps
from vfiomig.simulator.profiles import PROFILES
from vfiomig.simulator.updates import find_updates
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

Open = Callable[[str], SimulatedOps]
Begin = Callable[[SimulatedOps, S], DataChannel]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(SimulatedOps.open(url)))


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Enter a state that begins a session, whose channel is closed after the test."""
    with ExitStack() as stack:
        yield lambda ops, state: stack.enter_context(closing(begun(ops, state)))


@pytest.mark.parametrize("profile", ["generic", "mlx5", "virtio"])
def test_a_device_that_changes_while_it_is_saved_arrives_as_it_was_stopped(
    profile: str, opened: Open
) -> None:
    source = opened(f"sim:?profile={profile}&size=400000&dirty=200M&seed=5")
    destination = opened(f"sim:?profile={profile}&size=400000")
    before = source.state_digest()
    channel = begun(source, S.PRE_COPY)
    stream = b""
    for _ in range(20):
        stream += read_until_nothing(channel)[0]
        channel.precopy_info()
    source.set_device_state(S.STOP_COPY)
    stream += read_to_end(channel)
    assert source.state_digest() != before
    load(destination, stream)
    assert destination.state_digest() == source.state_digest()


def test_precopy_never_converges_when_the_device_is_faster(opened: Open) -> None:
    ops = opened("sim:?size=1M&dirty=1G")
    channel = begun(ops, S.PRE_COPY)
    for _ in range(10):
        read_until_nothing(channel)
        assert channel.precopy_info().dirty_bytes > 0
    ops.set_device_state(S.PRE_COPY_P2P)
    read_until_nothing(channel)
    assert channel.precopy_info().dirty_bytes == 0


def test_new_data_comes_only_by_asking_after_all_was_read(opened: Open) -> None:
    ops = opened("sim:?size=1M&dirty=1G&bandwidth=1G")
    channel = begun(ops, S.PRE_COPY)
    os.read(channel.fileno(), 10)
    assert channel.precopy_info().initial_bytes > 900_000
    first, error = read_until_nothing(channel)
    assert error == errno.ENOMSG
    assert len(first) < 1_100_000
    assert read_until_nothing(channel) == (b"", errno.ENOMSG)
    channel.precopy_info()
    assert len(read_until_nothing(channel)[0]) > 0


def test_initial_can_be_less_than_the_state(opened: Open) -> None:
    channel = begun(opened("sim:?size=1M&initial=64K"), S.PRE_COPY)
    info = channel.precopy_info()
    assert info.initial_bytes == 65536
    assert info.dirty_bytes > 900_000
    rest = 65536
    while rest:
        rest -= len(os.read(channel.fileno(), rest))
    assert channel.precopy_info().initial_bytes == 0


def test_virtio_gives_a_whole_new_copy_once_a_second(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = begun(opened("sim:?profile=virtio&size=100000"), S.PRE_COPY)
    read_until_nothing(channel)
    assert channel.precopy_info().dirty_bytes == 0
    monkeypatch.setattr(precopy, "_COPY_EVERY_NS", 0)
    for _ in range(3):
        assert channel.precopy_info().dirty_bytes > 100000
        assert len(read_until_nothing(channel)[0]) > 100000


def test_how_a_precopy_says_nothing_now_can_be_chosen(opened: Open) -> None:
    for end, error in (("enomsg", errno.ENOMSG), ("zero", 0)):
        channel = begun(opened(f"sim:?size=4K&precopy_end={end}"), S.PRE_COPY)
        assert read_until_nothing(channel)[1] == error
    for name, profile in PROFILES.items():
        if profile.capabilities & Capability.PRE_COPY:
            channel = begun(opened(f"sim:?profile={name}"), S.PRE_COPY)
            assert read_until_nothing(channel)[1] == profile.drained_errno


def test_header_profiles_give_their_header_first(opened: Open) -> None:
    for name, header_bytes in (("mtty", 24), ("hisi", 40), ("qat", 16)):
        ops = opened(f"sim:?profile={name}&dirty=1G")
        channel = begun(ops, S.PRE_COPY)
        head, _ = read_until_nothing(channel)
        assert len(head) == header_bytes
        assert channel.precopy_info().dirty_bytes == 0
        ops.set_device_state(S.STOP_COPY)
        assert head + read_to_end(channel) == ops.read_state()


# What MIG_DATA_SIZE says in a pre-copy: what STOP_COPY would still give.

CHANGING = "sim:?size=300000&dirty=1G&seed=3"
STEADY = [
    "sim:?size=300000",
    "sim:?size=300000&initial=1000",
    "sim:?profile=virtio&size=30000",
    "sim:?profile=mtty",
    "sim:?profile=mtty-1",
]


@pytest.mark.parametrize("unread", [0, 1, 20])
@pytest.mark.parametrize("url", STEADY)
def test_the_size_in_a_precopy_is_what_is_left_to_the_byte(
    url: str, unread: int, opened: Open, begin: Begin
) -> None:
    ops = opened(url)
    whole = ops.get_data_size()
    channel = begin(ops, S.PRE_COPY)
    left = ops.get_data_size()
    assert left >= whole
    first = channel.precopy_info()
    early = os.read(channel.fileno(), first.initial_bytes + first.dirty_bytes - unread)
    assert ops.get_data_size() == left - len(early)
    ops.set_device_state(S.STOP_COPY)
    assert ops.get_data_size() == left - len(early)
    assert len(read_to_end(channel)) == left - len(early)
    assert ops.get_data_size() == 0
    ops.set_device_state(S.STOP)
    assert ops.get_data_size() == whole


def test_the_size_in_a_precopy_follows_what_became_dirty(opened: Open, begin: Begin) -> None:
    ops = opened(CHANGING)
    channel = begin(ops, S.PRE_COPY)
    read_until_nothing(channel)
    for _ in range(3):
        dirty_bytes = channel.precopy_info().dirty_bytes
        assert ops.get_data_size() >= dirty_bytes > 0
        read_until_nothing(channel)
    ops.set_device_state(S.PRE_COPY_P2P)
    left = ops.get_data_size()
    ops.set_device_state(S.STOP_COPY)
    assert ops.get_data_size() == left == len(read_to_end(channel))


def test_drivers_that_always_say_the_same_size_do_so_in_a_precopy(
    opened: Open, begin: Begin
) -> None:
    for name in ("hisi", "qat"):
        ops = opened(f"sim:?profile={name}")
        reported = ops.get_data_size()
        read_until_nothing(begin(ops, S.PRE_COPY))
        assert ops.get_data_size() == reported
    lying = opened("sim:?size=5000&reported_size=7")
    begin(lying, S.PRE_COPY)
    assert lying.get_data_size() == 7


@pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY, S.PRE_COPY_P2P, S.RUNNING_P2P])
def test_a_device_that_does_not_run_does_not_change(state: S, opened: Open, begin: Begin) -> None:
    ops = opened(CHANGING)
    channel = begin(ops, S.PRE_COPY)
    read_until_nothing(channel)
    changing = ops.read_state()
    channel.precopy_info()
    assert ops.read_state() != changing
    ops.set_device_state(state)
    stopped = ops.read_state()
    for _ in range(3):
        ops.get_data_size()
        if state is S.PRE_COPY_P2P:
            channel.precopy_info()
        assert ops.read_state() == stopped


# When it entered what: the truth that a reported downtime is compared with.


def test_the_history_has_each_state_that_was_entered_in_order(opened: Open, begin: Begin) -> None:
    ops = opened("sim:?size=1000&fault=set:EIO@PRE_COPY_P2P:ERROR")
    before_ns = time.monotonic_ns()
    ops.set_device_state(S.STOP)
    begin(ops, S.PRE_COPY)
    with pytest.raises(OSError, match="Input/output"):
        ops.set_device_state(S.PRE_COPY_P2P)
    ops.reset_device()
    after_ns = time.monotonic_ns()
    times = [at for at, _ in ops.history]
    assert [before_ns, *times, after_ns] == sorted([before_ns, *times, after_ns])
    assert [state for _, state in ops.history] == [
        S.RUNNING_P2P,
        S.STOP,
        S.RUNNING_P2P,
        S.RUNNING,
        S.PRE_COPY,
        S.ERROR,
        S.RUNNING,
    ]


def test_a_state_that_was_refused_is_not_in_the_history(opened: Open) -> None:
    ops = opened("sim:?size=1000&fault=set:EBUSY@STOP")
    with pytest.raises(OSError, match="busy"):
        ops.set_device_state(S.STOP)
    assert [state for _, state in ops.history] == [S.RUNNING_P2P]


def test_the_history_is_bounded(opened: Open) -> None:
    ops = opened("sim:?size=10")
    for _ in range(600):
        ops.set_device_state(S.RUNNING_P2P)
        ops.set_device_state(S.RUNNING)
    assert len(ops.history) == 1024
    assert ops.history[-1][1] is S.RUNNING


# What keeps the truth: the dirty ranges, and the replay of any stream.


@settings(deadline=None)  # the machine may be busy
@given(
    size=st.integers(0, 300_000),
    first=st.integers(0, 50),
    steps=st.lists(st.one_of(st.just(-1), st.integers(0, 400_000)), max_size=12),
)
def test_the_dirty_ranges_are_what_changed(size: int, first: int, steps: list[int]) -> None:
    with OwnedFd(os.memfd_create("state")) as state:
        os.ftruncate(state.fileno(), size)
        copy = bytearray(size)
        dirtier = Dirtier(state.fileno(), first, size, seed=1)
        for step in [*steps, -1]:
            if step >= 0:
                dirtier.change(step)
                continue
            expected_bytes = dirtier.dirty_bytes
            ranges = dirtier.take()
            assert sum(length for _, length in ranges) == expected_bytes
            for offset, length in ranges:
                copy[offset : offset + length] = os.pread(state.fileno(), length, offset)
            assert os.pread(state.fileno(), size + 1, 0) == copy


def precopy_stream() -> bytes:
    with closing(SimulatedOps.open("sim:?size=200&dirty=1G")) as ops:
        channel = begun(ops, S.PRE_COPY)
        stream, _ = read_until_nothing(channel)
        channel.precopy_info()
        ops.set_device_state(S.STOP_COPY)
        return stream + read_to_end(channel)


STREAM = precopy_stream()


@settings(deadline=None)  # the machine may be busy
@given(
    at=st.integers(0, len(STREAM) - 1),
    damage=st.binary(min_size=1, max_size=40),
    length=st.integers(0, len(STREAM)),
)
def test_a_damaged_stream_is_taken_or_refused_but_breaks_nothing(
    at: int, damage: bytes, length: int
) -> None:
    stream = (STREAM[:at] + damage + STREAM[at + len(damage) :])[:length]
    for accept in ("any", "complete"):
        with (
            closing(SimulatedOps.open(f"sim:?size=200&accept={accept}")) as ops,
            closing(begun(ops, S.RESUMING)) as channel,
        ):
            before = ops.read_state()
            write_all(channel, stream)
            if outcome(partial(ops.set_device_state, S.STOP)):
                assert (ops.get_device_state(), ops.read_state()) == (S.RESUMING, before)
            elif accept == "complete":
                assert len(stream) >= 200


def test_a_stream_cut_anywhere_is_not_complete() -> None:
    for length in range(len(STREAM)):
        with OwnedFd(os.memfd_create("stream")) as stream:
            os.write(stream.fileno(), STREAM[:length])
            found = find_updates(stream.fileno())
            assert found is None or not found.is_complete
