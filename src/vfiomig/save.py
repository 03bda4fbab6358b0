"""Save the state of a device: PRE_COPY rounds where they are wanted, STOP_COPY, the end."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime

from vfiomig._fastcopy import Digest, FrameWriter, Outcome, Template
from vfiomig._version import __version__
from vfiomig.channel import DataChannel
from vfiomig.copyloop import Reading
from vfiomig.device import Device
from vfiomig.errors import DeviceLostError, MigrationError, UsageError
from vfiomig.framing import native, qemu
from vfiomig.framing.manifest import DeviceEntry, Manifest
from vfiomig.options import (
    DEFAULT_BUFFER_BYTES,
    DURABLE_SLOTS,
    DURABLE_WRITES,
    GROWN_BUFFER_BYTES,
    RING_BYTES,
    PreCopyLimits,
    QemuFraming,
    SaveOptions,
)
from vfiomig.outgoing import NativeOutgoing, Outgoing, QemuOutgoing
from vfiomig.recorder import PROGRESS_NS, Recorder
from vfiomig.report import OnEvent, TransferReport
from vfiomig.transport import Stream, Target, open_sink
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded


def save(
    device: Device,
    target: Target,
    options: SaveOptions = SaveOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
    cancellation: Cancellation | None = None,
) -> TransferReport:
    """Save the state of a device, and leave it RUNNING again (or STOP: options.after).

    target: a path, which then holds the whole state or does not exist; or a descriptor, a socket or
    an open file, which stay the caller's and may hold a cut stream after a failure. on_event is
    called in the working thread, and must not block; what it raises cancels the work.
    Blocks; may be called from any thread. An exception in the calling thread (Ctrl-C) cancels and
    rolls back first. Raises MigrationError; its actual and aftermath say what the device was left
    in: RUNNING with its state, RUNNING after a reset, or (DeviceLostError) neither.
    """
    options.check(device.name, device.capabilities)
    # QEMU's records have no alignment that O_DIRECT could take.
    direct = options.durable and options.framing == "native"
    with (
        closing(Cancellation()) as own,
        open_sink(target, force=options.force, direct=direct) as sink,
    ):
        if options.durable and not sink.is_new_file:
            raise UsageError(f"{sink.name} is no file that is made anew: only such can be durable")
        stop = cancellation or own
        job = _Saving(device, sink, options, on_event, stop)
        return run_shielded(job.run, stop)


class _Saving:
    """One save. Runs in the working thread."""

    def __init__(
        self,
        device: Device,
        sink: Stream,
        options: SaveOptions,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        self._device, self._sink, self._options = device, sink, options
        self._recorder, self._cancellation = Recorder(device.name, on_event), cancellation
        self._digest = Digest() if options.digest else None
        self._stopping_ns = 0
        self._stopped_ns: int | None = None

    def run(self) -> TransferReport:
        with self._device.observed(self._recorder.observe):
            also = [DeviceState.STOP] * self._options.from_stop
            self._start_state = self._device.check_in(DeviceState.RUNNING, *also)
            length = self._device.stop_copy_length()
            self._recorder.expected_bytes = length or 0
            if length is None and self._device.protocol == "v2":  # v1 tells it while it saves
                self._recorder.warn("the device does not tell its size: no estimate")
            self._writer, self._framing = self._open(length)
            self._reading = Reading(
                self._device,
                self._writer,
                self._digest,
                self._cancellation,
                self._sink.fileno(),
                self._sink.failed,
            )
            self._reading.expected_bytes = self._recorder.expected_bytes
            with closing(self._writer):
                return self._run()

    def _run(self) -> TransferReport:
        try:
            self._in_sink(self._framing.begin)
            self._copy_all()
            return self._finish()
        except BaseException as err:
            self._roll_back(err)
            self._recorder.note_on(err)
            raise

    def _open(self, length: int | None) -> tuple[FrameWriter, Outgoing]:
        options, is_auto = self._options, self._options.buffer_bytes is None
        buffer_bytes = options.buffer_bytes or DEFAULT_BUFFER_BYTES
        if isinstance(options.framing, QemuFraming):
            section = options.framing.section(self._device.name)
            size = min(buffer_bytes, qemu.record_bytes(length))
            if region_bytes := self._device.region_bytes:
                # A DATA record cannot go on in another: it has to hold a chunk, whatever its size.
                size = max(native.FILE_ALIGN, region_bytes)
                if size > native.MAX_FRAME_BYTES:
                    raise UsageError(
                        f"{self._device.name} has a migration region of {region_bytes} bytes, and"
                        f" QEMU's records hold {native.MAX_FRAME_BYTES} here",
                        hint="native framing takes chunks of any size",
                    )
            writer = self._new_writer(size, 0, leave_holes=self._sink.is_new_file)
            return writer, QemuOutgoing(writer, section)
        grown_bytes = GROWN_BUFFER_BYTES if is_auto and not self._device.region_bytes else 0
        writer = self._new_writer(buffer_bytes, grown_bytes, leave_holes=False)
        align = native.FILE_ALIGN if self._sink.is_file else native.PIPE_ALIGN
        manifest = self._manifest(length)
        return writer, NativeOutgoing(writer, manifest, align, elide_zeros=options.elide_zeros)

    def _new_writer(self, buffer_bytes: int, grown_bytes: int, *, leave_holes: bool) -> FrameWriter:
        options = self._options
        wanted = max(options.ring_slots, DURABLE_SLOTS if self._sink.is_direct else 1)
        slots = min(wanted, max(2, RING_BYTES // buffer_bytes))
        writer = FrameWriter(
            self._sink.fileno(),
            buffer_bytes,
            wake_fd=self._cancellation.fileno(),
            ring_slots=slots,
            writers=min(DURABLE_WRITES, slots - 1) if self._sink.is_direct else 1,
            grown_bytes=grown_bytes,
            leave_holes=leave_holes,
        )
        writer.bytes_per_s = options.bytes_per_s
        return writer

    def _manifest(self, length: int | None) -> Manifest:
        device = self._device
        entry = DeviceEntry(
            device.name,
            device.identity,
            device.capabilities.names,
            length,
            device.protocol,
            device.region_bytes,
        )
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return Manifest(created, f"vfiomig {__version__}", (entry,))

    def _copy_all(self) -> None:
        if self._options.pre_copy is not None and self._start_state is DeviceState.RUNNING:
            with self._phase("pre-copy"):
                self._device.set_precopy_info_v2()
                channel = self._channel(DeviceState.PRE_COPY)
                self._pre_copy(channel, self._options.pre_copy)
        self._stopping_ns = time.monotonic_ns()
        with self._phase("stop-copy"):
            channel = self._channel(DeviceState.STOP_COPY)
            self._in_sink(self._framing.begin_stop_copy)
            self._stop_copy(channel)

    def _channel(self, state: DeviceState) -> DataChannel:
        channel = self._device.start_session(state)
        self._recorder.check()
        self._cancellation.check()
        return channel

    def _pre_copy(self, channel: DataChannel, limits: PreCopyLimits) -> None:
        ends_ns = time.monotonic_ns() + limits.duration_ns
        left_bytes = min(limits.device_bytes, self._options.max_state_bytes + 1)
        for _ in range(limits.rounds):
            info = self._reading.precopy_info(channel)
            if info.initial_bytes == info.dirty_bytes == 0:
                return
            before = self._writer.device_bytes
            template = self._framing.pre_copy
            outcome = self._copy(channel, template, left_bytes, ends_ns, "pre-copy")
            left_bytes -= self._writer.device_bytes - before
            # In PRE_COPY both ENOMSG and 0 mean "nothing now" (mlx5, virtio; hisi, qat, mtty).
            if outcome not in (Outcome.DRAINED, Outcome.END_OF_STREAM):
                return
            self._in_sink(self._framing.drained)

    def _stop_copy(self, channel: DataChannel) -> None:
        most = self._options.max_state_bytes
        left_bytes = most + 1 - self._writer.device_bytes
        outcome = self._copy(channel, self._framing.stop_copy, left_bytes, 0, "stop-copy")
        self._reading.check_end(outcome, most)
        if self._writer.device_bytes == 0:
            self._recorder.warn("the device gave no state at all: 0 bytes")

    def _copy(
        self, channel: DataChannel, template: Template, limit: int, ends_ns: int, phase: str
    ) -> Outcome:
        """Copy until the source has nothing (more), the limit or ends_ns (0: none) is reached."""
        step_ns = 1 if self._options.chunk_events else PROGRESS_NS
        before = self._writer.device_bytes
        while True:
            deadline_ns = ends_ns
            if self._recorder.has_listener:
                soon_ns = time.monotonic_ns() + step_ns
                deadline_ns = min(soon_ns, ends_ns) if ends_ns else soon_ns
            at = self._writer.device_bytes
            outcome = self._reading.copy(channel, template, limit - (at - before), deadline_ns)
            self._tell(phase, at)
            if outcome is not Outcome.DEADLINE_REACHED:
                return outcome
            if ends_ns and time.monotonic_ns() >= ends_ns:
                return Outcome.LIMIT_REACHED

    def _tell(self, phase: str, before: int) -> None:
        copied = self._writer.device_bytes
        self._recorder.expected_bytes = self._reading.expected_bytes
        self._recorder.copied(phase, copied)
        if self._options.chunk_events and copied > before:
            self._recorder.chunk(before, copied - before)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._recorder.phase(name, lambda: self._writer.device_bytes)

    def _in_sink(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as err:
            raise self._reading.failed(err) from err

    def _finish(self) -> TransferReport:
        # The state is read: a device that goes on running need not wait for a disk.
        self._resume(self._options.after)
        with self._phase("commit"):
            self._in_sink(lambda: self._framing.end(self._options.config, self._digest))
            if self._options.durable and not self._writer.direct_bytes:
                self._recorder.warn("written through the page cache: O_DIRECT cannot be used here")
            self._cancellation.check()
            self._sink.commit()
        return self._report()

    def _resume(self, target: DeviceState) -> None:
        with self._phase("resume" if target is DeviceState.RUNNING else "stop"):
            self._device.set_state(target)
            self._recorder.check()
        if target is DeviceState.RUNNING:
            self._stopped_ns = time.monotonic_ns() - self._stopping_ns

    def _roll_back(self, err: BaseException) -> None:
        """Bring the device back to where it was; say on err what became of it."""
        device = self._device
        try:
            actual = device.recover(self._start_state)
        except DeviceLostError as lost:
            raise lost from err
        if isinstance(err, MigrationError):
            err.actual, err.phase = actual, err.phase or "save"
            err.aftermath = f"{device.name} is {actual.name}"
            if self._recorder.was_reset:
                err.aftermath = f"{device.name} was reset and is {actual.name}: its state is lost"

    def _report(self) -> TransferReport:
        recorder = self._recorder
        return TransferReport(
            device=self._device.name,
            framing="native" if self._options.framing == "native" else "qemu",
            device_bytes=self._writer.device_bytes,
            stream_bytes=self._writer.stream_bytes,
            frames=self._writer.frames,
            digest=f"{self._digest.value:016x}" if self._digest else "",
            state=self._options.after,
            duration_ns=recorder.duration_ns,
            stopped_ns=self._stopped_ns,
            phases=tuple(recorder.phases),
            state_changes=tuple(recorder.state_changes),
            warnings=tuple(recorder.warnings),
            buffer_bytes=self._writer.buffer_bytes,
            zero_bytes=self._writer.zero_bytes,
            spliced_bytes=self._writer.spliced_bytes,
            direct_bytes=self._writer.direct_bytes,
            config=self._options.config,
        )
