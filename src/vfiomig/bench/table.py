"""The table for people: one line a case, within 100 columns."""

from collections.abc import Sequence

from vfiomig.bench.summary import Row
from vfiomig.quantities import format_size

_HEAD = ("sink", "what", "buffer", "GB/s", "min-max", "send", "recv", "MiB", "speed", "CPU")
_TEXTS = 2  # so many columns are text, and stand at the left
_GAP = "  "


def table_text(rows: Sequence[Row]) -> str:
    """Return the table; a sink's name stands at its first line only."""
    lines: list[tuple[str, ...]] = [_HEAD]
    sink = ""
    for row in rows:
        lines.append(("" if row.case.sink == sink else row.case.sink, *_cells(row)))
        sink = row.case.sink
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    texts = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
    numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
    return _GAP.join(texts[:_TEXTS] + numbers[_TEXTS:]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    rate = row.gb_per_s
    return (
        row.case.label,
        buffer_text(row),
        f"{rate.median:.2f}",
        f"{rate.lowest:.2f}-{rate.highest:.2f}",
        f"{row.sender_cpu_s_per_gb:.3f}",
        _number(row.receiver_cpu_s_per_gb, 3),
        "-" if row.sender_peak_kib is None else str(round(row.sender_peak_kib / 1024)),
        _number(row.ratio, 2),
        _number(row.cpu_ratio, 2),
    )


def buffer_text(row: Row) -> str:
    """Return a buffer's size as it is typed, an automatic one with what it came to: auto=1M."""
    if row.case.buffer_bytes is None:
        return f"auto={short_size(row.buffer_bytes)}" if row.buffer_bytes else "auto"
    return short_size(row.case.buffer_bytes)


def short_size(size_bytes: int) -> str:
    """Return a size as it is typed: 64K, 1M."""
    return format_size(size_bytes).replace("iB", "").replace(" ", "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
