"""Load a state into a device: RESUMING, every byte checked, and only then the commit."""

import errno
import time
from contextlib import AbstractContextManager, closing

from vfiomig._fastcopy import StreamReader
from vfiomig.channel import DataChannel
from vfiomig.copyloop import refused
from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceLostError,
    MigrationError,
    NotMigratableError,
    StreamError,
    StreamMismatchError,
)
from vfiomig.framing.manifest import DeviceEntry, Manifest
from vfiomig.incoming import Incoming, open_incoming
from vfiomig.incoming.checked import FrameInfo, OnFrame
from vfiomig.options import REGION_BYTES, LoadOptions
from vfiomig.recorder import Recorder
from vfiomig.report import OnEvent, TransferReport
from vfiomig.transport import Stream, Target, open_source
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded


def load(
    source: Target,
    device: Device,
    options: LoadOptions = LoadOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
    cancellation: Cancellation | None = None,
) -> TransferReport:
    """Load a stream into a device, and leave it RUNNING (or STOP: options.after).

    source: a path, or a descriptor, a socket or an open file, which stay the caller's and are read
    to their end. What the device held is lost as soon as it enters RESUMING. The whole stream is
    verified before RESUMING -> STOP, which commits it; whatever fails earlier ends in a reset. What
    fails later does not take the loaded state away, unless it takes a reset to leave it as asked.
    Blocks; may be called from any thread; on_event and exceptions as with save().
    Raises MigrationError: its actual and aftermath say what the device was left in.
    """
    options.check()
    if options.after is not DeviceState.RUNNING and device.protocol == "v1":
        raise NotMigratableError(
            f"{device.name} has protocol v1, by which a device runs as soon as it is loaded",
            device=device.name,
            hint="load it with after=RUNNING, --after run, and stop it then",
        )
    with closing(Cancellation()) as own, open_source(source) as stream:
        stop = cancellation or own
        job = _Loading(stream, device, options, Recorder(device.name, on_event), stop)
        return run_shielded(job.run, stop)


def check_identity(manifest: Manifest, stream: str, device: Device, options: LoadOptions) -> str:
    """Raise StreamMismatchError when a stream is not of such a device. stream: its name.

    Returns "", or a sentence when one of them does not say what it is.
    """
    if len(manifest.devices) != 1:
        raise StreamMismatchError(
            f"{stream} holds {len(manifest.devices)} devices, not one", device=device.name
        )
    _check_protocol(manifest.devices[0], stream, device, options)
    theirs, mine = manifest.devices[0].identity, device.identity
    if not (theirs.driver and mine.driver):
        # fd:N and pid:PID/fd:N before Linux 7: fdinfo has no vfio-device-syspath there.
        who = device.name if theirs.driver else stream
        return f"{who} does not tell its driver: whether they fit is unchecked"
    fields = [field for field in mine.differences(theirs) if field not in options.allow_mismatch]
    if fields:
        listed = ", ".join(
            f"{field} {getattr(theirs, field)!r} is not {getattr(mine, field)!r}"
            for field in fields
        )
        raise StreamMismatchError(
            f"{stream} is of another device than {device.name}: {listed}",
            device=device.name,
            hint="if you know that it fits: --allow-mismatch " + ",".join(fields),
        )
    return ""


def _check_protocol(entry: DeviceEntry, stream: str, device: Device, options: LoadOptions) -> None:
    if entry.protocol != device.protocol:
        raise StreamMismatchError(
            f"{stream} is of a device with protocol {entry.protocol}, and {device.name} has"
            f" {device.protocol}",
            device=device.name,
        )
    if entry.region_bytes > device.region_bytes and REGION_BYTES not in options.allow_mismatch:
        raise StreamMismatchError(
            f"{stream} is of a device with a migration region of {entry.region_bytes} bytes, and"
            f" {device.name} has one of {device.region_bytes}: a chunk may not fit",
            device=device.name,
            hint="if you know that all chunks fit: --allow-mismatch region_bytes",
        )


class _Loading:
    """One load. Runs in the working thread."""

    def __init__(
        self,
        stream: Stream,
        device: Device,
        options: LoadOptions,
        recorder: Recorder,
        cancellation: Cancellation,
    ) -> None:
        self._stream, self._device, self._options = stream, device, options
        self._recorder, self._cancellation = recorder, cancellation
        self._reader = StreamReader(
            stream.fileno(), options.buffer_bytes, wake_fd=cancellation.fileno()
        )
        self._data_fd, self._committed = -1, False

    def run(self) -> TransferReport:
        with self._device.observed(self._recorder.observe):
            incoming = self._open()
            if incoming.manifest is not None:  # QEMU's sections do not say what device they are of
                self._check_identity(incoming.manifest)
            self._device.check_in(DeviceState.RUNNING)
            started_ns = time.monotonic_ns()
            try:
                self._transfer(incoming)
                self._cancellation.check()
                with self._phase("commit", incoming):
                    self._commit()
                self._committed = True
                self._recorder.check()
                if self._options.after is DeviceState.RUNNING:
                    with self._phase("resume", incoming):
                        self._device.set_state(DeviceState.RUNNING)
                    self._recorder.check()
            except BaseException as err:
                self._roll_back(err)
                self._recorder.note_on(err)
                raise
            return self._report(incoming, time.monotonic_ns() - started_ns)

    def _open(self) -> Incoming:
        try:
            incoming = open_incoming(self._reader, self._options.max_state_bytes)
        except OSError as err:
            raise self._stream_failed(err) from err
        except (StreamError, StreamMismatchError) as err:
            err.name_stream(self._stream.name)
            raise
        if incoming.manifest:
            self._recorder.expected_bytes = incoming.manifest.devices[0].stop_copy_length or 0
        return incoming

    def _check_identity(self, manifest: Manifest) -> None:
        doubt = check_identity(manifest, self._stream.name, self._device, self._options)
        if doubt:
            self._recorder.warn(doubt)

    def _transfer(self, incoming: Incoming) -> None:
        with self._phase("load", incoming):
            channel = self._device.start_session(DeviceState.RESUMING)
            self._data_fd = channel.fileno()
            self._recorder.check()
            on_frame = self._on_frame(incoming, channel)

            def tell() -> None:
                self._recorder.copied("load", incoming.device_bytes)

            try:
                incoming.transfer(self._data_fd, on_frame, tell)
            except OSError as err:
                self._recorder.check()  # it may be what on_event raised
                if (at := incoming.refused_at) is not None:
                    raise refused(self._device, channel, err, at) from err
                raise self._stream_failed(err) from err
            except StreamError as err:
                err.name_stream(self._stream.name)
                raise
            if (cause := channel.failure()) is not None:
                raise refused(self._device, channel, cause, incoming.device_bytes) from cause
        if incoming.device_bytes == 0:
            self._recorder.warn("the stream holds no state at all: 0 bytes")

    def _on_frame(self, incoming: Incoming, channel: DataChannel) -> OnFrame | None:
        """Return what is to be done with each frame that is sound, None when there is nothing."""
        chunks, tells, told = channel.chunks, self._options.chunk_events, 0

        def take(frame: FrameInfo) -> None:
            nonlocal told
            if chunks is not None and frame.ends_chunk:
                try:
                    chunks.submit()
                except OSError as err:
                    raise refused(self._device, channel, err, incoming.device_bytes) from err
            if tells and incoming.device_bytes > told:
                self._recorder.chunk(told, incoming.device_bytes - told)
            told = incoming.device_bytes
            self._cancellation.check()

        return take if tells or chunks is not None else None

    def _commit(self) -> None:
        # After a reset by somebody else RUNNING -> STOP succeeds too, and loads nothing. Between
        # this look and the SET a short window stays: the kernel has no means to close it.
        target = self._device.committed_in
        self._device.check_session(DeviceState.RESUMING, target)
        self._device.set_state(target)

    def _stream_failed(self, err: OSError) -> MigrationError:
        if self._cancellation.cancelled and err.errno == errno.ECANCELED:
            return CancelledError("cancelled while loading", device=self._device.name)
        return self._stream.failed(err)

    def _roll_back(self, err: BaseException) -> None:
        """Reset what is half loaded; say on err what became of the device."""
        device, reached, held = self._device, DeviceState.RUNNING, "what it held before"
        try:
            if self._committed:
                reached, held = device.recover(self._options.after), "what was loaded"
            elif self._data_fd != -1:
                device.reset()
            else:
                reached = device.recover(DeviceState.RUNNING)
        except DeviceLostError as lost:
            raise lost from err
        if isinstance(err, MigrationError):
            err.actual, err.phase = reached, err.phase or "load"
            err.aftermath = f"{device.name} is {reached.name} with {held}"
            if self._recorder.was_reset:
                err.aftermath = f"{device.name} was reset and is {reached.name}; nothing is loaded"

    def _phase(self, name: str, incoming: Incoming) -> AbstractContextManager[None]:
        return self._recorder.phase(name, lambda: incoming.device_bytes)

    def _report(self, incoming: Incoming, took_ns: int) -> TransferReport:
        running = self._options.after is DeviceState.RUNNING
        return TransferReport(
            device=self._device.name,
            framing=incoming.framing,
            device_bytes=incoming.device_bytes,
            stream_bytes=self._reader.offset,
            frames=incoming.frames,
            digest=f"{incoming.digest:016x}",
            state=self._options.after,
            duration_ns=self._recorder.duration_ns,
            stopped_ns=took_ns if running else None,
            phases=tuple(self._recorder.phases),
            state_changes=tuple(self._recorder.state_changes),
            warnings=tuple(self._recorder.warnings),
            buffer_bytes=self._reader.buffer_bytes,
            zero_bytes=incoming.zero_bytes,
            config=incoming.config,
        )
