"""Sizes, rates and durations as people write them, and back.

Sizes: 64K 1M 2G 1T and KiB MiB GiB TiB are 1024-based, KB MB GB TB 1000-based, no unit is bytes.
Rates: a size per second (1G, 1G/s), or bits per second, 1000-based (25Gbit). Durations: 10us 300ms
5s 2m 1h. A decimal fraction is fine where the result is exact enough to be a whole number of bytes
or nanoseconds (it is rounded down). Case does not matter.
"""

import re

from vfiomig.errors import UsageError

# Offsets and lengths of the kernel are loff_t; nothing we count can be larger.
LARGEST = 2**63 - 1
_NUMBER = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?([a-zA-Z/]*)", re.ASCII)
_STEPS = "kmgt"

_SIZE_UNITS = {"": 1, "b": 1}
_BIT_UNITS = {"bit": 1}
for _power, _letter in enumerate(_STEPS, start=1):
    _SIZE_UNITS[_letter] = _SIZE_UNITS[_letter + "ib"] = 1024**_power
    _SIZE_UNITS[_letter + "b"] = 1000**_power
    _BIT_UNITS[_letter + "bit"] = 1000**_power
_DURATION_UNITS = {
    "ns": 1,
    "us": 1000,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 64K, 1.5GiB or 1000KB. Raises UsageError."""
    number, unit = _split(text, "a size, such as 64K, 1M or 2GiB")
    return _scaled(text, number, _SIZE_UNITS.get(unit), "size", "K, M, G, T, KiB … or KB …")


def parse_rate(text: str) -> int:
    """Return the bytes per second of a rate: 1G (bytes), 25Gbit (bits). Raises UsageError."""
    number, unit = _split(text, "a rate, such as 1G or 25Gbit")
    unit = unit.removesuffix("/s")
    if unit in _BIT_UNITS:
        return _scaled(text, number, _BIT_UNITS[unit], "rate", "", divisor=8)
    return _scaled(text, number, _SIZE_UNITS.get(unit), "rate", "K, M, G … or Kbit, Mbit, Gbit …")


def parse_duration(text: str) -> int:
    """Return the nanoseconds of a duration such as 300ms, 5s or 2m. Raises UsageError."""
    number, unit = _split(text, "a duration, such as 300ms, 5s or 2m")
    scale = 1 if not float(number) and not unit else _DURATION_UNITS.get(unit)
    return _scaled(text, number, scale, "duration", "ns, us, ms, s, m or h")


def format_size(size_bytes: int) -> str:
    """Return a size for people: 512 B, 16 MiB, 1.5 GiB. Raises UsageError when it is negative."""
    value, unit = float(_not_negative(size_bytes, "size")), "B"
    for letter in _STEPS.upper():
        # What would be shown as 1024.0 of this unit is 1 of the next.
        if value < 1023.95:
            break
        value, unit = value / 1024, letter + "iB"
    return f"{_short(value)} {unit}"


def format_rate(bytes_per_s: int) -> str:
    """Return a rate for people: 1.5 GiB/s. Raises UsageError when it is negative."""
    return f"{format_size(bytes_per_s)}/s"


def format_duration(duration_ns: int) -> str:
    """Return a duration for people: 850 ns, 1.2 ms, 45 s, 2m 05s. Raises UsageError if negative."""
    value, unit = float(_not_negative(duration_ns, "duration")), "ns"
    for larger in ("us", "ms", "s"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    if unit != "s" or value < 59.95:
        return f"{_short(value)} {unit}"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m {seconds:02}s" if hours else f"{minutes}m {seconds:02}s"


def _split(text: str, what: str) -> tuple[str, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not {what}")
    return match[1], match[2].lower()


def _scaled(
    text: str, number: str, scale: int | None, noun: str, units: str, *, divisor: int = 1
) -> int:
    if scale is None:
        raise UsageError(f"{text!r} is not a {noun}: its unit must be {units}")
    whole, _, decimals = number.partition(".")
    value: int = int(whole + decimals) * scale // (10 ** len(decimals) * divisor)
    if value > LARGEST:
        raise UsageError(f"{text!r} is too large for a {noun}")
    return value


def _not_negative(value: int, noun: str) -> int:
    if value < 0:
        raise UsageError(f"a {noun} cannot be negative: {value}")
    return value


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
