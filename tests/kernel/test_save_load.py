"""Saved from one live device and loaded into another: its registers arrive, and only at the end."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.mtty import SCRATCH, SOURCE, Mtty, state_bytes
from kernel.streams import PIPE_BYTES, QEMU, loaded, piped, saved, state_in
from vfiomig import (
    Chunk,
    DeviceState,
    LoadOptions,
    PreCopyLimits,
    SaveOptions,
    StateChange,
    inspect,
    load,
    save,
)
from vfiomig.backends import borrow
from vfiomig.fd import OwnedFd
from vfiomig.report import Event
from vfiomig.transport import Target

FRAMINGS = {"native": SaveOptions(), "qemu": QEMU}
framings = pytest.mark.parametrize("options", FRAMINGS.values(), ids=list(FRAMINGS))


Ends = Callable[[Path], AbstractContextManager[tuple[Target, Target]]]


@contextmanager
def path_ends(folder: Path) -> Iterator[tuple[Target, Target]]:
    yield folder / "state", folder / "state"


@contextmanager
def pipe_ends(_: Path) -> Iterator[tuple[Target, Target]]:
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as reader, open(write_fd, "wb") as writer:
        yield writer, reader


@contextmanager
def socket_ends(_: Path) -> Iterator[tuple[Target, Target]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def close(target: Target) -> None:
    """End a stream for its reader."""
    if isinstance(target, socket.socket):
        target.shutdown(socket.SHUT_WR)
    elif hasattr(target, "close"):
        target.close()


@framings
@pytest.mark.parametrize("ends", [path_ends, pipe_ends, socket_ends])
def test_the_registers_of_a_device_are_those_of_the_other_afterwards(
    source: Mtty, destination: Mtty, tmp_path: Path, options: SaveOptions, ends: Ends
) -> None:
    with ends(tmp_path) as (sink, reader):
        with source.opened() as device:
            out = save(device.device, sink, options)
        close(sink)
        with destination.opened() as device:
            assert device.registers.scratch == [0xD1, 0xD2]
            back = load(reader, device.device)
            assert device.device.state() is DeviceState.RUNNING
            assert device.registers.ports() == list(SOURCE)
    assert source.is_untouched(SOURCE)
    assert (out.device_bytes, back.device_bytes) == (96, 96)
    assert (out.digest, out.stream_bytes) == (back.digest, back.stream_bytes)
    assert out.framing == back.framing


def test_registers_written_one_by_one_are_saved(source: Mtty, destination: Mtty) -> None:
    with source.opened() as device:
        for port, value in enumerate((0x5A, 0xA7)):
            device.registers.write(port, SCRATCH, value)
    loaded(saved(source), destination)
    with destination.opened() as device:
        assert device.registers.scratch == [0x5A, 0xA7]


@framings
def test_until_the_commit_the_destination_shows_its_old_values(
    source: Mtty, destination: Mtty, tmp_path: Path, options: SaveOptions
) -> None:
    file = tmp_path / "state"
    with source.opened() as device:
        save(device.device, file, options)
    seen: list[tuple[str, list[int]]] = []
    with destination.opened() as device:

        def look(event: Event) -> None:
            if isinstance(event, StateChange):
                seen.append((event.wanted.name, device.registers.scratch))
            elif isinstance(event, Chunk):
                loaded_bytes = event.device_offset + event.length_bytes
                seen.append((str(loaded_bytes), device.registers.scratch))

        load(file, device.device, LoadOptions(chunk_events=True), on_event=look)
    old, new = [0xD1, 0xD2], [0x51, 0x52]
    assert seen == [
        ("RUNNING_P2P", old),
        ("STOP", old),
        ("RESUMING", old),
        ("96", old),
        ("STOP", new),
        ("RUNNING_P2P", new),
        ("RUNNING", new),
    ]


def test_a_native_stream_holds_what_the_data_fd_gave(stream: bytes) -> None:
    assert state_in(stream) == state_bytes(SOURCE)


def test_with_precopy_the_state_has_the_same_bytes(source: Mtty, tmp_path: Path) -> None:
    file = tmp_path / "state"
    with source.opened() as device:
        report = save(device.device, file, SaveOptions(pre_copy=PreCopyLimits()))
    assert state_in(file.read_bytes()) == state_in(saved(source)) == state_bytes(SOURCE)
    found = inspect(file)
    assert (found.pre_copy_bytes, found.device_bytes) == (24, 96)
    moved = {phase.name: phase.device_bytes for phase in report.phases}
    assert (moved["pre-copy"], moved["stop-copy"]) == (24, 72)


def test_what_changes_in_precopy_is_saved(source: Mtty) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(write_fd), open(read_fd, "rb", buffering=0) as reader, source.opened() as device:

        def write_late(event: Event) -> None:
            if isinstance(event, StateChange) and event.wanted is DeviceState.PRE_COPY:
                device.registers.write(0, SCRATCH, 0x99)

        options = SaveOptions(pre_copy=PreCopyLimits())
        save(device.device, write_fd, options, on_event=write_late)
        state = state_in(reader.read(PIPE_BYTES))
    assert state == state_bytes([replace(SOURCE[0], scratch=0x99), SOURCE[1]])


def test_a_state_of_60_bytes_travels_as_well(small_source: Mtty, small_destination: Mtty) -> None:
    stream = saved(small_source, SaveOptions(pre_copy=PreCopyLimits()))
    assert state_in(stream) == state_bytes(SOURCE[:1])
    assert loaded(stream, small_destination).device_bytes == 60
    assert small_destination.is_untouched(SOURCE[:1])


def test_both_may_be_left_in_stop(source: Mtty, destination: Mtty) -> None:
    stream = saved(source, SaveOptions(after=DeviceState.STOP))
    report = loaded(stream, destination, LoadOptions(after=DeviceState.STOP))
    assert (report.state, report.stopped_ns) == (DeviceState.STOP, None)
    assert (source.state(), destination.state()) == (DeviceState.STOP, DeviceState.STOP)
    assert destination.ports() == list(SOURCE)


def test_a_stopped_device_is_saved_only_if_that_is_allowed_and_stays_stopped(
    source: Mtty, destination: Mtty
) -> None:
    with source.opened() as device:
        device.device.set_state(DeviceState.STOP)
    options = SaveOptions(from_stop=True, after=DeviceState.STOP)
    loaded(saved(source, options), destination)
    assert source.state() is DeviceState.STOP
    assert destination.ports() == list(SOURCE)


def test_a_config_blob_travels_with_the_state(source: Mtty, destination: Mtty) -> None:
    blob = hashlib.sha256(b"config").digest() * 5000
    report = loaded(saved(source, SaveOptions(config=blob)), destination)
    assert report.config == blob
    assert destination.is_untouched(SOURCE)


def test_what_is_loaded_is_seen_by_all_who_have_the_device_open(
    stream: bytes, destination: Mtty
) -> None:
    with destination.opened() as device, borrow(f"fd:{device.device_fd}") as other:
        with piped(stream) as read_end:
            report = load(read_end, other)
        # Before Linux 7 the kernel does not say which device is behind a bare descriptor.
        assert bool(report.warnings) is not bool(other.identity.driver)
        assert device.registers.ports() == list(SOURCE)
