"""Streams in memory: saved from a device and loaded into one, through a pipe."""

import fcntl
import os
from pathlib import Path

import stream_oracle
from kernel.mtty import Mtty
from vfiomig import LoadOptions, QemuFraming, SaveOptions, TransferReport, load, save
from vfiomig.fd import OwnedFd

DATA = Path(__file__).parents[1] / "data"
PIPE_BYTES = 1 << 20  # what vfiomig sets; a stream of mtty is far smaller
QEMU = SaveOptions(framing=QemuFraming(1, "vfio"))


def saved(mtty: Mtty, options: SaveOptions = SaveOptions()) -> bytes:  # noqa: B008  frozen
    """Return the state of a device, as save() writes it into a pipe."""
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd), mtty.opened() as source:
        report = save(source.device, write_fd, options)
        stream = os.read(read_fd, PIPE_BYTES)
    assert len(stream) == report.stream_bytes
    return stream


def loaded(
    stream: bytes,
    mtty: Mtty,
    options: LoadOptions = LoadOptions(),  # noqa: B008  frozen
) -> TransferReport:
    """Load a stream into a device, as load() reads it from a pipe."""
    with mtty.opened() as destination, piped(stream) as read_end:
        return load(read_end, destination.device, options)


def piped(stream: bytes) -> OwnedFd:
    """Return the reading end of a pipe that holds a stream and no more."""
    read_fd, write_fd = os.pipe()
    with OwnedFd(write_fd):
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        assert os.write(write_fd, stream) == len(stream)
    return OwnedFd(read_fd)


def state_in(stream: bytes) -> bytes:
    """Return the device's bytes in a native stream, by a reader that is not vfiomig's."""
    return bytes(stream_oracle.read(stream).states[0])
