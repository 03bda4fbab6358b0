"""vfiomig bench end to end: every sink, what is checked, what is left behind."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Run, run, start, state_of, wait_for
from devices import names_in
from vfiomig.bench.cases import SINKS, STREAMING

SMALL = ("--size", "1M", "--runs", "2", "--buffer", "64K,auto")
NO_BASELINES = ("--baselines", "none")
CAT = str(shutil.which("cat"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Put a program before all others, as dd."""

    def put(text: str) -> None:
        place = tmp_path_factory.mktemp("bin") / "dd"
        place.write_text(f"#!/bin/sh\n{text}\n")
        place.chmod(0o755)
        monkeypatch.setenv("PATH", f"{place.parent}:{os.environ['PATH']}")

    return put


def bench(*words: object) -> dict[str, Any]:
    """Run it with --json; return its result."""
    found = run("bench", *words, "--json")
    assert found.code == 0, found.out + found.err
    assert found.last["type"] == "result"
    return found.last


@pytest.mark.parametrize("sink", SINKS)
def test_every_sink_is_measured_and_nothing_stays(sink: str, here: Path) -> None:
    run("info", "sim:a?size=1M&seed=3")
    content = Path("a").read_bytes()
    words = ("--runs", "2", "--buffer", "64K,auto", "--baselines", "dd,cat", "--csv", "out.csv")
    found = bench("sim:a", "--sink", sink, *words)
    assert found["against"] == "dd"
    assert [(case["program"], case["requested_buffer_bytes"]) for case in found["cases"]] == [
        ("vfiomig", 64 << 10),
        ("vfiomig", None),
        ("dd", 1 << 20),
        ("cat", 1 << 20),
    ]
    for case in found["cases"]:
        assert (case["sink"], case["device_bytes"], case["runs"]) == (sink, 1 << 20, 2)
        assert len(case["seconds"]) == 2
        assert case["gb_per_s_lowest"] <= case["gb_per_s_median"] <= case["gb_per_s_highest"]
        assert case["gb_per_s_lowest"] > 0
        assert case["ratio"] > 0
        assert (case["receiver_cpu_s_per_gb"] is not None) == (sink in STREAMING)
        assert case["buffer_bytes"] >= 64 << 10
        if case["program"] == "vfiomig":
            assert case["sender_peak_kib"] > 1000
    lines = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [line["program"] for line in lines] == ["vfiomig", "vfiomig", "dd", "cat"]
    assert float(lines[0]["gb_per_s_median"]) == found["cases"][0]["gb_per_s_median"]
    assert (state_of("sim:a"), Path("a").read_bytes() == content) == ("RUNNING", True)
    assert names_in(here) == ["a", "a.sim", "out.csv"]


def test_all_lists_together() -> None:
    lists = ("--framing", "native,qemu", "--checksum", "on,off", "--ring", "1,4", "--zeros", "0,90")
    words = (
        "--devices",
        "1,2",
        "--sink",
        "pipe",
        "--buffer",
        "64K",
        "--size",
        "256K",
        "--runs",
        "1",
    )
    found = bench(*lists, *words, *NO_BASELINES)
    cases = [
        (case["framing"], case["checksum"], case["ring_slots"], case["zeros"], case["devices"])
        for case in found["cases"]
    ]
    assert len(set(cases)) == len(cases) == 3 * 2 * 2 * 2
    assert {case["device_bytes"] // case["devices"] for case in found["cases"]} == {256 << 10}
    assert len(found["devices"]) == 4
    assert len({device["digest"] for device in found["devices"]}) == 4


@pytest.mark.parametrize("into", ["memory", "sim:"])
def test_receivers_may_keep_what_they_receive(into: str) -> None:
    baselines = ("--baselines", "cat") if into == "memory" else NO_BASELINES
    found = bench(*SMALL, "--sink", "unix", "--into", into, *baselines)
    assert {case["device_bytes"] for case in found["cases"]} == {1 << 20}
    assert any(into in note for note in found["notes"])


def test_a_person_gets_a_table_and_a_line_for_each_round() -> None:
    found = run("bench", *SMALL, "--sink", "null,tcp", *NO_BASELINES)
    assert (found.code, found.err.count("vfiomig: round ")) == (0, 2)
    assert "vfiomig: warm-up" in found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("sim:?size=1048576&seed=1: 1 MiB of state")
    assert lines[2].split()[:4] == ["sink", "what", "buffer", "GB/s"]
    assert max(map(len, lines)) <= 100
    assert run("bench", *SMALL, "--sink", "null", *NO_BASELINES, "--quiet").err == ""


def test_a_slow_device_is_measured_through_its_pipe() -> None:
    found = bench("sim:?bandwidth=20M", *SMALL, "--sink", "null", "--baselines", "cat")
    assert {case["device_bytes"] for case in found["cases"]} == {1 << 20}
    assert all(case["gb_per_s_highest"] < 0.1 for case in found["cases"])


def test_a_device_without_state_has_nothing_to_measure() -> None:
    found = run("bench", "sim:?size=0", "--sink", "null", *NO_BASELINES)
    assert (found.code, "nothing to measure" in found.err) == (2, True)


# What is checked.


@pytest.mark.parametrize("sink", ["file", "durable", "pipe", "unix", "tcp"])
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exec tr '\\000' '\\001'", "dd into {}: sim:?size=1048576&seed=1 has xxh3:"),
        ("exec head -c 1000", "1048576 bytes, {} 1000"),
    ],
    ids=["flipped", "short"],
)
def test_a_tool_that_does_not_copy_what_it_read_ends_the_run(
    tool: Callable[[str], None], program: str, said: str, sink: str, here: Path
) -> None:
    tool(program)
    found = run("bench", *SMALL, "--sink", sink, "--baselines", "dd")
    assert found.code == 7
    who = "the sender read" if sink in ("file", "durable") else "there arrived"
    assert said.format(sink if "into" in said else who) in found.err
    assert names_in(here) == []


def test_a_tool_that_does_not_read_everything_ends_the_run(tool: Callable[[str], None]) -> None:
    tool("exec head -c 1000")
    found = run("bench", *SMALL, "--sink", "null", "--baselines", "dd")
    assert (found.code, "has not read all of the state" in found.err) == (6, True)


@pytest.mark.parametrize("sink", ["null", "file", "tcp"])
def test_a_tool_that_fails_is_left_out_with_its_reason(
    tool: Callable[[str], None], sink: str
) -> None:
    tool("echo it is Monday >&2; exit 1")
    found = bench(*SMALL, "--sink", sink, "--baselines", "dd,cat")
    assert {case["program"] for case in found["cases"]} == {"vfiomig", "cat"}
    assert found["skipped"] == [{"program": "dd", "sink": sink, "reason": "dd: it is Monday"}]
    assert any("it is Monday" in note for note in found["notes"])


def test_a_device_that_fails_ends_the_run_and_runs_again(here: Path) -> None:
    found = run("bench", "sim:a?size=1M&fault=read:EIO@500K", "--sink", "tcp", *NO_BASELINES)
    assert (found.code, state_of("sim:a")) == (6, "RUNNING")
    assert names_in(here) == ["a", "a.sim"]


def test_a_tool_inherits_nothing_but_its_streams(tool: Callable[[str], None]) -> None:
    tool("ls -l /proc/self/fd > fds; exec cat")
    bench(*SMALL, "--sink", "pipe", "--baselines", "dd")
    lines = [line.split() for line in Path("fds").read_text().splitlines() if "->" in line]
    found = {words[8]: words[10] for words in lines}
    assert found.keys() == {"0", "1", "2", "3"}  # 1 is the file, 3 the listing itself
    assert (found["0"], found["2"]) == ("/memfd:vfiomig-sim-new", "/memfd:words")


def test_a_tool_whose_failure_costs_the_state_ends_the_run(tool: Callable[[str], None]) -> None:
    tool("exit 1")
    # xe refuses to leave STOP_COPY before all was read.
    run("info", "sim:a?profile=xe&size=1M&seed=1")
    found = run("bench", "sim:a", "--sink", "null", "--runs", "1", "--baselines", "dd")
    assert found.code == 6
    assert "sim:a was reset and is RUNNING: its state is lost" in found.err
    assert (state_of("sim:a"), any(Path("a").read_bytes())) == ("RUNNING", False)


# What is refused before anything starts.


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--buffer", "1X"), 2, "'1X' is not a size"),
        (("--buffer", "64K,"), 2, "'' is not a size"),
        (("--buffer", "1K"), 2, "--buffer: 1024 is not possible"),
        (("--sink", "tape"), 2, "--sink: tape is not possible"),
        (("--ring", "four"), 2, "--ring: 'four' is not a number"),
        (("--zeros", "-1"), 2, "--zeros: '-1' is not a number"),
        (("--checksum", "maybe"), 2, "'maybe' is neither on nor off"),
        (("--checksum", "off"), 2, "native framing always carries its checksums"),
        (("--runs", "x"), 2, "--runs"),
        (("--baselines", "tar"), 2, "there is no 'tar'"),
        (("--against", "dd", "--baselines", "none"), 2, "--against dd"),
        (("--programs", "nowhere"), 2, "nowhere is no directory"),
        (("--dir", "nowhere"), 10, "--dir: cannot make files in nowhere"),
        (("--csv", "nowhere/out.csv"), 10, "cannot write nowhere/out.csv"),
        (("--plot", "out.jpg"), 2, "its name must end in .png or .svg"),
        (("--plot", "nowhere/out.png"), 10, "cannot write nowhere/out.png"),
        (("sim:?siz=1",), 2, "no parameter 'siz'"),
        (("floppy",), 2, "floppy"),
    ],
)
def test_nonsense_is_refused(words: tuple[str, ...], code: int, said: str, here: Path) -> None:
    found = run("bench", *words)
    assert (found.code, found.out) == (code, "")
    assert said in found.err
    assert names_in(here) == []


def test_without_matplotlib_a_plot_is_refused_at_once() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from vfiomig.cli import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", program, "bench", "--plot", "out.png"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    assert "--plot needs matplotlib" in found.stderr
    assert "pip install 'vfiomig[plot]'" in found.stderr


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_a_plot_is_a_picture(name: str, start: bytes) -> None:
    bench(*SMALL, "--sink", "null,pipe", "--baselines", "cat,dd", "--plot", name)
    assert Path(name).read_bytes().startswith(start)
    if name == "p.svg":
        text = Path(name).read_text()
        for words in ("buffer size", "GB/s", "null, dd", "pipe, cat"):
            assert f"<!-- {words}" in text


# Signals.


def processes_here(here: Path) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{name}/cwd") == str(here) and int(name) != os.getpid():
                found.append(Path(f"/proc/{name}/cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, "it never came"
        os.sched_yield()


@pytest.fixture
def slow(here: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A bench whose transfers take a quarter of a second, at its first round."""
    words = ("bench", "sim:a?size=1M&bandwidth=4M", "--buffer", "64K", "--sink", "file")
    options = ("--baselines", "cat", "--json")
    with start(*words, *options, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            wait_for(process, lambda told: told["type"] == "progress")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("program", ["vfiomig", "cat"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_the_device_running_and_no_file(
    slow: "subprocess.Popen[bytes]", number: signal.Signals, code: int, program: str, here: Path
) -> None:
    if program == "cat":
        wait_until(lambda: any(words.startswith(CAT) for words in processes_here(here)))
    wait_until(lambda: "STOP_COPY" in Path("a.sim").read_text())
    os.killpg(slow.pid, number)  # as a terminal does
    last = wait_for(slow, lambda told: told["type"] == "error")
    assert (slow.wait(60), last["code"]) == (code, code)
    assert (last["aftermath"], last["actual_state"]) == ("sim:a is RUNNING", "RUNNING")
    assert processes_here(here) == []
    assert (names_in(here), state_of("sim:a")) == (["a", "a.sim"], "RUNNING")


def test_a_bench_that_is_killed_leaves_the_device_running(
    slow: "subprocess.Popen[bytes]", here: Path
) -> None:
    wait_until(lambda: "STOP_COPY" in Path("a.sim").read_text())
    slow.kill()
    slow.wait(60)
    wait_until(lambda: not processes_here(here))
    assert state_of("sim:a") == "RUNNING"


def test_the_first_ctrl_c_counts_during_the_start_as_well(here: Path) -> None:
    words = ("bench", "sim:a?size=1M&bandwidth=1M", *NO_BASELINES, "--json")
    with start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: Path("a.sim").exists() and "STOP_COPY" in Path("a.sim").read_text())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert json.loads(out.splitlines()[-1])["message"] == "stopped by SIGINT"
    assert (names_in(here), state_of("sim:a")) == (["a", "a.sim"], "RUNNING")


def test_help_has_examples() -> None:
    found: Run = run("bench", "--help")
    assert found.code == 0
    assert "vfiomig bench --quick" in found.out
