"""Bitmaps of dirty pages, against the same said bit by bit."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiomig import bitmap

# The sizes that bitmap.py looks at things in, and what stands at their edges.
BLOCK_BITS, CHUNK_BITS = 4096 * 8, 65536 * 8
WORDS = st.binary(min_size=8, max_size=8) | st.sampled_from([bytes(8), b"\xff" * 8])
BITMAPS = st.lists(WORDS, max_size=8).map(lambda words: bytearray(b"".join(words)))


def bits(data: bytearray) -> list[int]:
    return [data[bit // 8] >> bit % 8 & 1 for bit in range(len(data) * 8)]


def slow_runs(data: bytearray) -> Iterator[tuple[int, int]]:
    text = "".join(map(str, bits(data)))
    at = 0
    while (first := text.find("1", at)) >= 0:
        at = text.find("0", first) if "0" in text[first:] else len(text)
        yield first, at - first


def with_runs(size: int, *runs: tuple[int, int]) -> bytearray:
    number = sum(((1 << pages) - 1) << first for first, pages in runs)
    return bytearray(number.to_bytes(size, "little"))


@given(BITMAPS)
def test_runs_are_those_of_the_bits(data: bytearray) -> None:
    assert list(bitmap.runs(data)) == list(slow_runs(data))
    assert bitmap.count(data) == (sum(bits(data)), len(list(slow_runs(data))))


@pytest.mark.parametrize("edge", [BLOCK_BITS, CHUNK_BITS])
def test_a_run_over_the_edge_of_a_block_is_one(edge: int) -> None:
    runs = [(3, 1), (edge - 5, 10), (edge + 8, 2 * BLOCK_BITS), (2 * CHUNK_BITS - 1, 1)]
    data = with_runs(CHUNK_BITS // 4, *runs)
    assert list(bitmap.runs(data)) == runs
    assert bitmap.count(data) == (sum(pages for _, pages in runs), len(runs))


@given(BITMAPS, st.data())
def test_merged_bitmaps_have_the_bits_of_both(data: bytearray, draw: st.DataObject) -> None:
    size = len(data)
    other = bytearray(draw.draw(st.binary(min_size=size, max_size=size)))
    expected = bytearray(a | b for a, b in zip(data, other, strict=True))
    bitmap.merge(data, other)
    assert data == expected


@given(BITMAPS, st.data())
def test_bits_behind_the_last_page_are_cut_off(data: bytearray, draw: st.DataObject) -> None:
    pages = draw.draw(st.integers(0, len(data) * 8))
    before, size = bits(data), len(data)
    bitmap.cut(data, pages)
    assert bits(data) == before[:pages] + [0] * (size * 8 - pages)


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (1 << 26, 8 << 20)])
def test_a_bitmap_is_whole_u64s(pages: int, size: int) -> None:
    assert bitmap.size_of(pages) == size
