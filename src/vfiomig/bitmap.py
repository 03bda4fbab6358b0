"""Bitmaps of dirty pages: bit n % 64 of the u64 n // 64 is page n, little endian. Pure.

Mostly zeros, or mostly ones, and megabytes of them: so nothing here looks at bits one by one.
"""

import re
from collections.abc import Iterator
from functools import cache

# Bits of one u64: a bitmap is whole u64s (include/uapi/linux/vfio.h, DMA_LOGGING_REPORT).
_WORD_BITS = 64
# Ours: numbers of this size stay in the cache.
_CHUNK_BYTES = 64 << 10
# Ours: comparing is 40 times faster than searching, where there is nothing to find.
_BLOCK_BYTES = 4096
_DIRTY = re.compile(rb"[\x01-\xff]\xff*")


def size_of(pages: int) -> int:
    """Return the bytes of a bitmap for so many pages."""
    return -(-pages // _WORD_BITS) * _WORD_BITS // 8


def cut(bitmap: bytearray, pages: int) -> None:
    """Clear what stands behind so many pages: a driver may have put bits there."""
    whole, rest = divmod(pages, 8)
    if rest:
        bitmap[whole] &= (1 << rest) - 1
        whole += 1
    bitmap[whole:] = bytes(len(bitmap) - whole)


def count(bitmap: bytearray) -> tuple[int, int]:
    """Return how many bits are set, and how many runs they form."""
    pages = found = before = 0
    for at in range(0, len(bitmap), _CHUNK_BYTES):
        number = int.from_bytes(bitmap[at : at + _CHUNK_BYTES], "little")
        pages += number.bit_count()
        # A run begins where the bit before is clear.
        found += (number & ~(number << 1 | before)).bit_count()
        before = number >> _CHUNK_BYTES * 8 - 1
    return pages, found


def runs(bitmap: bytearray) -> Iterator[tuple[int, int]]:
    """Yield the first bit and the length of each run of set bits, in order."""
    begin = end = 0
    for first, behind in _pieces(bitmap):
        if first != end:
            if begin < end:
                yield begin, end - begin
            begin = first
        end = behind
    if begin < end:
        yield begin, end - begin


def _pieces(bitmap: bytearray) -> Iterator[tuple[int, int]]:
    """Yield runs, each as its first bit and the one behind it; some of them touch."""
    zeros, by_value = bytes(_BLOCK_BYTES), _runs_of_bytes()
    for block in range(0, len(bitmap), _BLOCK_BYTES):
        if bitmap[block : block + _BLOCK_BYTES] == zeros:
            continue
        for match in _DIRTY.finditer(bitmap, block, block + _BLOCK_BYTES):
            at, behind = match.span()
            for first, last in by_value[bitmap[at]]:
                yield at * 8 + first, at * 8 + last
            if at + 1 < behind:
                yield (at + 1) * 8, behind * 8


def merge(bitmap: bytearray, other: bytearray) -> None:
    """Set in bitmap what is set in other, which has the same size."""
    for at in range(0, len(bitmap), _CHUNK_BYTES):
        piece = bitmap[at : at + _CHUNK_BYTES]
        number = int.from_bytes(piece, "little")
        number |= int.from_bytes(other[at : at + _CHUNK_BYTES], "little")
        bitmap[at : at + len(piece)] = number.to_bytes(len(piece), "little")


@cache
def _runs_of_bytes() -> list[tuple[tuple[int, int], ...]]:
    """Return the runs in every value of a byte, each as its first bit and the one behind it."""
    return [tuple(_runs_of_byte(value)) for value in range(256)]


def _runs_of_byte(value: int) -> Iterator[tuple[int, int]]:
    bits = [0, *(value >> bit & 1 for bit in range(8)), 0]
    edges = [bit for bit in range(9) if bits[bit] != bits[bit + 1]]
    return zip(edges[::2], edges[1::2], strict=True)
