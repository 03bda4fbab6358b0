"""The figures for programs: CSV, and the values of the JSON document."""

import csv
import io
from collections.abc import Sequence

from vfiomig.bench.machine import Machine
from vfiomig.bench.plan import Plan
from vfiomig.bench.runner import Results
from vfiomig.bench.summary import Row


def csv_text(rows: Sequence[Row]) -> str:
    """Return a line for each case, and a line of names. What is not known is empty."""
    text = io.StringIO()
    dicts = [row.as_dict() for row in rows]
    writer = csv.DictWriter(text, list(dicts[0]) if dicts else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dicts)
    return text.getvalue()


def json_values(
    plan: Plan, machine: Machine, results: Results, rows: Sequence[Row], notes: Sequence[str]
) -> dict[str, object]:
    """Return everything: the machine, what was asked, each case with each run, and the notes."""
    return {
        "machine": machine.as_dict(),
        "device": plan.device,
        "devices": [
            {"name": one.name, "device_bytes": one.device_bytes, "digest": one.digest}
            for one in results.devices
        ],
        "runs": plan.runs,
        "into": plan.into,
        "against": plan.against,
        "baselines": {baseline.name: baseline.path for baseline in plan.baselines},
        "duration_s": round(results.seconds, 3),
        "cases": [
            row.as_dict() | {"seconds": [one.seconds for one in results.samples[row.case]]}
            for row in rows
        ],
        "skipped": [
            {"program": case.program, "sink": case.sink, "reason": reason}
            for case, reason in results.skipped.items()
        ],
        "notes": list(notes),
    }
