"""Sizes, rates and durations: what is understood, what is refused, and the way back."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiomig.errors import UsageError
from vfiomig.quantities import (
    LARGEST,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("12b", 12),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 1 << 20),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        ("1GiB", 1 << 30),
        ("1000KB", 10**6),
        ("3 MB", 3 * 10**6),
        ("1.5G", 3 << 29),
        ("0.1K", 102),
        (str(LARGEST), LARGEST),
        ("9007199254740993.99999999999999999999", 9007199254740993),
    ],
)
def test_sizes_are_understood(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1G", 1 << 30),
        ("1G/s", 1 << 30),
        ("100MB/s", 10**8),
        ("25Gbit", 25 * 10**9 // 8),
        ("800bit/s", 100),
        ("8.1bit", 1),
        (f"{LARGEST}.9bit/s", LARGEST // 8),
        ("100Mbit", 12_500_000),
    ],
)
def test_rates_are_understood(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("0", 0),
        ("0.0", 0),
        ("7ns", 7),
        ("10us", 10_000),
        ("300ms", 300_000_000),
        ("5s", 5 * 10**9),
        ("1.5s", 15 * 10**8),
        ("2m", 120 * 10**9),
        ("1h", 3600 * 10**9),
    ],
)
def test_durations_are_understood(text: str, duration_ns: int) -> None:
    assert parse_duration(text) == duration_ns


REFUSED = ["", " ", "-1", "+1", "G", "1X", "1e3", "0x10", "1..5", ".5", "1K K", "٣", "1\x00", "nan"]


@pytest.mark.parametrize("text", [*REFUSED, "9223372036854775808", "9999999T", "1bit", "1K/s"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize("text", [*REFUSED, "99999999T", "1K/m", "1G/s/s"])
def test_rates_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)


@pytest.mark.parametrize("text", [*REFUSED, "5", "1K", "9999999999h", "1d"])
def test_durations_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_the_error_says_what_was_wrong() -> None:
    with pytest.raises(UsageError, match="'12Q' is not a size: its unit must be K, M"):
        parse_size("12Q")
    with pytest.raises(UsageError, match="'many' is not a duration, such as 300ms"):
        parse_duration("many")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 20) - 1, "1 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_shown(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
    assert format_rate(size_bytes) == f"{text}/s"


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (0, "0 ns"),
        (850, "850 ns"),
        (1_200_000, "1.2 ms"),
        (999_960, "1 ms"),
        (45 * 10**9, "45 s"),
        (59_960_000_000, "1m 00s"),
        (125 * 10**9, "2m 05s"),
        (3725 * 10**9, "1h 02m 05s"),
    ],
)
def test_durations_are_shown(duration_ns: int, text: str) -> None:
    assert format_duration(duration_ns) == text


def test_negative_quantities_are_not_shown() -> None:
    for show in (format_size, format_rate, format_duration):
        with pytest.raises(UsageError):
            show(-1)


@given(st.integers(0, LARGEST // 2))
def test_a_shown_size_is_close_to_the_size(size_bytes: int) -> None:
    again = parse_size(format_size(size_bytes))
    assert abs(again - size_bytes) <= size_bytes * 0.06


@given(st.text())
def test_any_text_is_a_quantity_or_a_usage_error(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        with contextlib.suppress(UsageError):
            assert 0 <= parse(text) <= LARGEST
