"""What the command dirty says: a line for each report, and what they come to."""

from collections.abc import Sequence
from typing import NamedTuple

from vfiomig.cli.output import table
from vfiomig.dirty import DirtyLog
from vfiomig.dirty_report import DirtyReport
from vfiomig.quantities import format_duration, format_rate, format_size

HEAD = f"{'time':>9} {'pages':>12} {'dirty':>11} {'rate':>13}  reading took"
_Ranges = Sequence[tuple[int, int]]


class Totals(NamedTuple):
    """All reports together. pages, interval_ns, peak: of those that are none of everything."""

    reports: int = 0
    failed: int = 0
    reason: str = ""
    pages: int = 0
    size: int = 0
    interval_ns: int = 0
    peak: int = 0

    def and_one(self, report: DirtyReport, *, counts_as_peak: bool) -> "Totals":
        """Return the totals with one more report."""
        if report.is_everything:
            failed, reason = self.failed + 1, self.reason or report.reason
            return self._replace(reports=self.reports + 1, failed=failed, reason=reason)
        return self._replace(
            reports=self.reports + 1,
            pages=self.pages + report.dirty_pages,
            size=self.size + report.dirty_bytes,
            interval_ns=self.interval_ns + report.interval_ns,
            peak=max(self.peak, report.bytes_per_s * counts_as_peak),
        )

    def per_s(self, number: int) -> int | None:
        """Return so much per second, None when there was no report to tell."""
        return number * 10**9 // self.interval_ns if self.interval_ns else None


class Found(NamedTuple):
    """What is left when the log has ended.

    distinct: pages, ranges, and the first of these; None where they were not kept.
    """

    totals: Totals
    took_ns: int
    distinct: tuple[int, int, tuple[tuple[int, int], ...]] | None


def report_values(report: DirtyReport, number: int, at_ns: int) -> dict[str, object]:
    """Return a report as JSON has it. at_ns: since the log was started."""
    return {
        "number": number,
        "at_ns": at_ns,
        "interval_ns": report.interval_ns,
        "took_ns": report.took_ns,
        "page_size": report.page_size,
        "dirty_pages": report.dirty_pages,
        "dirty_bytes": report.dirty_bytes,
        "bytes_per_s": None if report.is_everything else report.bytes_per_s,
        "range_count": report.range_count,
        "ranges": report.ranges,
        "is_everything": report.is_everything,
        "reason": report.reason,
        "errno": report.errno,
    }


def report_text(report: DirtyReport, at_ns: int, *, with_map: bool) -> str:
    """Return the line of a report, and its ranges below it."""
    rate = "everything" if report.is_everything else format_rate(report.bytes_per_s)
    size, took = format_size(report.dirty_bytes), format_duration(report.took_ns)
    line = f"{format_duration(at_ns):>9} {report.dirty_pages:>12} {size:>11} {rate:>13}  {took}"
    if not (with_map and report.ranges):
        return line
    return f"{line}\n{_map(report.ranges, report.range_count, indent=' ' * 10)}"


def result_values(device: str, log: DirtyLog, found: Found) -> dict[str, object]:
    """Return the result as JSON has it."""
    totals, distinct = found.totals, found.distinct or (None, None, None)
    return {
        "device": device,
        "logged": log.ranges,
        "logged_pages": log.pages,
        "page_size": log.page_size,
        "device_page_size": log.device_page_size,
        "took_ns": found.took_ns,
        "reports": totals.reports,
        "failed_reports": totals.failed,
        "is_everything": bool(totals.failed),
        "reason": totals.reason,
        "dirty_pages": totals.pages,
        "dirty_bytes": totals.size,
        "pages_per_s": totals.per_s(totals.pages),
        "bytes_per_s": totals.per_s(totals.size),
        "peak_bytes_per_s": totals.peak or None,
        "distinct_pages": distinct[0],
        "range_count": distinct[1],
        "ranges": distinct[2],
    }


def result_text(device: str, log: DirtyLog, found: Found) -> str:
    """Return the result for people."""
    totals, size = found.totals, format_size(log.pages * log.page_size)
    rows = [
        ("logged", f"{size} in {_ranges(len(log.ranges))}, pages of {format_size(log.page_size)}"),
        ("reports", f"{totals.reports} in {format_duration(found.took_ns)}"),
    ]
    if totals.failed:
        rows.append(("dirty", f"everything: {totals.failed} of the reports failed"))
    if (pages_per_s := totals.per_s(totals.pages)) is not None:
        rates = f"{pages_per_s} pages/s, {format_rate(totals.per_s(totals.size) or 0)}"
        told = f"{totals.pages} pages, {format_size(totals.size)}: {rates}"
        rows.append(("dirtied", told))
        rows += [("at most", format_rate(totals.peak))] * bool(totals.peak)
    lines = [f"{device}\n{table(rows, indent='  ')}"]
    if found.distinct is not None:
        pages, count, ranges = found.distinct
        amount = format_size(pages * log.page_size)
        lines.append(f"  distinct  {pages} pages, {amount}, in {_ranges(count)}")
        lines += [_map(ranges, count, indent="    ")] * bool(ranges)
    return "\n".join(lines)


def _map(ranges: _Ranges, count: int, indent: str) -> str:
    rows = [(f"{iova:#x}:{length:#x}", format_size(length)) for iova, length in ranges]
    more = f"\n{indent}and {count - len(ranges)} more: --all" * (count > len(ranges))
    return table(rows, indent) + more


def _ranges(count: int) -> str:
    return "1 range" if count == 1 else f"{count} ranges"
