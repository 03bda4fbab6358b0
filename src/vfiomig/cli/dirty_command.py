"""Show which pages of memory a device writes, by its DMA log: how many, how fast, and where.

Only writes of the device itself (DMA) are logged, not the CPU's. Addresses are the device's
(IOVAs). The log is ended whatever happens; a signal ends the command, with its result. What the
device cannot report counts as dirty, all of it.

examples:
  vfiomig dirty 'sim:?dma_writes=500' --range 0x100000:16M --count 5 --interval 200ms
  vfiomig dirty unix:/run/vf0.sock --range 0:3G --range 4G:12G --page-size 64K --duration 10s
  vfiomig dirty fd:9 --range 0x100000000:1G --map --json
"""

import argparse
import select
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType

from vfiomig.cli import arguments, dirty_text
from vfiomig.cli.dirty_text import Found, Totals
from vfiomig.cli.output import STOPPING, Output
from vfiomig.device import Device
from vfiomig.dirty import SMALLEST_PAGE_BYTES, DirtyLog, stop_logging
from vfiomig.dirty_report import DirtyPages, DirtyReport
from vfiomig.errors import UsageError
from vfiomig.quantities import parse_size
from vfiomig.worker import Cancellation, run_shielded

# Ours: what fits on a screen.
_MOST_RANGES = 20
# Ours: one bit for each page, to tell pages that were dirty again from new ones: 8 MiB.
_MOST_DISTINCT_PAGES = 8 << 23
# poll() takes an int.
_LONGEST_WAIT_MS = 1e6


class _Repeated(argparse.Action):
    """Gathers values in a list, which replaces what the environment says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Take one more."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), values])


def _address(text: str) -> int:
    try:
        return int(text, 16) if text[:2].lower() == "0x" else parse_size(text)
    except ValueError:
        raise UsageError(f"{text!r} is not an address, such as 0x100000") from None


def _range(text: str) -> tuple[int, int]:
    iova, colon, length = text.partition(":")
    if not colon:
        raise UsageError(f"{text!r} is not IOVA:LENGTH, such as 0x100000:16M")
    return _address(iova), _address(length)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 2**63:
        raise UsageError(f"{text!r} is not a number of reports")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    add = parser.add_argument
    add("device", metavar="DEVICE")
    add("--range", action=_Repeated, type=arguments.typed(_range), required=True,
        metavar="IOVA:LENGTH", help="what to log: 0x100000:16M (repeatable)")  # fmt: skip
    add("--page-size", type=arguments.size, default=SMALLEST_PAGE_BYTES, metavar="SIZE",
        help="ask the device for pages of this size; it chooses (default: 4K)")  # fmt: skip
    add("--interval", type=arguments.duration, default=10**9, metavar="TIME",
        help="between two reports (default: 1s)")  # fmt: skip
    add("--count", type=arguments.typed(_number), metavar="N", help="end after so many reports")
    add("--duration", type=arguments.duration, metavar="TIME", help="end after so long")
    add("--map", action="store_true", help="list the dirty ranges of each report")
    add("--all", action="store_true", help=f"list all ranges, not the first {_MOST_RANGES} of each")
    add("--restart", action="store_true",
        help="end a log first that somebody else has left on")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Log. Returns 0; when a signal came before --count or --duration were done, its exit code."""
    if not args.interval or args.duration == 0:
        raise UsageError("--interval and --duration must be more than nothing")
    ranges = args.range if isinstance(args.range, list) else [args.range]
    with arguments.opened(args.device, out) as device, closing(Cancellation()) as cancellation:
        log = DirtyLog(device, ranges, args.page_size)
        with _ended_by_signals(cancellation) as taken:
            found = run_shielded(lambda: _work(device, log, args, out, cancellation), cancellation)
        out.answer(
            dirty_text.result_values(device.name, log, found),
            dirty_text.result_text(device.name, log, found),
        )
        out.settle()
    is_short = bool(taken) and (args.count is not None or args.duration is not None)
    return 128 + taken[0] if is_short else 0


@contextmanager
def _ended_by_signals(cancellation: Cancellation) -> Iterator[list[int]]:
    """Let signals end the work as if it were done. Yields those that came."""
    taken: list[int] = []

    def take(number: int, _: FrameType | None) -> None:
        taken.append(number)
        cancellation.cancel()

    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, take)
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(
    device: Device,
    log: DirtyLog,
    args: argparse.Namespace,
    out: Output,
    cancellation: Cancellation,
) -> Found:
    """Log and report until it is enough, in a thread that no signal interrupts."""
    if args.restart:
        stop_logging(device)
    most = None if args.all else _MOST_RANGES
    with log:
        begun_ns = time.monotonic_ns()
        seen = DirtyPages() if log.pages <= _MOST_DISTINCT_PAGES else None
        totals = Totals()
        for report in _reports(log, args, cancellation, most, seen):
            if report.is_everything and not totals.failed:
                out.note(f"all memory counts as dirty: {report.reason}")
            # The last one may be cut short, and its rate means little.
            is_whole = report.interval_ns >= args.interval // 2
            totals = totals.and_one(report, counts_as_peak=is_whole)
            _tell(out, report, totals.reports, time.monotonic_ns() - begun_ns, with_map=args.map)
        took_ns = time.monotonic_ns() - begun_ns
    distinct = seen.count(most) if seen is not None and not totals.failed else None
    return Found(totals, took_ns, distinct)


def _reports(
    log: DirtyLog,
    args: argparse.Namespace,
    cancellation: Cancellation,
    most: int | None,
    seen: DirtyPages | None,
) -> Iterator[DirtyReport]:
    """Yield a report after each interval, and the last one when it is enough."""
    now = due = time.monotonic_ns()
    end = None if args.duration is None else now + args.duration
    left = args.count
    while True:
        due = max(due + args.interval, now)  # a report may have taken longer than that
        is_last = _wait(cancellation, due if end is None else min(due, end))
        yield log.report(most_ranges=most if args.map else 0, seen=seen)
        now, left = time.monotonic_ns(), None if left is None else left - 1
        if is_last or left == 0 or (end is not None and now >= end):
            return


def _wait(cancellation: Cancellation, due_ns: int) -> bool:
    """Wait until then. Returns whether it was cancelled, also while nobody waited."""
    waiter = select.poll()
    waiter.register(cancellation.fileno(), select.POLLIN)
    while not (found := waiter.poll(_milliseconds_to(due_ns))):
        if time.monotonic_ns() >= due_ns:
            break
    return bool(found)


def _milliseconds_to(due_ns: int) -> float:
    return min(max(due_ns - time.monotonic_ns(), 0) / 1e6, _LONGEST_WAIT_MS)


def _tell(out: Output, report: DirtyReport, number: int, at_ns: int, *, with_map: bool) -> None:
    if out.json:
        values = dirty_text.report_values(report, number, at_ns)
        out.record("report", values if with_map else values | {"ranges": None})
    elif not out.quiet:
        if number == 1:
            print(dirty_text.HEAD, file=out.results)
        print(dirty_text.report_text(report, at_ns, with_map=with_map), file=out.results)
        out.results.flush()
