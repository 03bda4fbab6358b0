"""What happens and what happened: events while it does, reports when it is over. Frozen values.

Times are of CLOCK_MONOTONIC, in nanoseconds: a wall clock that is set does not disturb them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from errno import errorcode

from vfiomig.uapi import DeviceState


@dataclass(frozen=True, slots=True)
class StateChange:
    """One state change that was asked of a device (VFIO_DEVICE_FEATURE SET, or a reset).

    wanted: the state asked for. actual: the state read back after a failure, else wanted; None when
    it could not be read. errno: None on success. by: "set" or "reset".
    """

    device: str
    before: DeviceState | None
    wanted: DeviceState
    actual: DeviceState | None
    errno: int | None
    started_ns: int
    duration_ns: int
    by: str = "set"


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read of a data_fd that became one frame or record. device_offset: bytes before it."""

    device: str
    device_offset: int
    length_bytes: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the copy stands. expected_bytes: the device's own estimate, 0 when it has none."""

    device: str
    phase: str
    device_bytes: int
    expected_bytes: int
    elapsed_ns: int


@dataclass(frozen=True, slots=True)
class Warning:
    """Something a person should know that does not stop the work."""

    device: str
    text: str


@dataclass(frozen=True, slots=True)
class Connected:
    """A live migration: the receiver listens at address (peer ""), or somebody is there."""

    address: str
    peer: str


@dataclass(frozen=True, slots=True)
class MigrationProgress:
    """Where a live migration stands, of all its devices together.

    device_bytes: read here (source) or loaded here (destination). pending_bytes: what a stop would
    still have to move, as estimated. bytes_per_s: measured end to end, 0 before that.
    expected_downtime_ns: 0 before it can be told. round: of pre-copy, 0 outside it.
    """

    phase: str
    round: int
    device_bytes: int
    pending_bytes: int
    bytes_per_s: int
    expected_downtime_ns: int
    elapsed_ns: int


@dataclass(frozen=True, slots=True)
class StoppingSoon:
    """The devices are about to be stopped, for about expected_downtime_ns. text: how that comes."""

    expected_downtime_ns: int
    text: str


Event = StateChange | Chunk | Progress | Warning | Connected | MigrationProgress | StoppingSoon
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of the work. device_bytes: bytes of the device's state that moved in it."""

    name: str
    device_bytes: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What save() or load() did.

    device_bytes: bytes of the device's own state. stream_bytes: bytes of the stream around them.
    frames: frames of the stream (native), or DATA records (qemu). digest: XXH3-64 over the
    device's bytes in order, 16 hex digits, the same on both sides and in both framings; "" if off.
    state: what the device was left in. stopped_ns: how long it was not RUNNING (save), or how long
    it was on its way (load); None when it was left stopped. config: the opaque blob that travelled.
    buffer_bytes: what one read asked for in the end. zero_bytes: of device_bytes, those that did
    not travel, or are holes in the file. spliced_bytes: those the kernel spliced.
    direct_bytes: of stream_bytes, those written past the page cache.
    """

    device: str
    framing: str
    device_bytes: int
    stream_bytes: int
    frames: int
    digest: str
    state: DeviceState
    duration_ns: int
    stopped_ns: int | None
    phases: tuple[Phase, ...] = ()
    state_changes: tuple[StateChange, ...] = ()
    warnings: tuple[str, ...] = ()
    buffer_bytes: int = 0
    zero_bytes: int = 0
    spliced_bytes: int = 0
    direct_bytes: int = 0
    config: bytes = field(default=b"", repr=False)

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON; states by name, config by its length."""
        plain = asdict(self)
        plain["state"] = self.state.name
        plain["config_bytes"] = len(plain.pop("config"))
        plain["state_changes"] = [state_change_dict(change) for change in self.state_changes]
        return plain


@dataclass(frozen=True, slots=True)
class MovedDevice:
    """One device of a live migration: its name here, what moved, what it was left in here.

    pre_copy_bytes: of device_bytes, those that moved while it ran. zero_bytes: those that did not
    travel. digest: XXH3-64 of all, 16 hex digits, the same on both sides.
    """

    name: str
    device_bytes: int
    pre_copy_bytes: int
    zero_bytes: int
    digest: str
    state: DeviceState


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What send() or receive() did.

    downtime_ns: from asking the first device at the source to leave its running states, to the last
    device RUNNING at the destination; true within downtime_error_ns, half the round trip of GO and
    DONE. source_downtime_ns: from the same moment until the source heard of it.
    destination_downtime_ns: from hearing that the source stops to the last device RUNNING. All by
    CLOCK_MONOTONIC of one host each; None where the other end did not tell. expected_downtime_ns:
    what was reckoned just before stopping. bytes_per_s: from end to end, while it was measured; 0
    at the destination, which does not measure it. stream_bytes: of the frames of the devices
    (source), of all frames (destination).
    """

    role: str
    session: str
    peer: str
    devices: tuple[MovedDevice, ...]
    stream_bytes: int
    rounds: int
    duration_ns: int
    downtime_ns: int | None
    downtime_error_ns: int | None
    source_downtime_ns: int | None
    destination_downtime_ns: int | None
    expected_downtime_ns: int
    downtime_limit_ns: int | None
    bytes_per_s: int
    phases: tuple[Phase, ...] = ()
    state_changes: tuple[StateChange, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON; states by name."""
        plain = asdict(self)
        plain["devices"] = [asdict(moved) | {"state": moved.state.name} for moved in self.devices]
        plain["state_changes"] = [state_change_dict(change) for change in self.state_changes]
        return plain


def state_change_dict(change: StateChange) -> dict[str, object]:
    """Return a state change as plain values for JSON, states by name."""
    plain = asdict(change)
    plain["before"] = None if change.before is None else change.before.name
    plain["wanted"] = change.wanted.name
    plain["actual"] = None if change.actual is None else change.actual.name
    plain["errno_name"] = errorcode.get(change.errno) if change.errno else None
    return plain
