"""What a caller can ask of send() and receive(). Frozen values, checked before anything is done."""

from dataclasses import dataclass
from pathlib import Path

from vfiomig.device import Device
from vfiomig.errors import NotMigratableError, UsageError
from vfiomig.fit import ALLOWED_FIELDS
from vfiomig.framing import native
from vfiomig.live.tls import TlsFiles
from vfiomig.live.wire import MAX_CONNECTIONS
from vfiomig.options import (
    DEFAULT_BUFFER_BYTES,
    DEFAULT_MAX_STATE_BYTES,
    DEFAULT_RING_SLOTS,
    MAX_RING_SLOTS,
    MIN_BUFFER_BYTES,
    PreCopyLimits,
)

# QEMU's downtime-limit (migration/options.c).
DEFAULT_DOWNTIME_LIMIT_NS = 300_000_000
# Ours: a peer that says nothing for so long has gone; a healthy one says something every second.
DEFAULT_SILENCE_NS = 10_000_000_000
DEFAULT_HANDSHAKE_NS = 5_000_000_000
DEFAULT_LEASE_NS = 30_000_000_000
MAX_DEVICES = native.MAX_DEVICES
LIVE_PRE_COPY = PreCopyLimits(rounds=30, duration_ns=60_000_000_000)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How to send. Every field has a default; sizes in bytes, times in nanoseconds.

    pre_copy: limits of the rounds, for devices that have PRE_COPY; None: STOP_COPY alone.
    downtime_limit_ns: devices are stopped only when the downtime is expected to stay within it;
    where it never does, switch_on_limit stops them nevertheless, else TimeLimitError.
    connections: None: one for each device (over fd:N and stdio: one in all). bytes_per_s: 0, or the
    most to send in a second. reset_after: reset the devices once the destination runs, instead of
    leaving them in STOP with the state they had. without_p2p: several devices although one of them
    has no P2P. lease_ns: how long the destination waits, committed, for GO. silence_ns: after how
    long a peer that says nothing has gone. tls: files, or None; insecure: TCP without TLS beyond
    this machine. journal: the directory of journals, None: journal_directory().
    """

    pre_copy: PreCopyLimits | None = LIVE_PRE_COPY
    downtime_limit_ns: int = DEFAULT_DOWNTIME_LIMIT_NS
    switch_on_limit: bool = False
    connections: int | None = None
    bytes_per_s: int = 0
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    ring_slots: int = DEFAULT_RING_SLOTS
    elide_zeros: bool = True
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES
    reset_after: bool = False
    without_p2p: bool = False
    lease_ns: int = DEFAULT_LEASE_NS
    silence_ns: int = DEFAULT_SILENCE_NS
    handshake_ns: int = DEFAULT_HANDSHAKE_NS
    tls: TlsFiles | None = None
    insecure: bool = False
    journal: Path | None = None

    def check(self) -> None:
        """Raise UsageError for what cannot work."""
        _check_buffer(self.buffer_bytes)
        if not 1 <= self.ring_slots <= MAX_RING_SLOTS:
            raise UsageError(f"a ring of {self.ring_slots} slots: 1 to {MAX_RING_SLOTS}")
        if self.bytes_per_s < 0:
            raise UsageError(f"a rate of {self.bytes_per_s} bytes per second")
        if self.connections is not None and not 1 <= self.connections <= MAX_CONNECTIONS:
            raise UsageError(f"{self.connections} connections: 1 to {MAX_CONNECTIONS}")
        _check_times(self.lease_ns, self.silence_ns, self.handshake_ns)


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """How to receive. Fields as in SendOptions.

    allow_mismatch: names of fields in which the devices may differ: Identity's, "capabilities".
    wait_ns: how long to wait for a source, 0: for ever.
    """

    allow_mismatch: frozenset[str] = frozenset()
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES
    silence_ns: int = DEFAULT_SILENCE_NS
    handshake_ns: int = DEFAULT_HANDSHAKE_NS
    wait_ns: int = 0
    tls: TlsFiles | None = None
    insecure: bool = False
    journal: Path | None = None

    def check(self) -> None:
        """Raise UsageError for what cannot work."""
        _check_buffer(self.buffer_bytes)
        _check_times(self.silence_ns, self.handshake_ns)
        if unknown := self.allow_mismatch - ALLOWED_FIELDS:
            raise UsageError(
                f"no such field of a device: {', '.join(sorted(unknown))};"
                f" there are {', '.join(sorted(ALLOWED_FIELDS))}"
            )


def check_protocol(device: Device) -> None:
    """Raise NotMigratableError for protocol v1, by which loading a device lets it run.

    The hand-over has to have a loaded device that does not run before the source gives up its own.
    """
    if device.protocol == "v1":
        raise NotMigratableError(
            f"{device.name} has protocol v1, and cannot be loaded without running: both could run",
            device=device.name,
            hint="save it with --after stop, and load it on the other host",
        )


def _check_buffer(buffer_bytes: int) -> None:
    if not MIN_BUFFER_BYTES <= buffer_bytes <= native.MAX_FRAME_BYTES:
        raise UsageError(f"a buffer of {buffer_bytes} bytes: 4 KiB to 128 MiB")


def _check_times(*times_ns: int) -> None:
    if min(times_ns) <= 0:
        raise UsageError("a time to wait must be more than nothing")
