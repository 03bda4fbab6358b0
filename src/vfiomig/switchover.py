"""When to stop the devices: what it would take, from what was measured, and whether it may. Pure.

    expected = estimate(left_bytes, link=rate, reading=…, loading=…, fixed=[…])
    decide(expected.downtime_ns, limit_ns, initial_done=…, exhausted=…, switch_on_limit=…)

QEMU estimates from what it has sent, which for an idle device is nothing, or leaves the state out:
it stops a device of 2 GiB for 2 s where 300 ms are allowed, or never. Here the size always counts,
by what the device, the link and the loading device were measured to do.
"""

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple, Self

# A size that cannot be queried counts so: VFIO_MIG_STOP_COPY_SIZE of QEMU, hw/vfio/migration.c.
UNKNOWN_BYTES = 100 << 30
# Sizes are loff_t. xe lets an errno out as a huge u64, and a broken driver may say 2**64 - 1.
_NO_SIZE = 1 << 63
# Where nothing bounds a time: the largest that fits everywhere (292 years).
ENDLESS_NS = (1 << 63) - 1
# Ours: how far a single measurement may be off, as a fraction; it shows no spread of its own.
_SINGLE_SPREAD = (4, 5)
# Ours: a device that was never measured may be so many times slower than what was.
_UNKNOWN_FACTOR = 4
# Ours: what state changes may take that were never measured.
_UNKNOWN_FIXED_NS = 100_000_000

DEVICE, LINK, LOADING, FIXED = "device", "link", "loading device", "fixed"


class Band(NamedTuple):
    """A quantity as it was measured, several times at best: the middle, and how far it goes."""

    median: int
    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[int]) -> Self | None:
        """Return the band of some measurements, None if there are none.

        The lower median of an even number. One alone is taken to be right within a fifth or so.
        """
        ordered = sorted(values)
        if not ordered:
            return None
        median = ordered[(len(ordered) - 1) // 2]
        if len(ordered) == 1:
            less, more = _SINGLE_SPREAD
            return cls(median, median * less // more, median * more // less)
        return cls(median, ordered[0], ordered[-1])


class Part(NamedTuple):
    """What one device still has to move, in bytes; what it was measured to do, in bytes per second.

    fixed: of each side, the nanoseconds that its state changes take whatever the size is.
    """

    pending: int
    reading: Band | None = None
    loading: Band | None = None
    fixed: Sequence[Band | None] = (None,)


class Estimate(NamedTuple):
    """How long devices would be stopped: downtime_ns, between low_ns and high_ns at the best guess.

    bytes_per_s: what all of them move together, 0 where nothing is known or nothing has to move.
    fixed_ns: of downtime_ns, what does not depend on bytes. unknown: what was never measured, of
    "device", "link", "loading device" and "fixed"; unless () downtime_ns is a lower bound.
    """

    downtime_ns: int
    low_ns: int
    high_ns: int
    bytes: int
    bytes_per_s: int
    fixed_ns: int
    unknown: tuple[str, ...] = ()


class Decision(Enum):
    """What to do with devices that run."""

    GO_ON = auto()  # with pre-copy
    SWITCH = auto()  # stop them
    CANCEL = auto()  # let them run here: it would take too long


def pending_bytes(
    stop_copy_length: int | None, initial_bytes: int = 0, dirty_bytes: int = 0
) -> int:
    """Return how much a stop would have to move, from what a device says of itself.

    stop_copy_length (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE) should contain what pre-copy has left
    (VFIO_MIG_GET_PRECOPY_INFO), and with some drivers does not: the larger one counts. No answer,
    and one that is no size, is 100 GiB.
    """
    sizes = (stop_copy_length, initial_bytes, dirty_bytes)
    if any(size is None or size >= _NO_SIZE for size in sizes):
        return UNKNOWN_BYTES
    return max(stop_copy_length or 0, initial_bytes + dirty_bytes)


def estimate(
    pending: int,
    *,
    link: int = 0,
    reading: Band | None = None,
    loading: Band | None = None,
    fixed: Sequence[Band | None] = (None,),
) -> Estimate:
    """Return how long one device would be stopped: as estimate_together(), of one Part."""
    return estimate_together([Part(pending, reading, loading, fixed)], link=link)


def estimate_together(parts: Sequence[Part], *, link: int = 0, end_to_end: int = 0) -> Estimate:
    """Return how long devices that are stopped together would be. parts: at least one.

    link: bytes per second for all together, 0 if never measured. end_to_end: what was measured to
    arrive in the loading devices, all together: then nothing but "fixed" can be unknown.

    Reading, sending and loading overlap: the slowest that is known decides, and of several devices
    the last one. What is fixed comes on top, of each side, of the slowest device. low_ns takes the
    fastest of all measurements, high_ns the slowest. Where a rate was never measured, high_ns is
    four times as much, or endless if none was; where "fixed" was not, 100 ms more.
    """
    total = sum(part.pending for part in parts)
    unknown = _unknown(parts, link, end_to_end)
    median, low, high = _moving_ns(parts, total, link, end_to_end)
    fixed = Band(*(max(_fixed_ns(part, name) for part in parts) for name in Band._fields))
    if total and any(name != FIXED for name in unknown):
        high = high * _UNKNOWN_FACTOR if high else ENDLESS_NS
    if FIXED in unknown:
        high += _UNKNOWN_FIXED_NS
    return Estimate(
        downtime_ns=min(median + fixed.median, ENDLESS_NS),
        low_ns=min(low + fixed.low, ENDLESS_NS),
        high_ns=min(high + fixed.high, ENDLESS_NS),
        bytes=total,
        bytes_per_s=total * 10**9 // median if median else 0,
        fixed_ns=fixed.median,
        unknown=unknown,
    )


def _moving_ns(parts: Sequence[Part], total: int, link: int, end_to_end: int) -> Band:
    """Return how long all bytes take: the slowest way that is known, 0 where none is."""
    # A link is as fast as it is said to be; what was measured once has its spread.
    shared = [Band(link, link, link) if link else None, Band.of([end_to_end] * bool(end_to_end))]
    ways = [(total, rate) for rate in shared]
    ways += [(part.pending, rate) for part in parts for rate in (part.reading, part.loading)]
    known = [(length, rate) for length, rate in ways if rate is not None]
    # The highest of the rates makes the lowest of the times.
    return Band(
        *(
            max((_time_ns(length, getattr(rate, name)) for length, rate in known), default=0)
            for name in ("median", "high", "low")
        )
    )


def _unknown(parts: Sequence[Part], link: int, end_to_end: int) -> tuple[str, ...]:
    found = {
        DEVICE: not end_to_end and any(part.reading is None for part in parts),
        LINK: not end_to_end and not link,
        LOADING: not end_to_end and any(part.loading is None for part in parts),
        FIXED: any(band is None for part in parts for band in part.fixed),
    }
    return tuple(name for name, is_unknown in found.items() if is_unknown)


def _fixed_ns(part: Part, name: str) -> int:
    return sum(getattr(band, name) for band in part.fixed if band is not None)


def _time_ns(length: int, bytes_per_s: int) -> int:
    if bytes_per_s <= 0:
        return ENDLESS_NS if length else 0
    return -(-length * 10**9 // bytes_per_s)  # rounded up: something always takes some time


def decide(
    expected_ns: int,
    limit_ns: int,
    *,
    initial_done: bool,
    exhausted: bool,
    switch_on_limit: bool,
) -> Decision:
    """Return what to do with devices that would be stopped for expected_ns.

    initial_done: all initial data (struct vfio_precopy_info) was sent, and the destination said so.
    exhausted: rounds, time or bytes of pre-copy are used up, or there is none: then it is now or
    never. That nothing is dirty is never waited for: some devices never run dry (virtio).
    A switchover without initial_done is allowed by the kernel and costs time: only when exhausted.
    """
    if initial_done and expected_ns <= limit_ns:
        return Decision.SWITCH
    if exhausted:
        return Decision.SWITCH if switch_on_limit else Decision.CANCEL
    return Decision.GO_ON
