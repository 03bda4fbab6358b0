"""The profiles of simulated devices: what each takes, and where it refuses."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from contract.driving import (
    begun,
    errno_of_write,
    load,
    outcome,
    read_until_nothing,
    save,
    write_all,
)
from vfiomig.channel import DataChannel
from vfiomig.simulator.device import SimulatedOps
from vfiomig.simulator.profiles import MTTY_HEADER
from vfiomig.uapi import DeviceState as S

QEMU = json.loads((Path(__file__).parent / "data" / "qemu-10.0-mtty-2.json").read_text())
Open = Callable[[str], SimulatedOps]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(SimulatedOps.open(url)))


def test_qemus_stream_is_taken_by_mtty(opened: Open) -> None:
    stream = bytes.fromhex(QEMU["device_state_hex"])
    ops = opened("sim:?profile=mtty")
    load(ops, stream)
    assert save(ops) == stream
    assert ops.identity.model == "mtty-2"
    ops.reset_device()
    assert ops.read_state() == stream  # registers survive a reset


@pytest.mark.parametrize("profile", ["generic", "mlx5", "virtio"])
@pytest.mark.parametrize("stream", [b"", b"cut"])
def test_a_cut_stream_is_silently_taken(profile: str, stream: bytes, opened: Open) -> None:
    ops = opened(f"sim:?profile={profile}")
    load(ops, stream)
    assert ops.read_state() == stream


def test_a_cut_precopy_stream_is_taken_as_far_as_it_goes(opened: Open) -> None:
    channel = begun(opened("sim:?size=200000"), S.PRE_COPY)
    stream, _ = read_until_nothing(channel)
    ops = opened("sim:")
    load(ops, stream[:100_000])
    state = ops.read_state()
    assert (len(state), any(state[:90_000]), any(state[100_000:])) == (200000, True, False)
    refusing = opened("sim:?accept=complete")
    write_all(begun(refusing, S.RESUMING), stream)
    assert outcome(lambda: refusing.set_device_state(S.STOP)) == errno.EINVAL


@pytest.mark.parametrize(
    ("url", "length", "error"),
    [
        ("sim:?size=1000&accept=exact", 999, errno.EINVAL),
        ("sim:?size=1000&accept=exact", 1001, errno.EINVAL),
        ("sim:?size=1000&accept=fits", 1001, errno.EINVAL),
        ("sim:?size=1000&accept=complete", 999, errno.EINVAL),
        ("sim:?size=1000&profile=xe", 999, errno.EIO),
        ("sim:?profile=hisi", 100, errno.EINVAL),
        ("sim:?profile=qat", 100, errno.EINVAL),
        ("sim:?profile=mtty", 95, errno.EINVAL),
        ("sim:?profile=mtty", 0, errno.EINVAL),
    ],
)
def test_a_state_of_the_wrong_length_is_refused_at_the_commit(
    url: str, length: int, error: int, opened: Open
) -> None:
    ops = opened(url)
    whole = ops.read_state() + b"more"
    channel = begun(ops, S.RESUMING)
    write_all(channel, whole[:length])
    assert channel.failure() is None
    assert outcome(lambda: ops.set_device_state(S.STOP)) == error
    assert ops.get_device_state() is S.RESUMING
    if length < len(whole) - 4:  # what was missing may still come
        write_all(channel, whole[length:-4])
        ops.set_device_state(S.STOP)
        assert ops.read_state() == whole[:-4]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sim:?profile=mtty", errno.ENOMEM),
        ("sim:?profile=hisi", errno.ENOMEM),
        ("sim:?profile=qat", errno.ENOMEM),
        ("sim:?profile=pds", errno.EINVAL),
    ],
)
def test_what_runs_past_the_state_is_refused_in_write(url: str, error: int, opened: Open) -> None:
    ops = opened(url)
    whole = ops.read_state()
    channel = begun(ops, S.RESUMING)
    write_all(channel, whole + b"x")
    assert errno_of_write(channel) == error
    ops.set_device_state(S.STOP)
    assert ops.read_state() == whole


@pytest.mark.parametrize(
    ("profile", "error"), [("mtty", errno.EFAULT), ("hisi", errno.EFAULT), ("qat", errno.EINVAL)]
)
def test_a_foreign_header_is_refused_in_write_and_forgiven(
    profile: str, error: int, opened: Open
) -> None:
    ops = opened(f"sim:?profile={profile}")
    foreign = bytes([ops.read_state()[0] ^ 1]) + ops.read_state()[1:-1] + b"!"
    channel = begun(ops, S.RESUMING)
    write_all(channel, foreign)
    failure = channel.failure()
    assert failure is not None
    assert failure.errno == error
    ops.set_device_state(S.STOP)  # who goes on nevertheless has loaded it
    assert ops.read_state()[-1:] == b"!"


def test_an_error_of_write_that_nobody_asked_for_is_told_by_the_commit(opened: Open) -> None:
    ops = opened("sim:?profile=mtty-2")
    stream = opened("sim:?profile=mtty-1").read_state()
    write_all(begun(ops, S.RESUMING), stream)
    assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EFAULT
    assert ops.get_device_state() is S.RESUMING
    assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EINVAL
    assert MTTY_HEADER.unpack_from(stream)[3] == 1


def test_hisi_takes_match_data_alone(opened: Open) -> None:
    ops = opened("sim:?profile=hisi")
    load(ops, ops.read_state()[:40])
    assert (len(save(ops)), ops.get_data_size()) == (40, 176)


def test_pds_fills_up_with_zeros(opened: Open) -> None:
    ops = opened("sim:?profile=pds")
    load(ops, b"short")
    assert ops.read_state() == b"short".ljust(65536, b"\0")


@pytest.mark.parametrize("shape", ["", "&chunk=1000"])
def test_xe_refuses_to_leave_stop_copy_while_data_is_unread(shape: str, opened: Open) -> None:
    ops = opened(f"sim:?profile=xe&size=100000{shape}")
    channel = begun(ops, S.STOP_COPY)
    os.read(channel.fileno(), 10)
    channel.close()
    for _ in range(2):
        assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EIO
        assert ops.get_device_state() is S.STOP_COPY
    assert errno_of_closed(channel) == errno.ENODEV
    ops.reset_device()
    assert ops.get_device_state() is S.RUNNING
    save(ops)


def errno_of_closed(channel: DataChannel) -> int:
    failure = channel.failure()
    return (failure.errno or 0) if failure else 0


def test_xe_is_stopped_by_a_target_it_refuses(opened: Open) -> None:
    ops = opened("sim:?profile=xe&size=1000")
    assert outcome(lambda: ops.set_device_state(S.PRE_COPY)) == errno.EINVAL
    assert ops.get_device_state() is S.RUNNING
    assert outcome(lambda: ops.set_device_state(S.STOP)) == errno.EIO
    ops.reset_device()
    save(ops)
