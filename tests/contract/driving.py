"""Driving a device by hand, as DeviceOps alone allows: for the contract suite and its relatives."""

import errno
import os
from collections.abc import Callable

from vfiomig.channel import DataChannel
from vfiomig.device import DeviceOps
from vfiomig.uapi import DeviceState

DeviceFactory = Callable[[], DeviceOps]


def read_until_nothing(channel: DataChannel) -> tuple[bytes, int]:
    """Read until nothing comes. Returns it, and the errno that said so; 0 for a plain 0."""
    pieces = []
    try:
        while piece := os.read(channel.fileno(), 1 << 16):
            pieces.append(piece)
    except OSError as err:
        return b"".join(pieces), err.errno or 0
    failure = channel.failure()
    return b"".join(pieces), (failure.errno or 0) if failure else 0


def read_to_end(channel: DataChannel) -> bytes:
    stream, error = read_until_nothing(channel)
    assert error == 0
    return stream


def write_all(channel: DataChannel, stream: bytes) -> None:
    rest = memoryview(stream)
    while rest:
        rest = rest[os.write(channel.fileno(), rest) :]


def save(ops: DeviceOps) -> bytes:
    """Return the whole state of a device, which is left in STOP."""
    channel = ops.set_device_state(DeviceState.STOP_COPY)
    assert channel is not None
    stream = read_to_end(channel)
    ops.set_device_state(DeviceState.STOP)
    channel.close()
    return stream


def load(ops: DeviceOps, stream: bytes) -> None:
    """Load a whole state into a device, which is left in STOP."""
    channel = ops.set_device_state(DeviceState.RESUMING)
    assert channel is not None
    write_all(channel, stream)
    assert channel.failure() is None
    ops.set_device_state(DeviceState.STOP)
    channel.close()


def begun(ops: DeviceOps, state: DeviceState) -> DataChannel:
    """Enter a state that begins a session."""
    channel = ops.set_device_state(state)
    assert channel is not None
    return channel


def enter(ops: DeviceOps, state: DeviceState, stream: bytes = b"") -> DataChannel | None:
    """Go from RUNNING to state and do there what must be done before it may be left again.

    stream: what is loaded in RESUMING.
    """
    channel = ops.set_device_state(state)
    if state is DeviceState.STOP_COPY:
        assert channel is not None
        read_to_end(channel)
    elif state is DeviceState.RESUMING:
        assert channel is not None
        write_all(channel, stream)
        assert channel.failure() is None
    return channel


def outcome(ask: Callable[[], object]) -> int:
    """Return the errno a request fails with, 0 when it succeeds."""
    try:
        ask()
    except OSError as err:
        return err.errno or -1
    return 0


def errno_of_read(channel: DataChannel) -> int:
    """Return the errno of the next read, as the device means it; 0 when there is none."""
    return outcome(lambda: os.read(channel.fileno(), 1)) or _meant(channel)


def errno_of_write(channel: DataChannel) -> int:
    """Return the errno of a write of one byte, as the device means it; 0 when there is none."""
    found = outcome(lambda: os.write(channel.fileno(), b"x"))
    return found if found not in (0, errno.EPIPE) else _meant(channel)


def _meant(channel: DataChannel) -> int:
    failure = channel.failure()
    return (failure.errno or 0) if failure else 0
