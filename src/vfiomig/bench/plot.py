"""A picture: throughput over buffer size, one line for each sink, baselines dashed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.bench.machine import Machine
from vfiomig.bench.summary import Row
from vfiomig.bench.table import short_size
from vfiomig.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_INCHES, _DOTS_PER_INCH = (9, 5.5), 150
_MARKERS = "osD^vP"
# Dashes tell baselines apart, colours sinks.
_DASHES = ((5, 3), (1, 2), (6, 2, 1, 2), (3, 1), (8, 4), (2, 4), (6, 2, 1, 2, 1, 2), (1, 1), (9, 2))


def check_plot(path: Path) -> None:
    """Raise UsageError when there could be no picture in the end."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: its name must end in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as err:
        raise UsageError(
            "--plot needs matplotlib, and it is not installed",
            hint="pip install 'vfiomig[plot]'",
        ) from err


def write_plot(path: Path, rows: Sequence[Row], machine: Machine, drawn: Sequence[str]) -> None:
    """Draw the rows into a file; drawn: the baselines to show. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    _draw(axes, rows, drawn)
    sizes = sorted({row.buffer_bytes for row in rows if row.case.is_own and row.buffer_bytes})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [short_size(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("buffer size (bytes of one read; star: chosen by vfiomig)")
    axes.set_ylabel("GB/s of device state")
    axes.set_title("vfiomig save: throughput over buffer size")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    runs = max((row.runs for row in rows), default=0)
    figure.supxlabel(
        f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel}; medians of {runs} runs,"
        " bands from lowest to highest",
        fontsize="x-small",
    )
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw(axes: "Axes", rows: Sequence[Row], drawn: Sequence[str]) -> None:
    sinks = list(dict.fromkeys(row.case.sink for row in rows))
    for index, sink in enumerate(sinks):
        here = [row for row in rows if row.case.sink == sink]
        variants = list(dict.fromkeys(row.case.label for row in here if row.case.is_own))
        for marker, label in zip(_cycled(_MARKERS, len(variants)), variants, strict=True):
            own = [row for row in here if row.case.label == label]
            words = label.split(maxsplit=1)[1:]
            _draw_line(axes, own, f"C{index}", marker, ", ".join([sink, *words]))
        for row in here:
            if row.case.program in drawn:
                dashes = _DASHES[drawn.index(row.case.program) % len(_DASHES)]
                axes.axhline(
                    row.gb_per_s.median,
                    color=f"C{index}",
                    linestyle=(0, dashes),
                    linewidth=1.2,
                    label=f"{sink}, {row.case.label}",
                )


def _draw_line(axes: "Axes", rows: Sequence[Row], color: str, marker: str, label: str) -> None:
    fixed = sorted(
        (row for row in rows if row.case.buffer_bytes is not None),
        key=lambda row: row.buffer_bytes or 0,
    )
    sizes = [row.buffer_bytes or 0 for row in fixed]
    axes.plot(
        sizes, [row.gb_per_s.median for row in fixed], color=color, marker=marker, label=label
    )
    axes.fill_between(
        sizes,
        [row.gb_per_s.lowest for row in fixed],
        [row.gb_per_s.highest for row in fixed],
        color=color,
        alpha=0.12,
        linewidth=0,
    )
    chosen = [row for row in rows if row.case.buffer_bytes is None and row.buffer_bytes]
    axes.plot(
        [row.buffer_bytes or 0 for row in chosen],
        [row.gb_per_s.median for row in chosen],
        color=color,
        marker="*",
        markersize=14,
        markerfacecolor="white",
        linestyle="none",
    )


def _cycled(marks: str, count: int) -> list[str]:
    return [marks[index % len(marks)] for index in range(count)]
