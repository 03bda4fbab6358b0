"""What is made of the runs: medians, ratios round by round, the table, CSV, JSON."""

import csv
import io
from pathlib import Path

import pytest

from vfiomig.bench.cases import Case, Sweep
from vfiomig.bench.export import csv_text, json_values
from vfiomig.bench.machine import Machine, this_machine
from vfiomig.bench.messages import Opened
from vfiomig.bench.notes import left_out, notes_on
from vfiomig.bench.plan import Plan
from vfiomig.bench.runner import Results, Sample
from vfiomig.bench.summary import Row, Spread, summarize
from vfiomig.bench.table import table_text

GB = 10**9
OWN = Case("vfiomig", "tcp", 1 << 20)
AUTO = Case("vfiomig", "null", None, 1, "qemu", checksum=False, zeros=95, devices=4)
BASE = Case("qemu_like", "tcp", 1 << 20, 1, "", checksum=False)
MACHINE = Machine("A CPU", 2, "6.12", "cubic", 0.5, "3.11.7", "0.1.0")
SWEEP = Sweep(["tcp", "null", "durable"], [1 << 20])


def sample(seconds: float, sender: float = 0.5, receiver: float | None = 0.25) -> Sample:
    return Sample(seconds, GB, GB, sender, receiver, 2048, 1024, 1 << 20)


def results(*, digest: str = "1") -> Results:
    return Results(
        [OWN, AUTO, BASE],
        [Opened("sim:", GB, digest)],
        {
            BASE: [sample(1.0), sample(1.0, 1.0), sample(0.5)],
            OWN: [sample(0.25, 0.25), sample(1.0), sample(0.5)],
            AUTO: [sample(1.0, receiver=None)],
        },
        {Case("cat", "tcp"): "cat: exit code 1", Case("cat", "unix"): "cat: exit code 1"},
        3.5,
    )


def plan() -> Plan:
    return Plan("sim:", None, GB, SWEEP, [], "qemu_like", 3, Path())


def rows() -> dict[Case, Row]:
    return {row.case: row for row in summarize(results(), "qemu_like")}


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([3.0], Spread(3, 3, 3)),
        ([3.0, 1.0, 2.0], Spread(2, 1, 3)),
        ([4.0, 1.0, 2.0, 3.0], Spread(2.5, 1, 4)),
    ],
)
def test_a_spread_is_the_median_and_the_limits(values: list[float], spread: Spread) -> None:
    assert Spread.of(values) == spread


def test_rates_are_of_the_devices_bytes_and_cpu_is_per_gb() -> None:
    row = rows()[OWN]
    assert row.gb_per_s == Spread(2, 1, 4)
    assert (row.sender_cpu_s_per_gb, row.receiver_cpu_s_per_gb) == (0.5, 0.25)
    assert (row.runs, row.sender_peak_kib, row.receiver_peak_kib) == (3, 2048, 1024)


def test_ratios_are_medians_of_what_the_same_round_gave() -> None:
    # 4/1, 1/1, 2/2: not the quotient of the medians, which is 2.
    assert rows()[OWN].ratio == 1
    # (0.75, 1.25, 0.75) through (0.5, 0.75, 0.75).
    assert rows()[OWN].cpu_ratio == pytest.approx(1.5)
    assert (rows()[BASE].ratio, rows()[BASE].cpu_ratio) == (1, 1)


def test_there_is_no_ratio_to_a_baseline_of_another_setting() -> None:
    assert (rows()[AUTO].ratio, rows()[AUTO].cpu_ratio) == (None, None)
    assert {row.ratio for row in summarize(results(), None)} == {None}


def test_cpu_time_below_the_clock_gives_no_ratio() -> None:
    found = Results([OWN, BASE], [], {OWN: [sample(1, 0, None)], BASE: [sample(1)]})
    assert summarize(found, "qemu_like")[0].cpu_ratio is None


def test_the_order_is_that_of_the_sweep_sink_by_sink() -> None:
    assert [row.case for row in summarize(results(), None)] == [OWN, BASE, AUTO]


def test_the_table_fits_and_names_a_sink_once() -> None:
    lines = table_text(summarize(results(), "qemu_like")).splitlines()
    assert lines[0].split()[:5] == ["sink", "what", "buffer", "GB/s", "min-max"]
    assert [line[:4] for line in lines[1:]] == ["tcp ", "    ", "null"]
    assert "2.00  1.00-4.00  0.500  0.250    2   1.00  1.50" in lines[1]
    assert "auto=1M" in lines[3]
    assert lines[3].endswith("      -    2      -     -")
    assert max(map(len, lines)) <= 100


def test_csv_has_a_line_for_each_case_and_nothing_where_nothing_is_known() -> None:
    found = list(csv.DictReader(io.StringIO(csv_text(summarize(results(), "qemu_like")))))
    assert [line["program"] for line in found] == ["vfiomig", "qemu_like", "vfiomig"]
    assert found[0]["gb_per_s_median"] == "2.0"
    assert (found[2]["ratio"], found[2]["requested_buffer_bytes"]) == ("", "")
    assert csv_text([]) == "\n"


def test_json_has_every_run() -> None:
    found = json_values(plan(), MACHINE, results(), summarize(results(), "qemu_like"), ["a note"])
    cases = found["cases"]
    assert isinstance(cases, list)
    assert cases[0]["seconds"] == [0.25, 1.0, 0.5]
    assert found["skipped"] == [
        {"program": "cat", "sink": sink, "reason": "cat: exit code 1"} for sink in ("tcp", "unix")
    ]
    assert found["notes"] == ["a note"]


def test_notes_say_what_the_figures_do_not() -> None:
    text = "\n".join(notes_on(plan(), MACHINE, results(), "qemu_like"))
    for words in ("A CPU", "only 3 runs", "loopback", "a new file each run", "2 cores: "):
        assert words in text
    unstable = "\n".join(notes_on(plan(), MACHINE, results(digest=""), None))
    assert "through" not in unstable.replace("through the page cache", "")
    assert list(left_out(results())) == ["left out: cat (tcp, unix): cat: exit code 1"]


def test_this_machine_says_what_it_is() -> None:
    found = this_machine()
    assert found.cpu
    assert found.cores > 0
    assert found.kernel
