"""The DMA log of a simulated device: which pages of memory it has written, as START to STOP say.

The checks are those of drivers/vfio/vfio_main.c of Linux 6.12, with its errnos; what a driver adds
to them is in its profile (profiles.DmaLogging).
"""

import errno
import math
import mmap
from collections.abc import Sequence
from itertools import pairwise

from vfiomig.simulator.profiles import DmaLogging
from vfiomig.simulator.session import os_error

# LOG_MAX_RANGES and SZ_4K of vfio_main.c.
_MOST_RANGES, _SMALLEST_PAGE = mmap.PAGESIZE // 16, 4096
_ADDRESSES = 2**64
# Ours: what a device writes by itself are bursts of so many pages, each somewhere else.
_BURST_PAGES = 8
_SPREAD = 0x9E3779B1  # a prime near 2**32 by the golden ratio: neighbours end up far apart


class DmaLog:
    """One log; calls by one thread at a time. writes: pages of 4 KiB between two rounds of reports.

    A round begins with the first report, and with each that does not lie behind the one before.
    """

    def __init__(self, driver: DmaLogging | None, writes: int, seed: int) -> None:
        self._driver, self._writes, self._seed = driver, writes, seed
        self._ranges: list[tuple[int, int]] = []
        self._page_size = 0
        self._dirty: list[tuple[int, int]] = []  # from, to: whole pages
        self._written, self._last_iova = 0, _ADDRESSES

    def start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Log writes into ranges from now on; returns the page size chosen. Raises OSError."""
        driver = self._known()
        _check_ranges(page_size, ranges)
        if driver.is_stub:
            return page_size
        if self._ranges:
            raise os_error(errno.EINVAL)
        merged = _merged(ranges, driver.most_ranges)
        if merged[-1][1] - merged[0][0] > driver.longest_span:
            raise os_error(errno.EOPNOTSUPP)
        self._ranges = merged
        self._page_size = min(max(page_size, driver.page_min), driver.page_max)
        return self._page_size

    def stop(self) -> None:
        """Forget everything; nothing where nothing is logged. Raises OSError."""
        self._known()
        self._ranges, self._dirty = [], []
        self._written, self._last_iova = 0, _ADDRESSES

    def report(self, iova: int, length: int, page_size: int, bitmap: bytearray) -> None:
        """Set the bits of pages written in a range, and forget them. Raises OSError."""
        driver = self._known()
        if page_size < _SMALLEST_PAGE or page_size & (page_size - 1):
            raise os_error(errno.EINVAL)
        if not iova + length < _ADDRESSES:
            raise os_error(errno.EOVERFLOW)
        if driver.is_stub:
            return
        inside = [a <= iova and iova + length <= b for a, b in self._ranges]
        if not any(inside) and (driver.in_one_range or not self._ranges):
            raise os_error(errno.EINVAL)
        if iova <= self._last_iova:
            self._write_by_itself()
        self._last_iova = iova
        for first, last in self._taken(iova, iova + length):
            _set_bits(bitmap, (first - iova) // page_size, (last - 1 - iova) // page_size + 1)

    def mark(self, iova: int, length: int) -> None:
        """Write somewhere: it is logged, in whole pages, as far as it is in a range of START."""
        for a, b in self._ranges:
            start, end = max(a, iova), min(b, iova + length)
            if start < end:
                first = start - start % self._page_size
                self._dirty.append((first, end + -end % self._page_size))

    def _known(self) -> DmaLogging:
        if self._driver is None:
            raise os_error(errno.ENOTTY)
        return self._driver

    def _taken(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return what is dirty from start to end, and forget that."""
        taken, kept = [], []
        for a, b in self._dirty:
            if a < min(b, start):
                kept.append((a, min(b, start)))
            if max(a, end) < b:
                kept.append((max(a, end), b))
            if max(a, start) < min(b, end):
                taken.append((max(a, start), min(b, end)))
        self._dirty = kept
        return taken

    def _write_by_itself(self) -> None:
        """Write pages: no page twice before every page of all ranges was written once."""
        total = sum(b - a for a, b in self._ranges) // _SMALLEST_PAGE
        bursts = total // _BURST_PAGES
        factor = _coprime(max(bursts, 1))
        for number in range(self._written, self._written + min(self._writes, total)):
            burst, page = divmod(number % total, _BURST_PAGES)
            if burst < bursts:
                burst = (burst * factor + self._seed) % bursts
            self._mark_page(burst * _BURST_PAGES + page)
        self._written += min(self._writes, total)

    def _mark_page(self, number: int) -> None:
        offset = number * _SMALLEST_PAGE
        for a, b in self._ranges:
            if offset < b - a:
                return self.mark(a + offset, _SMALLEST_PAGE)
            offset -= b - a


def _check_ranges(page_size: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Refuse what vfio_ioctl_device_feature_logging_start() refuses."""
    if not ranges:
        raise os_error(errno.EINVAL)
    if len(ranges) > _MOST_RANGES:
        raise os_error(errno.E2BIG)
    if not page_size:
        raise os_error(errno.EINVAL)
    end = -1
    for iova, length in sorted(ranges):
        if (iova | length) & (page_size - 1):
            raise os_error(errno.EINVAL)
        if iova + length >= _ADDRESSES:  # its end does not fit into 64 bits either
            raise os_error(errno.EOVERFLOW)
        if iova < end:
            raise os_error(errno.EINVAL)
        end = iova + length


def _merged(ranges: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return at most so many ranges, as (from, to): those with the smallest gap become one."""
    found = sorted((iova, iova + length) for iova, length in ranges)
    while len(found) > most:
        gaps = [after[0] - before[1] for before, after in pairwise(found)]
        at = gaps.index(min(gaps))
        found[at : at + 2] = [(found[at][0], found[at + 1][1])]
    return found


def _coprime(number: int) -> int:
    factor = _SPREAD
    while math.gcd(factor, number) > 1:
        factor += 1
    return factor


def _set_bits(bitmap: bytearray, first: int, end: int) -> None:
    """Set the bits from first on, before end; bit n is bit n % 8 of byte n // 8."""
    first_byte, last_byte = first // 8, (end - 1) // 8
    head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - (end - 1) % 8
    if first_byte == last_byte:
        bitmap[first_byte] |= head & tail
        return
    bitmap[first_byte] |= head
    bitmap[last_byte] |= tail
    bitmap[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)
