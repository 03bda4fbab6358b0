"""One device at the source: its rounds of pre-copy, its stop, its stream of frames."""

import time
from collections.abc import Callable

from vfiomig import switchover
from vfiomig._fastcopy import Digest, Outcome, Template
from vfiomig.channel import DataChannel, PrecopyInfo
from vfiomig.copyloop import Reading
from vfiomig.device import Device
from vfiomig.framing.native import FrameFlag
from vfiomig.live import wire
from vfiomig.live.link import Outbox
from vfiomig.live.messages import End, Mark
from vfiomig.live.options import SendOptions
from vfiomig.live.wire import Kind
from vfiomig.options import RING_BYTES
from vfiomig.uapi import Capability, DeviceState
from vfiomig.worker import Cancellation

# How long the loop copies before it looks whether it still should.
SLICE_NS = 50_000_000


class Mover:
    """Borrows a device, for one thread at a time. Counters may be read from any thread.

    check() raises what ends the session. share: how many devices share memory and bandwidth.
    """

    def __init__(
        self,
        device: Device,
        index: int,
        outbox: Outbox,
        options: SendOptions,
        wake: Cancellation,
        check: Callable[[], None],
        *,
        share: int,
    ) -> None:
        self.device, self.index = device, index
        self._outbox, self._options, self._check = outbox, options, check
        buffer_bytes = min(options.buffer_bytes, max(RING_BYTES // 2 // share, 64 << 10))
        slots = max(2, RING_BYTES // share // buffer_bytes)
        self._writer = outbox.writer(
            index, buffer_bytes, wake, ring_slots=min(options.ring_slots, slots)
        )
        self._writer.bytes_per_s = options.bytes_per_s // share
        self._digest = Digest()
        self._reading = Reading(
            device, self._writer, self._digest, wake, outbox.out_fd, outbox.failed
        )
        elide = options.elide_zeros
        self._pre_copy_frames, self._stop_copy_frames = (
            wire.template(Kind.DATA, index, flags=flags, elide_zeros=elide)
            for flags in (FrameFlag.PRE_COPY, FrameFlag(0))
        )
        self._channel: DataChannel | None = None
        self._info = PrecopyInfo(0, 0)
        self.pending_bytes = self.pre_copy_bytes = self.stopped_ns = 0
        self._is_acknowledged = False

    @property
    def has_pre_copy(self) -> bool:
        """Whether the device can be read while it runs."""
        return bool(self.device.capabilities & Capability.PRE_COPY)

    @property
    def is_initial_done(self) -> bool:
        """Whether all initial data is at the destination, by its word. True without pre-copy."""
        if self._channel is None:
            return True
        return self._is_acknowledged and not self._info.initial_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes read from the device so far."""
        return self._writer.device_bytes

    @property
    def zero_bytes(self) -> int:
        """Of device_bytes, those that did not travel."""
        return self._writer.zero_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes written to the connection so far."""
        return self._writer.stream_bytes

    @property
    def digest(self) -> str:
        """XXH3-64 of the bytes so far, 16 hex digits."""
        return f"{self._digest.value:016x}"

    def start_pre_copy(self) -> None:
        """Enter PRE_COPY."""
        self.device.set_precopy_info_v2()
        self._channel = self.device.start_session(DeviceState.PRE_COPY)

    def ask(self) -> None:
        """Ask what is left. In PRE_COPY, this is what makes some drivers produce new data."""
        length = self.device.stop_copy_length()
        self._reading.expected_bytes = length or 0
        if self._channel is not None:
            self._info = self._reading.precopy_info(self._channel)
            if self._info.reinit:  # there is initial data again: it must be acknowledged again
                self._is_acknowledged = False
        self.pending_bytes = switchover.pending_bytes(length, *self._info[:2])

    def round_job(self, number: int, most_bytes: int, ends_ns: int) -> Callable[[], None]:
        """Return one round: copy until there is nothing now, or a bound is reached; then a mark."""
        return lambda: self._round(number, most_bytes, ends_ns)

    def _round(self, number: int, most_bytes: int, ends_ns: int) -> None:
        assert self._channel is not None
        most = self._options.max_state_bytes
        left = most + 1 - self.device_bytes
        self._copy(self._channel, self._pre_copy_frames, min(most_bytes, left), ends_ns)
        if self.device_bytes > most:
            raise self._reading.too_large(most)
        self.pre_copy_bytes = self.device_bytes
        self.mark(number)

    def mark(self, number: int) -> None:
        """Ask the destination to say when all so far is in its device."""
        self._outbox.say_in(self._writer, self.index, Mark(number))

    def acknowledged(self) -> None:
        """Take in that the destination has said so."""
        self._is_acknowledged = True

    def probe(self, most_bytes: int, most_ns: int) -> int:
        """Send what the destination drops, to measure the link. Returns the bytes sent."""
        step = min(1 << 20, self._writer.buffer_bytes)
        ends_ns, sent = time.monotonic_ns() + most_ns, 0
        while sent + step <= most_bytes and time.monotonic_ns() < ends_ns:
            self._check()
            self._outbox.probe(self._writer, self.index, step)
            sent += step
        return sent

    def quiesce(self) -> None:
        """Enter the P2P state on the way to STOP_COPY, where the device has one."""
        if self.device.capabilities & Capability.P2P:
            copying = self._channel is not None
            target = DeviceState.PRE_COPY_P2P if copying else DeviceState.RUNNING_P2P
            self.device.set_state(target)
        self._check()

    def stop_copy(self) -> None:
        """Stop the device, copy what is left, and say that this was all."""
        channel = self.device.start_session(DeviceState.STOP_COPY)
        self.stopped_ns = time.monotonic_ns()
        self._check()
        most = self._options.max_state_bytes
        outcome = self._copy(channel, self._stop_copy_frames, most + 1 - self.device_bytes, 0)
        self._reading.check_end(outcome, most)
        self._outbox.say_in(self._writer, self.index, End(self.device_bytes, self.digest))

    def _copy(self, channel: DataChannel, template: Template, limit: int, ends_ns: int) -> Outcome:
        before = self.device_bytes
        while True:
            self._check()
            soon_ns = time.monotonic_ns() + SLICE_NS
            deadline_ns = min(soon_ns, ends_ns) if ends_ns else soon_ns
            left = limit - (self.device_bytes - before)
            outcome = self._reading.copy(channel, template, left, deadline_ns)
            if outcome is not Outcome.DEADLINE_REACHED:
                return outcome
            if ends_ns and time.monotonic_ns() >= ends_ns:
                return Outcome.LIMIT_REACHED

    def close(self) -> None:
        """Stop the writer's threads."""
        self._writer.close()
