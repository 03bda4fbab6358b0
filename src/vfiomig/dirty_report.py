"""What a device has written: pieces of its DMA log as bitmaps, and what they add up to. No I/O."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vfiomig import bitmap


class DirtyPiece(NamedTuple):
    """What was written in a part of a range: bit n is the page at iova + n * page_size."""

    iova: int
    length: int
    page_size: int
    bits: bytearray

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (iova, length) of the dirty pages, in order; none touches the next."""
        for first, pages in bitmap.runs(self.bits):
            yield self.iova + first * self.page_size, pages * self.page_size


@dataclass(frozen=True, slots=True)
class DirtyReport:
    """What was written since the report before, or since START. Addresses and sizes in bytes.

    ranges: (iova, length) of dirty pages, in order; none touches the next. range_count: how many
    there are, of which ranges has the first. interval_ns: from the beginning of the report before.
    is_everything: the device could not say, and all counts as dirty; reason and errno say why.
    """

    page_size: int
    dirty_pages: int
    ranges: tuple[tuple[int, int], ...]
    range_count: int
    took_ns: int
    interval_ns: int
    is_everything: bool = False
    reason: str = ""
    errno: int | None = None

    @property
    def dirty_bytes(self) -> int:
        """The size of all dirty pages."""
        return self.dirty_pages * self.page_size

    @property
    def bytes_per_s(self) -> int:
        """How fast pages became dirty; each counts once, however often it was written."""
        return self.dirty_bytes * 10**9 // max(self.interval_ns, 1)


class Tally:
    """Counts pages and ranges over pieces that come in order; keeps the first most ranges."""

    def __init__(self, most: int | None) -> None:
        self.pages = self.range_count = 0
        self.ranges: list[tuple[int, int]] = []
        self._most = most
        self._dirty_up_to = -1

    def add(self, piece: DirtyPiece) -> None:
        """Count one more piece, of higher addresses than all before."""
        pages, runs = bitmap.count(piece.bits)
        self.pages += pages
        self.range_count += runs
        if not pages:
            return
        goes_on = piece.iova == self._dirty_up_to and bool(piece.bits[0] & 1)
        self.range_count -= goes_on
        self._collect(piece, goes_on=goes_on)
        last = piece.length // piece.page_size - 1
        ends_dirty = piece.bits[last // 8] >> last % 8 & 1
        self._dirty_up_to = piece.iova + piece.length if ends_dirty else -1

    def _collect(self, piece: DirtyPiece, *, goes_on: bool) -> None:
        most = self.range_count if self._most is None else self._most
        # Only the last one that is kept can go on in this piece, also when it is the last of all.
        goes_on = goes_on and bool(self.ranges) and sum(self.ranges[-1]) == piece.iova
        if len(self.ranges) >= most and not goes_on:
            return
        for iova, length in piece.ranges():
            if goes_on:
                self.ranges[-1] = (self.ranges[-1][0], self.ranges[-1][1] + length)
                goes_on = False
            elif len(self.ranges) >= most:
                return
            else:
                self.ranges.append((iova, length))


class DirtyPages:
    """Pages of several reports of one log together. Takes a bit for each page that is logged."""

    def __init__(self) -> None:
        self._pieces: dict[int, DirtyPiece] = {}

    def add(self, piece: DirtyPiece) -> None:
        """Take over a piece of a report; the same piece of another one has the same iova."""
        known = self._pieces.setdefault(piece.iova, piece)
        if known is not piece:
            bitmap.merge(known.bits, piece.bits)

    def count(self, most_ranges: int | None = None) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """Return the number of pages, that of ranges, and the first most_ranges of these."""
        tally = Tally(most_ranges)
        for _, piece in sorted(self._pieces.items()):
            tally.add(piece)
        return tally.pages, tally.range_count, tuple(tally.ranges)
