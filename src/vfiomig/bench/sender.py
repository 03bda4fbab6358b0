"""The sending process: holds the devices, and saves them, or lets a tool copy their state."""

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeVar

from vfiomig._fastcopy import Digest
from vfiomig.backends import open_device
from vfiomig.bench.measure import Meter, Usage
from vfiomig.bench.messages import Open, Opened, Send, Sent
from vfiomig.bench.post import Post
from vfiomig.bench.tool import ToolRun, run_tool
from vfiomig.bench.worker import run_worker
from vfiomig.channel import DataChannel
from vfiomig.device import Device
from vfiomig.errors import DeviceIOError, DeviceLostError, MigrationError
from vfiomig.fd import OwnedFd
from vfiomig.options import QemuFraming, SaveOptions
from vfiomig.report import Event, StateChange
from vfiomig.save import save
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded

_READ_BYTES = 1 << 20
T = TypeVar("T")


class Sender:
    """Answers Open and Send. Owns its devices; stack closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._devices: dict[int, Device] = {}

    def handle(self, request: Open | Send, fds: list[OwnedFd], _: Post) -> Opened | Sent:
        """Do what is asked, with the sink's descriptor. Raises MigrationError, OSError."""
        if isinstance(request, Open):
            return self._open(request)
        device = self._devices[request.key]
        # The reader must see the end once this end is closed: nobody else here has it.
        with fds.pop() as sink:
            sent = (
                _send_tool(device, request, sink) if request.words else _save(device, request, sink)
            )
            _settle(sink.fileno(), sent.stream_bytes, request)
        return sent

    def _open(self, request: Open) -> Opened:
        device = self._stack.enter_context(open_device(request.name))
        self._devices[request.key] = device
        device_bytes, digest = _read(device)
        return Opened(device.name, device_bytes, digest if _read(device)[1] == digest else "")


def _save(device: Device, request: Send, sink: OwnedFd) -> Sent:
    case, durable = request.case, request.case.sink == "durable"
    options = SaveOptions(
        framing="native" if case.framing == "native" else QemuFraming(),
        digest=case.checksum,
        buffer_bytes=case.buffer_bytes,
        ring_slots=case.ring_slots,
        durable=durable,
    )
    if durable:  # to free what an earlier run wrote is not part of this one
        os.ftruncate(sink.fileno(), 0)
        os.unlink(request.path)
    meter = Meter()
    report = save(device, request.path if durable else sink.fileno(), options)
    usage = meter.read()
    return Sent(usage, report.device_bytes, report.stream_bytes, report.digest, report.buffer_bytes)


def _send_tool(device: Device, request: Send, sink: OwnedFd) -> Sent:
    words, out_fd = request.words, sink.fileno()
    if request.names_its_file:
        words, out_fd = (*words, request.path), -1

    def copy(channel: DataChannel, cancel_fd: int) -> ToolRun:
        run = run_tool(words, channel.fileno(), out_fd, cancel_fd, figures=request.figures)
        if request.case.sink == "durable" and not request.figures:
            run = replace(run, usage=_synced(sink.fileno(), run.usage))
        if request.case.sink == "null" and os.read(channel.fileno(), 1):
            raise DeviceIOError(f"{words[0]} has not read all of the state", device=device.name)
        return run

    run = _in_session(device, copy)
    written = _written(sink.fileno())
    moved = run.device_bytes if request.figures else written
    return Sent(run.usage, moved, written or 0)


def _synced(sink_fd: int, usage: Usage) -> Usage:
    """Sync, for a tool that does not. Returns its usage with that of the sync."""
    meter = Meter()
    os.fsync(sink_fd)
    sync = meter.read()
    return replace(usage, end_ns=sync.end_ns, cpu_s=usage.cpu_s + sync.cpu_s)


def _written(sink_fd: int) -> int | None:
    """Return how much is in a file; None of what is none."""
    found = os.fstat(sink_fd)
    if not stat.S_ISREG(found.st_mode):
        return None
    # Where the tool left off; one that opened the file itself left it with that size.
    return os.lseek(sink_fd, 0, os.SEEK_CUR) or found.st_size


def _settle(sink_fd: int, length: int, request: Send) -> None:
    """Cut off what an earlier run left behind, and let no later one pay for this one's writes."""
    if request.case.sink == "file":
        os.ftruncate(sink_fd, length)
        os.fdatasync(sink_fd)


def _read(device: Device) -> tuple[int, str]:
    """Return the bytes and the digest of the device's state."""

    def read(channel: DataChannel, _: int) -> tuple[int, str]:
        digest, total, buffer = Digest(), 0, memoryview(bytearray(_READ_BYTES))
        try:
            while got := os.readv(channel.fileno(), [buffer]):
                digest.update(buffer[:got])
                total += got
        except OSError as err:
            raise _read_failed(device, err) from err
        return total, f"{digest.value:016x}"

    return _in_session(device, read)


def _in_session(device: Device, work: Callable[[DataChannel, int], T]) -> T:
    """Do work on a channel in STOP_COPY, given what makes it readable that it has to stop.

    The device is RUNNING afterwards, whatever happens. Raises MigrationError, OSError.
    """

    resets = list[Event]()

    def job() -> T:
        device.check_in(DeviceState.RUNNING)
        try:
            channel = device.start_session(DeviceState.STOP_COPY)
            cancellation.check()
            result = work(channel, cancellation.fileno())
            if (cause := channel.failure()) is not None:
                raise _read_failed(device, cause) from cause
            device.set_state(DeviceState.RUNNING)
        except BaseException as err:
            _recover(device, err)
            if resets:
                lost = f"{device.name} was reset and is RUNNING: its state is lost"
                raise DeviceIOError(f"{err}; {lost}", device=device.name) from err
            raise
        return result

    def observe(event: Event) -> None:
        if isinstance(event, StateChange) and event.by == "reset":
            resets.append(event)

    with closing(Cancellation()) as cancellation, device.observed(observe):
        return run_shielded(job, cancellation)


def _read_failed(device: Device, cause: OSError) -> DeviceIOError:
    what = f"{device.name} failed while its state was read: {cause.strerror}"
    return DeviceIOError(what, device=device.name, errno=cause.errno)


def _recover(device: Device, err: BaseException) -> None:
    try:
        actual = device.recover(DeviceState.RUNNING)
    except DeviceLostError as lost:
        raise lost from err
    if isinstance(err, MigrationError):
        err.actual, err.aftermath = actual, f"{device.name} is {actual.name}"


def main() -> None:
    """Serve until the bench ends the connection."""
    with ExitStack() as stack:
        run_worker(Sender(stack).handle)


if __name__ == "__main__":
    main()
