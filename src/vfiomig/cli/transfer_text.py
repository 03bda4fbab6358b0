"""The report of a save or a load, for people."""

from vfiomig.cli.output import table
from vfiomig.quantities import format_duration, format_rate, format_size
from vfiomig.report import TransferReport


def transfer_text(headline: str, report: TransferReport) -> str:
    """Return the lines that save and load print."""
    took = format_duration(report.duration_ns)
    phases = ", ".join(
        f"{phase.name} {format_duration(phase.duration_ns)}" for phase in report.phases
    )
    copied_ns = sum(phase.duration_ns for phase in report.phases if phase.device_bytes)
    rate = ""
    if copied_ns:
        rate = f", copied at {format_rate(report.device_bytes * 1_000_000_000 // copied_ns)}"
    unit = "records" if report.framing == "qemu" else "frames"
    rows = [
        ("state", f"{format_size(report.device_bytes)} ({report.device_bytes} bytes)"),
        ("digest", f"xxh3:{report.digest}" if report.digest else "none (--no-digest)"),
        ("stream", f"{report.framing}, {format_size(report.stream_bytes)}, {report.frames} {unit}"),
        ("took", f"{took}: {phases}{rate}"),
    ]
    if report.stopped_ns is not None:
        rows.append(("stopped", f"{format_duration(report.stopped_ns)} from RUNNING to RUNNING"))
    if report.zero_bytes:
        how = "holes in the file" if report.framing == "qemu" else "not carried along"
        rows.append(("zeros", f"{format_size(report.zero_bytes)} of the state, {how}"))
    if report.direct_bytes:
        rows.append(("direct", f"{format_size(report.direct_bytes)} past the page cache"))
    if report.spliced_bytes:
        rows.append(("spliced", format_size(report.spliced_bytes)))
    rows.append(("device", f"{report.device} is {report.state.name}"))
    return headline + "\n" + table(rows, indent="  ")
