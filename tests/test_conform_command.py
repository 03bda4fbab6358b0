"""vfiomig conform: what people, programs and build servers read; its exit codes; signals."""

import json
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli_runner import run, run_process, start, state_of
from vfiomig.conform.catalog import all_rules
from vfiomig.conform.junit import junit_xml
from vfiomig.conform.result import Conformance, RuleResult, Verdict

URL = "sim:?size=30001"


def test_the_table_has_no_skips_but_counts_them() -> None:
    found = run("conform", URL)
    rows = [line.split() for line in found.out.splitlines()]
    assert (found.code, found.err) == (0, "")
    assert ["save", "end-stays", "pass", "3", "more", "reads", "gave", "0"] in rows
    assert "skip" not in {row[2] for row in rows if len(row) > 2 and row[0] == "save"}
    assert "skipped: only with --destructive" in found.out
    assert "a simulated device has no ioctls" in found.out


def test_the_times_of_every_state_change_follow() -> None:
    found = run("conform", URL, "--only", "path-to-stop")
    lines = found.out.splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("STATE CHANGE")]
    assert lines[heads[0]].split()[2:] == ["TIMES", "MIN", "MEDIAN", "MAX"]
    assert any(line.startswith("RUNNING -> RUNNING_P2P -> STOP ") for line in lines[heads[0] :])


def test_a_failed_rule_is_explained_and_with_v_every_rule_is() -> None:
    found = run("conform", f"{URL}&fault=read:EIO@10", "--only", "save")
    assert found.code == 6
    assert "fail: read-to-end\n  In STOP_COPY the data_fd is read to an end" in found.out
    assert "source: linux/vfio.h, struct vfio_precopy_info" in found.out
    assert "  did: RUNNING -> STOP_COPY" in found.out
    assert "  then: it was left in STOP_COPY, and was set to RUNNING" in found.out
    told = run("conform", URL, "--only", "end-stays", "-v")
    assert "pass: end-stays\n  Once a read" in told.out
    assert "vfiomig: pass  end-stays" in told.err


def test_quiet_still_answers() -> None:
    assert "end-stays" in run("conform", URL, "-q").out


def test_programs_get_every_rule_and_every_time_in_nanoseconds() -> None:
    found = run("conform", URL, "--destructive", "--json")
    document = found.last
    assert [rule["id"] for rule in document["rules"]] == [rule.id for rule in all_rules()]
    first = document["rules"][0]
    assert set(first) == set(RuleResult._fields)
    assert isinstance(first["duration_ns"], int)
    arcs = document["state_changes"]
    assert all(arc["min_ns"] <= arc["median_ns"] <= arc["max_ns"] for arc in arcs)
    assert {"before": "STOP", "wanted": "RUNNING", "by": "reset"}.items() <= next(
        arc for arc in arcs if arc["by"] == "reset" and arc["before"] == "STOP"
    ).items()
    assert sum(document["totals"].values()) == len(document["rules"])
    assert (document["lost"], document["destructive"]) == ("", True)


def test_the_list_names_every_rule_and_opens_no_device() -> None:
    listed = run("conform", "--list").out.splitlines()
    assert [line.split()[1] for line in listed] == [rule.id for rule in all_rules()]
    assert len(run("conform", "--list", "--only", "reset").out.splitlines()) < len(listed)
    rules = run("conform", "--list", "--json").last["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in all_rules()]
    assert "source: " in run("conform", "--list", "-v").out


def test_the_choice_of_rules_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VFIOMIG_ONLY", "end-stays,read-to-end")
    found = run("conform", URL, "--json").last
    assert [rule["id"] for rule in found["rules"]] == ["read-to-end", "end-stays"]


# Exit codes.


def test_a_lost_device_is_20_and_the_rest_is_told() -> None:
    words = ["conform", f"{URL}&fault=set:EIO@STOP:ERROR&fault=reset:EIO"]
    found = run(*words)
    assert found.code == 20
    assert "fail: path-to-stop" in found.out
    assert "the device was lost" in found.err
    document = run(*words, "--json").documents[0]
    assert (document["type"], document["totals"]["fail"]) == ("result", 1)
    assert "cannot be reset" in document["lost"]


def test_a_device_that_is_not_running_is_5(tmp_path: Path) -> None:
    url = f"sim:{tmp_path}/device?size=1000"
    assert run("state", url, "--set", "STOP").code == 0
    assert run("conform", url).code == 5


# JUnit XML.


def test_build_servers_get_a_suite_with_a_case_for_each_rule(tmp_path: Path) -> None:
    path = tmp_path / "conform.xml"
    path.write_text("of the last time")
    words = ["conform", "sim:?profile=hisi", "--destructive", "--junit", path]
    assert run(*words).code == 6
    suite = ElementTree.parse(path).getroot()[0]
    assert suite.tag == "testsuite"
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [rule.id for rule in all_rules()]
    failed = {case.get("name") for case in cases if case.find("failure") is not None}
    assert failed == {"refused-stays-refused"}
    assert suite.get("tests") == str(len(cases))
    assert suite.get("failures") == "1"
    assert suite.get("skipped") == str(len(suite.findall("testcase/skipped")))
    driver = suite.find("properties/property[@name='driver']")
    assert driver is not None
    assert driver.get("value") == "sim:hisi"
    assert [path.name for path in tmp_path.iterdir()] == ["conform.xml"]


@pytest.mark.parametrize("text", ["<&>\"'", "a\x00b\x1b[31mc\ufffe", "\ud800", "two\nlines"])
def test_whatever_a_device_is_called_the_document_is_xml(text: str) -> None:
    result = RuleResult(
        id="a",
        group="b",
        text=text,
        source=text,
        destructive=True,
        verdict=Verdict.FAIL,
        did=(text,),
        seen=text,
        duration_ns=1,
    )
    found = Conformance(
        device=text,
        driver=text,
        capabilities=(),
        destructive=True,
        results=(result,),
        arcs=(),
        duration_ns=1,
        lost=text,
    )
    suite = ElementTree.fromstring(junit_xml(found))[0]
    message = suite.find("testcase/failure")
    assert message is not None
    assert (message.get("message") or "").isprintable() or "\n" in text


def test_a_file_that_cannot_be_written_is_known_before_the_device_is_stopped(
    tmp_path: Path,
) -> None:
    found = run("conform", URL, "--junit", tmp_path / "none" / "x.xml", "-v")
    assert found.code == 10
    assert "capabilities" not in found.err


def test_after_a_cancel_there_is_no_file(tmp_path: Path) -> None:
    device, file = tmp_path / "device", tmp_path / "x.xml"
    words = ["conform", f"sim:{device}?size=64M&bandwidth=4M", "--junit", str(file), "-v"]
    with start(*words, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"path-to-stop " not in process.stderr.readline():
            pass
        # It reads the state now, and would for long.
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode()
    assert process.returncode == 130
    assert "now: " in told
    assert "is RUNNING" in told
    assert not file.exists()
    assert state_of(f"sim:{device}") == "RUNNING"


def test_a_pipe_that_is_closed_ends_quietly() -> None:
    code, out, err = run_process("conform", "--list", "--json")
    assert (code, err) == (0, b"")
    assert json.loads(out)["type"] == "result"
