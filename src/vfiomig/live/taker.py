"""One device at the destination: RESUMING, its bytes and their digest, the commit."""

import threading
import time

from vfiomig._fastcopy import Digest, Outcome
from vfiomig.channel import DataChannel
from vfiomig.copyloop import refused
from vfiomig.device import Device
from vfiomig.errors import PeerError, ResourceLimitError
from vfiomig.framing.native import FrameFlag
from vfiomig.live.link import Inbox
from vfiomig.live.messages import End
from vfiomig.live.wire import FrameHeader
from vfiomig.uapi import DeviceState

# How long to copy before looking whether it still should.
SLICE_NS = 50_000_000
_ANY_BYTES = 1 << 62


class Taker:
    """Borrows a device. take() and end() in the thread that reads its connection.

    After drop(), in whatever thread, nothing more is written: what comes is read and forgotten.
    """

    def __init__(self, device: Device, max_state_bytes: int) -> None:
        self.device, self._max_state_bytes = device, max_state_bytes
        self._digest = Digest()
        self._channel: DataChannel | None = None
        self._writing = threading.Lock()
        self._dropping = self.is_ended = self._is_touched = False
        self.device_bytes = self.pre_copy_bytes = self.zero_bytes = 0

    @property
    def digest(self) -> str:
        """XXH3-64 of the bytes so far, 16 hex digits."""
        return f"{self._digest.value:016x}"

    @property
    def is_touched(self) -> bool:
        """Whether the device was asked to leave RUNNING."""
        return self._is_touched

    def undo(self) -> None:
        """Reset the device, if it was in RESUMING; else bring it back. Raises DeviceLostError."""
        if self._channel is not None:
            self.device.reset()
        elif self._is_touched:
            self.device.recover(DeviceState.RUNNING)

    def resume(self) -> None:
        """Enter RESUMING: what the device held is lost."""
        self._is_touched = True
        self._channel = self.device.start_session(DeviceState.RESUMING)

    def take(self, inbox: Inbox, header: FrameHeader) -> None:
        """Write the frame of this header, and those like it, into the device.

        Raises DeviceIOError, ResourceLimitError, PeerError.
        """
        if self.is_ended or self._channel is None:
            raise PeerError(f"state of {self.device.name} came when none was to come")
        left = self._left()
        if header.length > left:
            raise ResourceLimitError(
                f"{self.device.name}: its state is larger than the {self._max_state_bytes} bytes"
                " allowed",
                device=self.device.name,
                hint="raise the limit with --max-state, if the device's state is really as large",
            )
        outcome = self._slice(inbox, header, left, first=True)
        while outcome is Outcome.DEADLINE_REACHED:
            left = self._left()
            outcome = self._slice(inbox, header, left, first=False)

    def _left(self) -> int:
        return _ANY_BYTES if self._dropping else self._max_state_bytes - self.device_bytes

    def _slice(self, inbox: Inbox, header: FrameHeader, left: int, *, first: bool) -> Outcome:
        assert self._channel is not None
        before, zeros = inbox.device_bytes, inbox.zero_bytes
        with self._writing:  # a reset closes the descriptor: not while it is written to
            data_fd = -1 if self._dropping else self._channel.fileno()
            digest = None if self._dropping else self._digest
            ends_ns = time.monotonic_ns() + SLICE_NS
            try:
                if first:
                    return inbox.copy(header, data_fd, digest, left, ends_ns)
                return inbox.go_on(data_fd, digest, left, ends_ns)
            except OSError as err:
                at = self.device_bytes + inbox.device_bytes - before
                raise refused(self.device, self._channel, err, at) from err
            finally:
                moved = inbox.device_bytes - before
                self.device_bytes += moved
                self.zero_bytes += inbox.zero_bytes - zeros
                self.pre_copy_bytes += moved if header.flags & FrameFlag.PRE_COPY else 0

    def settle(self) -> None:
        """Raise DeviceIOError for a write that the device refused and could not tell.

        Raises PeerError where nothing was to come.
        """
        if self.is_ended or self._channel is None:
            raise PeerError(f"a word on the state of {self.device.name} came when none was to come")
        if not self._dropping:
            cause = self._channel.failure()
            if cause is not None:
                raise refused(self.device, self._channel, cause, self.device_bytes) from cause

    def end(self, end: End) -> None:
        """Compare what came with what the source says it was. Raises PeerError."""
        self.settle()
        if self._dropping:  # it has failed already, and what was dropped is not in the digest
            return
        if (end.device_bytes, end.digest) != (self.device_bytes, self.digest):
            raise PeerError(
                f"{self.device.name}: {self.device_bytes} bytes came, of digest {self.digest}; the"
                f" source sent {end.device_bytes}, of {end.digest}"
            )
        self.is_ended = True

    def commit(self) -> None:
        """RESUMING -> STOP."""
        # After a reset by somebody else RUNNING -> STOP succeeds too, and loads nothing.
        self.device.check_session(DeviceState.RESUMING, DeviceState.STOP)
        self.device.set_state(DeviceState.STOP)

    def drop(self) -> None:
        """Write nothing any more, from the next slice on."""
        self._dropping = True
