"""Say how long a migration of a device would stop it, and whether that is within the limit.

What is known of such devices counts: what earlier migrations on this host measured, and what
--measure does, which stops the device while its state is read once, into nothing. What was never
measured is said; the time is then a lower bound. Exit code 11 when it is over the limit.

examples:
  vfiomig estimate 'sim:?size=64M' --bandwidth 25Gbit
  vfiomig estimate unix:/run/vf0.sock --bandwidth 1G --downtime-limit 1s --measure
  vfiomig estimate fd:9 --bandwidth 100Gbit --json
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from vfiomig.cli import arguments
from vfiomig.cli.output import Output, table
from vfiomig.cli.watch import Watch
from vfiomig.device import Device
from vfiomig.errors import TimeLimitError, UsageError
from vfiomig.live.journal import journal_directory
from vfiomig.quantities import format_duration, format_rate, format_size
from vfiomig.rates import TELLING_BYTES, Measured, Rates
from vfiomig.report import TransferReport
from vfiomig.save import save
from vfiomig.switchover import ENDLESS_NS, Band, Estimate, estimate, pending_bytes
from vfiomig.uapi import Capability, DeviceState

# QEMU's downtime-limit (migration/options.c).
_DOWNTIME_LIMIT_NS = 300_000_000
_NOTHING = Measured(None, None)


class _Known(NamedTuple):
    """What is known before the sum. length: None when the device does not tell its size."""

    length: int | None
    reading: Measured
    loading: Measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument(
        "--bandwidth",
        type=arguments.rate,
        required=True,
        metavar="RATE",
        help="of the link to the other host: 1G is bytes per second, 25Gbit bits",
    )
    parser.add_argument(
        "--downtime-limit",
        type=arguments.duration,
        default=_DOWNTIME_LIMIT_NS,
        metavar="TIME",
        help="how long it may be stopped (default: 300ms)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="stop the device, and read its state once"
    )
    parser.add_argument(
        "--journal", type=Path, metavar="DIR", help="where measurements are kept, with the journals"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Estimate. Returns 0, or 11 when it is over the limit."""
    if not args.bandwidth:
        raise UsageError("--bandwidth must be more than nothing")
    rates = Rates(args.journal or journal_directory())
    with arguments.opened(args.device, out) as device:
        known = _known(device, rates)
        if args.measure:
            out.note(f"{device.name} is stopped while its state is read once")
            known = _measure(device, rates, known, out)
    expected = estimate(
        pending_bytes(known.length),
        link=args.bandwidth,
        reading=known.reading.bytes_per_s,
        loading=known.loading.bytes_per_s,
        fixed=[known.reading.fixed_ns, *filter(None, [known.loading.fixed_ns])],
    )
    is_within = expected.downtime_ns <= args.downtime_limit
    values = _values(device, known, expected) | {
        "bandwidth_bytes_per_s": args.bandwidth,
        "downtime_limit_ns": args.downtime_limit,
        "within_limit": is_within,
    }
    out.answer(values, _text(device, known, expected, args))
    return 0 if is_within else TimeLimitError.code


def _known(device: Device, rates: Rates) -> _Known:
    reading, loading = rates.of_source(device.identity), rates.of_destination(device.identity)
    length = device.stop_copy_length()
    is_size = pending_bytes(length) == length
    return _Known(length if is_size else None, reading or _NOTHING, loading or _NOTHING)


def _measure(device: Device, rates: Rates, known: _Known, out: Output) -> _Known:
    with Watch(out) as watch:
        report = save(device, os.devnull, on_event=watch)
        watch.finished(report.device_bytes)
    rate, fixed_ns = _measured(report)
    moved = report.device_bytes
    rates.add("read", device.identity, bytes_per_s=rate, fixed_ns=fixed_ns, moved_bytes=moved)
    # Where it cannot be kept, it still counts now.
    now = Measured(Band.of([rate] * (moved >= TELLING_BYTES)), Band.of([fixed_ns]))
    return _Known(moved, rates.of_source(device.identity) or now, known.loading)


def _measured(report: TransferReport) -> tuple[int, int]:
    """Return the bytes per second of the copy alone, and all else of the time it was stopped."""
    stopped_ns = report.stopped_ns or 0
    if report.device_bytes < TELLING_BYTES:
        return 0, stopped_ns
    copying_ns = next(phase.duration_ns for phase in report.phases if phase.name == "stop-copy")
    for change in report.state_changes:
        copying_ns -= change.duration_ns
        if change.wanted is DeviceState.STOP_COPY:
            break
    copying_ns = min(max(copying_ns, 1), stopped_ns)
    return report.device_bytes * 10**9 // copying_ns, stopped_ns - copying_ns


def _values(device: Device, known: _Known, expected: Estimate) -> dict[str, object]:
    reading, loading = known.reading.bytes_per_s, known.loading.bytes_per_s
    return {
        "device": device.name,
        "capabilities": device.capabilities.names,
        "pre_copy": bool(device.capabilities & Capability.PRE_COPY),
        "size_known": known.length is not None,
        "reading_bytes_per_s": reading and reading._asdict(),
        "loading_bytes_per_s": loading and loading._asdict(),
        # Without pre-copy both are the same; with it, this is what moves at least.
        "total_ns": expected.downtime_ns,
        **expected._asdict(),
    }


def _text(device: Device, known: _Known, expected: Estimate, args: argparse.Namespace) -> str:
    size = f"{format_size(expected.bytes)} ({expected.bytes} bytes)"
    if known.length is None:
        size = f"it does not tell: counted as {format_size(expected.bytes)}"
    pre_copy = "not possible: all of it moves while the device is stopped"
    if device.capabilities & Capability.PRE_COPY:
        pre_copy = "possible: some of it may move while the device runs"
    ways = [("device", known.reading.bytes_per_s), ("loading", known.loading.bytes_per_s)]
    rows = [
        ("size", size),
        ("pre-copy", pre_copy),
        ("link", format_rate(args.bandwidth)),
        *((name, _rate(band)) for name, band in ways),
        ("takes", f"{_about(expected)} {_duration(expected.downtime_ns)} in all, once connected"),
        ("stopped", _stopped(expected)),
        ("verdict", _verdict(device, expected, args.downtime_limit)),
    ]
    return f"{device.name}\n" + table(rows, indent="  ")


def _rate(band: Band | None) -> str:
    if band is None:
        return "never measured"
    return f"{format_rate(band.median)} ({format_rate(band.low)} to {format_rate(band.high)})"


def _stopped(expected: Estimate) -> str:
    low, high = _duration(expected.low_ns), _duration(expected.high_ns)
    words = f"{_about(expected)} {_duration(expected.downtime_ns)} without pre-copy"
    return f"{words} ({low} to {high})"


def _about(expected: Estimate) -> str:
    return "at least" if expected.unknown else "about"


def _duration(duration_ns: int) -> str:
    return "any time" if duration_ns == ENDLESS_NS else format_duration(duration_ns)


def _verdict(device: Device, expected: Estimate, limit_ns: int) -> str:
    limit = f"the limit of {format_duration(limit_ns)}"
    never = f"; never measured: {', '.join(expected.unknown)}" if expected.unknown else ""
    if expected.downtime_ns > limit_ns:
        hope = "; pre-copy may bring it below" if device.capabilities & Capability.PRE_COPY else ""
        return f"over {limit}{hope}"
    if expected.high_ns > limit_ns:
        return f"within {limit}, but it may take more{never}"
    return f"within {limit}{never}"
