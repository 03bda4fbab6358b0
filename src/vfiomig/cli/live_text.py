"""The report of a live migration, for people."""

from vfiomig.cli.output import table
from vfiomig.quantities import format_duration, format_rate, format_size
from vfiomig.report import MigrationReport


def migration_text(report: MigrationReport) -> str:
    """Return the lines that send and receive print."""
    sent = report.role == "source"
    names = ", ".join(moved.name for moved in report.devices)
    headline = f"sent {names} to {report.peer}" if sent else f"received {names} from {report.peer}"
    return headline + "\n" + table(_rows(report), indent="  ")


def _rows(report: MigrationReport) -> list[tuple[str, str]]:
    total = sum(moved.device_bytes for moved in report.devices)
    early = sum(moved.pre_copy_bytes for moved in report.devices)
    how = f", {format_size(early)} of it while running" if early else ""
    phases = ", ".join(
        f"{phase.name} {format_duration(phase.duration_ns)}" for phase in report.phases
    )
    rate = f", {format_rate(report.bytes_per_s)} end to end" if report.bytes_per_s else ""
    rows = [
        ("state", f"{format_size(total)} ({total} bytes){how}"),
        *(("digest", f"xxh3:{moved.digest}  {moved.name}") for moved in report.devices),
        ("took", f"{format_duration(report.duration_ns)}: {phases}{rate}"),
        ("downtime", _downtime(report)),
    ]
    zeros = sum(moved.zero_bytes for moved in report.devices)
    if zeros:
        rows.append(("zeros", f"{format_size(zeros)} of the state, not carried along"))
    rows += [("warning", text) for text in report.warnings]
    rows += [("device", f"{moved.name} is {moved.state.name}") for moved in report.devices]
    rows.append(("session", report.session))
    return rows


def _downtime(report: MigrationReport) -> str:
    parts = []
    if report.downtime_ns is not None and report.downtime_error_ns is not None:
        error = format_duration(report.downtime_error_ns)
        parts.append(f"{format_duration(report.downtime_ns)} (within {error})")
    if report.expected_downtime_ns:
        parts.append(f"expected {format_duration(report.expected_downtime_ns)}")
    if report.downtime_limit_ns is not None:
        parts.append(f"allowed {format_duration(report.downtime_limit_ns)}")
    if report.source_downtime_ns is not None:
        parts.append(f"as the source saw it {format_duration(report.source_downtime_ns)}")
    if report.destination_downtime_ns is not None:
        seen = format_duration(report.destination_downtime_ns)
        parts.append(f"as the destination saw it {seen}")
    return ", ".join(parts)
