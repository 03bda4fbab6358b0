"""Reading a device's state through a FrameWriter, and writing it: what each outcome means.

The loop itself is native; it knows descriptors and errnos. Here they get their device.
"""

import errno
import os
import time
from collections.abc import Callable

from vfiomig._fastcopy import Digest, FrameWriter, Outcome, Template
from vfiomig.channel import Chunks, DataChannel, PrecopyInfo
from vfiomig.device import Device
from vfiomig.errors import CancelledError, DeviceIOError, MigrationError, ResourceLimitError
from vfiomig.region import too_large
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation


class Reading:
    """One device on its way out. expected_bytes: its estimate, for messages; 0 where it has none.

    By protocol v1 a device tells how much is left while it is read: expected_bytes follows that.

    Borrows all it is given. One thread at a time.
    """

    def __init__(
        self,
        device: Device,
        writer: FrameWriter,
        digest: Digest | None,
        cancellation: Cancellation,
        sink_fd: int,
        sink_failed: Callable[[OSError], MigrationError],
    ) -> None:
        """sink_failed: what an OSError of sink_fd, the writer's descriptor, means."""
        self._device, self._writer, self._digest = device, writer, digest
        self._cancellation = cancellation
        self._sink_fd, self._sink_failed = sink_fd, sink_failed
        self.expected_bytes = 0

    def copy(self, channel: DataChannel, template: Template, limit: int, ends_ns: int) -> Outcome:
        """Copy once, as FrameWriter.copy(). Raises MigrationError for what failed, and where."""
        if channel.chunks is not None:
            return self._copy_chunks(channel.chunks, template, limit, ends_ns)
        try:
            outcome = self._writer.copy(
                channel.fileno(),
                template,
                limit,
                self._digest,
                deadline_ns=ends_ns,
                splicing=self._digest is None,
            )
        except OSError as err:
            raise self.failed(err) from err
        if outcome is Outcome.END_OF_STREAM and (cause := channel.failure()) is not None:
            if cause.errno == errno.ENOMSG:
                return Outcome.DRAINED
            raise self._read_failed(cause) from cause
        return outcome

    def _copy_chunks(self, chunks: Chunks, template: Template, limit: int, ends_ns: int) -> Outcome:
        """Copy chunks, whole ones: the last may go past limit."""
        ends_at = self._writer.device_bytes + limit
        while self._writer.device_bytes < ends_at:
            try:
                chunk = chunks.read()
            except OSError as err:
                raise self._read_failed(err) from err
            known_bytes = self._writer.device_bytes + chunks.pending_bytes
            self.expected_bytes = max(self.expected_bytes, known_bytes)
            try:
                if not chunk:
                    self._writer.flush()
                    return Outcome.END_OF_STREAM
                self._writer.put_chunk(template, chunk, self._digest)
            except OSError as err:
                raise self.failed(err) from err
            if ends_ns and time.monotonic_ns() >= ends_ns:
                return Outcome.DEADLINE_REACHED
        return Outcome.LIMIT_REACHED

    def precopy_info(self, channel: DataChannel) -> PrecopyInfo:
        """Ask VFIO_MIG_GET_PRECOPY_INFO. Raises DeviceIOError."""
        try:
            return channel.precopy_info()
        except OSError as err:
            what = "does not tell its pre-copy sizes"
            if err.errno == errno.ENODEV:  # linux/vfio.h: the session is dead
                what += f", it {self._reset_at()}"
            raise self._device_failed(what, err) from err

    def check_end(self, outcome: Outcome, most_bytes: int) -> None:
        """Check how a copy in STOP_COPY ended: only a read of 0 that began there is the end."""
        if outcome is Outcome.DRAINED:
            cause = OSError(errno.ENOMSG, os.strerror(errno.ENOMSG))
            raise self._device_failed("says in STOP_COPY that it is drained for now", cause)
        if outcome is not Outcome.END_OF_STREAM:
            raise self.too_large(most_bytes)
        self._device.check_session(DeviceState.STOP_COPY, DeviceState.STOP_COPY)

    def too_large(self, most_bytes: int) -> ResourceLimitError:
        """Return the error for a state of more than most_bytes."""
        return ResourceLimitError(
            f"{self._device.name}: its state is larger than the {most_bytes} bytes allowed",
            device=self._device.name,
            hint="raise the limit with --max-state, or look for an endless driver",
        )

    def failed(self, err: OSError) -> MigrationError:
        """Return what an OSError of the writer means: cancelled, its sink, or the device."""
        if self._cancellation.cancelled and err.errno == errno.ECANCELED:
            return CancelledError("cancelled while copying", device=self._device.name)
        if self._writer.failed_fd == self._sink_fd:
            return self._sink_failed(err)
        return self._read_failed(err)

    def _read_failed(self, cause: OSError) -> MigrationError:
        if cause.errno == errno.ENODEV:
            return self._device_failed(self._reset_at(), cause)
        return self._device_failed(f"failed at {self._position()} of its state", cause)

    def _reset_at(self) -> str:
        return f"was reset during the copy, at {self._position()}; its state is gone"

    def _position(self) -> str:
        of = f" of about {self.expected_bytes}" if self.expected_bytes else ""
        return f"byte {self._writer.device_bytes}{of}"

    def _device_failed(self, what: str, cause: OSError) -> MigrationError:
        return DeviceIOError(
            f"{self._device.name} {what}: {cause.strerror or cause}",
            device=self._device.name,
            errno=cause.errno,
            actual=self._device.state_or_none(),
        )


def refused(device: Device, channel: DataChannel, err: OSError, at_byte: int) -> DeviceIOError:
    """Return what a write to the data_fd of RESUMING that failed means."""
    cause = channel.failure() or err
    if channel.chunks is not None and err.errno == errno.EPERM:  # the seal of its buffer
        cause = too_large(device.region_bytes)
    what = "refused its state at byte"
    if cause.errno == errno.ENODEV:
        what = "was reset during the load, at byte"
    return DeviceIOError(
        f"{device.name} {what} {at_byte}: {cause.strerror or cause}",
        device=device.name,
        errno=cause.errno,
        wanted=DeviceState.RESUMING,
        actual=device.state_or_none(),
    )
