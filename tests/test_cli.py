"""The command line: every command and every error, for people and as JSON; help."""

import json
import re
import shlex
from pathlib import Path

import pytest

from cli_runner import Run, run, run_process, state_of
from devices import names_in
from vfiomig import cli

EXAMPLE = re.compile(r"^  vfiomig .+$", re.MULTILINE)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty directory, with nothing of ours in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("VFIOMIG_JSON", "VFIOMIG_FRAMING", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def saved(here: Path) -> Path:
    """A file with the state of a device."""
    assert run("save", "sim:source?size=70000&seed=1", "state.vmig").code == 0
    return here / "state.vmig"


# For people, and as JSON.

ANSWERS = {
    "list": (["list"], 0, "DEVICE|no device of this host", "devices"),
    "list --all": (["list", "--all"], 0, "DEVICE|no device of this host", "devices"),
    "info": (["info", "sim:source"], 0, r"capabilities\s+STOP_COPY, P2P, PRE_COPY", "capabilities"),
    "save": (["save", "sim:source", "new.vmig"], 0, "saved sim:source to new.vmig", "digest"),
    "save dry": (["save", "sim:source", "new", "--dry-run"], 0, "would save", "ready"),
    "load": (
        ["load", "state.vmig", "sim:b?size=70000"],
        0,
        "loaded state.vmig into sim:b",
        "state",
    ),
    "load dry": (["load", "state.vmig", "sim:source", "--dry-run"], 0, "would load", "ready"),
    "inspect": (["inspect", "state.vmig"], 0, r"verdict\s+sound to the end", "sound"),
    "verify": (["verify", "state.vmig", "state.vmig"], 0, "state.vmig: sound, xxh3:", "sound"),
    "diff": (["diff", "state.vmig", "state.vmig"], 0, "same state: 70000 bytes", "same_state"),
    "state": (["state", "sim:source"], 0, "^RUNNING$", "state"),
    "state set": (["state", "sim:source", "--set", "stop"], 0, "^STOP$", "state"),
    "reset": (["reset", "sim:source"], 0, "sim:source: RUNNING -> RUNNING by a reset", "before"),
    "send dry": (
        ["send", "sim:source", "tcp::1", "--dry-run"],
        0,
        "would send sim:source",
        "ready",
    ),
    "estimate": (
        ["estimate", "sim:source", "--bandwidth", "1G", "--journal", "j"],
        0,
        r"verdict\s+within the limit",
        "downtime_ns",
    ),
    "estimate over": (
        ["estimate", "sim:?size=1G", "--bandwidth", "1G", "--journal", "j"],
        11,
        r"verdict\s+over the limit",
        "downtime_ns",
    ),
    "check": (["check", "sim:source", "sim:"], 0, "sim: fits sim:source", "fits"),
    "check misfit": (["check", "state.vmig", "sim:?profile=xe"], 12, "does not fit", "fields"),
    "conform": (["conform", "sim:source"], 0, r"end-stays\s+pass  3 more reads gave 0", "totals"),
    "conform fail": (
        ["conform", "sim:?profile=hisi", "--destructive", "--only", "load"],
        6,
        r"^fail: refused-stays-refused$",
        "rules",
    ),
    "conform list": (["conform", "--list"], 0, r"save\s+end-stays", "rules"),
    "dirty": (
        ["dirty", "sim:?dma_writes=9", "--range", "1M:1M", "--interval", "1ms", "--count", "2"],
        0,
        r"dirtied\s+18 pages, 72 KiB",
        "dirty_pages",
    ),
    "resolve": (["resolve", "--journal", "j"], 0, "no session has a journal in j", "sessions"),
}


@pytest.mark.parametrize(("words", "code", "text", "field"), ANSWERS.values(), ids=ANSWERS)
def test_every_command_answers_people_and_programs(
    saved: Path, words: list[str], code: int, text: str, field: str
) -> None:
    for_people = run(*words)
    assert (for_people.code, for_people.err) == (code, "")
    assert re.search(text, for_people.out, re.MULTILINE), for_people.out
    for name in ("new.vmig", "b", "b.sim"):
        (saved.parent / name).unlink(missing_ok=True)
    as_json = run(*words, "--json")
    assert (as_json.code, as_json.err) == (code, "")
    assert field in as_json.last
    assert (as_json.last["type"], as_json.last["command"]) == ("result", words[0])


def test_doctor_answers_people_and_programs() -> None:
    for_people, as_json = run("doctor"), run("doctor", "--json")
    assert for_people.code == as_json.code
    assert for_people.code in (0, 3)
    assert re.search(r"^(ok|warn|fail|skip|info) ", for_people.out, re.MULTILINE | re.IGNORECASE)
    assert as_json.last["findings"]
    assert (for_people.err, as_json.err) == ("", "")


def test_pretty_is_one_indented_document(saved: Path) -> None:
    found = run("inspect", saved, "--pretty")
    assert found.out.startswith("{\n  ")
    assert json.loads(found.out)["device_bytes"] == 70000


def test_inspect_lists_frames_in_both_ways(saved: Path) -> None:
    documents = run("inspect", saved, "--frames", "--json").documents
    frames = [document for document in documents if document["type"] == "frame"]
    assert [frame["kind"] for frame in frames] == ["DATA", "TRAILER"]
    lines = run("inspect", saved, "--frames").out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["DATA", "TRAILER"]


def test_long_commands_tell_each_transition(saved: Path) -> None:
    documents = run("load", saved, "sim:b?size=70000", "--json").documents
    told = [document for document in documents if document["type"] == "transition"]
    assert [document["actual"] for document in told[:3]] == ["RUNNING_P2P", "STOP", "RESUMING"]
    assert all(document["errno"] is None for document in told)
    assert documents[-1]["state_changes"] == [
        {key: value for key, value in document.items() if key not in ("schema", "type", "command")}
        for document in told
    ]


# Errors.

ERRORS = {
    "no command": ([], 2, "usage"),
    "unknown command": (["sav"], 2, "no command 'sav'"),
    "unknown option": (["save", "sim:", "x", "--colour"], 2, "--colour"),
    "abbreviated option": (["save", "sim:", "x", "--framin", "qemu"], 2, "--framin"),
    "missing argument": (["save", "sim:"], 2, "FILE"),
    "too many": (["state", "sim:", "sim:"], 2, "unrecognized arguments: sim:"),
    "framing": (["save", "sim:", "x", "--framing", "tar"], 2, "'tar'"),
    "size": (["save", "sim:", "x", "--buffer", "1X"], 2, "'1X' is not a size"),
    "small buffer": (["save", "sim:", "x", "--buffer", "1K"], 2, "4 KiB to 128 MiB"),
    "duration": (["save", "sim:", "x", "--pre-copy-time", "soon"], 2, "'soon'"),
    "number": (["save", "sim:", "x", "--section-id", "one"], 2, "'one'"),
    "after": (["save", "sim:", "x", "--after", "sleep"], 2, "neither run nor stop"),
    "idstr": (["save", "sim:", "x", "--idstr", "y"], 2, "belong to --framing qemu"),
    "bad idstr": (["save", "sim:", "x", "--framing", "qemu", "--idstr", "\udcff"], 2, "printable"),
    "state": (["state", "sim:", "--set", "ASLEEP"], 2, "no state 'ASLEEP'; there are ERROR"),
    "parameter": (["info", "sim:?colour=red"], 2, "no parameter 'colour'"),
    "profile": (["info", "sim:?profile=acme"], 2, "no profile 'acme'; known are generic"),
    "value": (["info", "sim:?size=many"], 2, "'many' is not a size"),
    "fault": (["info", "sim:?fault=red:EIO"], 2, "there is no 'red'; known are"),
    "field": (["load", "state.vmig", "sim:", "--allow-mismatch", "colour"], 2, "colour; there are"),
    "no such device": (["info", "0000:ff:1f.7"], 5, "0000:ff:1f.7"),
    "not a device": (["state", "fd:0"], 5, "fd:0"),
    "no such fd": (["state", "fd:999"], 5, "no descriptor 999"),
    "no such process": (["state", "pid:4194304/fd:0"], 5, "process 4194304 does not exist"),
    "no lender": (["state", "unix:/none.sock"], 5, "/none.sock"),
    "what is that": (["info", "ttyS0"], 2, "ttyS0"),
    "hold sim": (["hold", "sim:", "--socket", "s"], 2, "cannot be held"),
    "no PRE_COPY": (["save", "sim:?profile=pds", "x", "--pre-copy"], 3, "no PRE_COPY"),
    "no migration": (["info", "sim:?fault=caps:ENOTTY"], 3, "has no migration"),
    "illegal": (["state", "sim:?profile=pds", "--set", "PRE_COPY"], 3, "no way from RUNNING"),
    "missing file": (["load", "none", "sim:"], 10, "cannot open none: No such file"),
    "missing blob": (["save", "sim:", "x", "--config", "none"], 10, "cannot read none"),
    "missing inspect": (["inspect", "none"], 10, "cannot open none"),
    "missing verify": (["verify", "none"], 10, "cannot open none"),
    "send url": (["send", "sim:", "nowhere"], 2, "'nowhere' is no address of a session"),
    "receive url": (["receive", "sim:", "tcp:"], 2, "'tcp:' is no address of a session"),
    "via": (["send", "sim:", "sim:", "--via", "host"], 2, "'host' is not ssh:HOST"),
    "no P2P": (["send", "sim:?profile=hisi", "sim:?profile=hisi", "tcp::1"], 3, "has no P2P"),
    "no bandwidth": (["estimate", "sim:"], 2, "--bandwidth"),
    "check nothing": (["check", "sim:", "none"], 2, "'none' is no name of a device"),
    "no dirty range": (["dirty", "sim:"], 2, "--range"),
    "dirty range": (["dirty", "sim:", "--range", "4096"], 2, "'4096' is not IOVA:LENGTH"),
    "dirty address": (["dirty", "sim:", "--range", "0xg:1"], 2, "'0xg' is not an address"),
    "dirty alignment": (["dirty", "sim:", "--range", "1:4K"], 2, "not aligned to pages of 4096"),
    "dirty page": (["dirty", "sim:", "--range", "0:4K", "--page-size", "2K"], 2, "power of two"),
    "dirty time": (["dirty", "sim:", "--range", "0:4K", "--interval", "0s"], 2, "--interval"),
    "dirty count": (["dirty", "sim:", "--range", "0:4K", "--count", "0"], 2, "'0' is not a number"),
    "no DMA log": (["dirty", "sim:?profile=xe", "--range", "0:4K"], 3, "no DMA logging"),
    "session": (["resolve", "xyz", "--journal", "j"], 2, "'xyz' is no session"),
    "no session": (["resolve", "abcd", "--journal", "j"], 5, "there is no session abcd in j"),
    "conform nothing": (["conform"], 2, "which DEVICE?"),
    "conform rule": (["conform", "sim:", "--only", "luck"], 2, "no rule and no group 'luck'"),
    "conform file": (["conform", "sim:", "--junit", "none/x"], 10, "cannot write none/x"),
    "missing diff": (["diff", "state.vmig", "none"], 10, "cannot open none"),
}


@pytest.mark.parametrize(("words", "code", "text"), ERRORS.values(), ids=ERRORS)
def test_every_error_is_a_sentence_or_a_document(
    saved: Path, words: list[str], code: int, text: str
) -> None:
    before = names_in(saved.parent)
    for_people, as_json = run(*words), run(*words, "--json")
    assert (for_people.code, as_json.code) == (code, code)
    if words:
        assert for_people.err.startswith("vfiomig: ")
        assert text in for_people.err
        assert for_people.out == ""
        assert (as_json.last["type"], as_json.last["code"], as_json.err) == ("error", code, "")
        assert text in as_json.last["message"] + as_json.last["hint"]
        assert as_json.last["recoverable"] is True
    else:
        assert text in for_people.out
    assert names_in(saved.parent) == before


def test_usage_errors_are_json_however_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (["-j"], ["--pretty"], ["-p"], ["-qj"], ["-vp"]):
        found = run("save", *flags)
        assert (found.code, found.err) == (2, ""), flags
        assert json.loads(found.out)["type"] == "error"
    monkeypatch.setenv("VFIOMIG_JSON", "1")
    assert run("save").last["type"] == "error"
    assert run("nothing").last["type"] == "error"


def test_the_codes_of_the_library_are_the_exit_codes(saved: Path) -> None:
    def code(*words: object) -> int:
        found = run(*words, "--json")
        assert found.last["type"] == "error"
        assert found.last["code"] == found.code
        return found.code

    cut = saved.parent / "cut"
    cut.write_bytes(saved.read_bytes()[:-1])
    url = "sim:?size=70000"
    assert code("load", saved, f"{url}&fault=write:EIO@5") == 6
    assert code("load", cut, url) == 7
    assert code("load", saved, f"{url}&profile=mlx5") == 8
    assert code("load", saved, url, "--max-state", "1K") == 7
    assert code("save", f"{url}&fault=read:EIO", "x") == 6
    assert code("save", f"{url}&fault=set-after:EMFILE@STOP_COPY", "x") == 15
    assert code("save", url, "x", "--max-state", "1K") == 15
    assert code("save", f"{url}&fault=set:EIO@STOP:ERROR&fault=reset:EIO", "x") == 20
    assert code("save", url, saved) == 10


# Help.


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    found = run(command, "--help")
    assert (found.code, found.err) == (0, "")
    text = found.out
    assert text.startswith(f"usage: vfiomig {command}")
    assert "--json" in text
    examples = EXAMPLE.findall(text.partition("examples:")[2])
    assert command in [shlex.split(line)[1] for line in examples]


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_help_names_every_command_and_exit_code(word: str) -> None:
    found = run(word)
    assert (found.code, found.err) == (0, "")
    assert all(f"\n  {command} " in found.out for command in cli.COMMANDS)
    for number in (*range(16), 20, 21, 130, 143):
        assert re.search(rf"\b{number}\b", found.out.partition("exit codes")[2])


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"vfiomig \d+\.\S+\n", run("--version").out)


def test_python_m_vfiomig_is_the_command() -> None:
    code, out, err = run_process("--version")
    assert (code, err) == (0, b"")
    assert out.decode() == run("--version").out


def result(found: Run) -> Run:
    assert found.code == 0, found.err
    return found


def test_state_is_what_the_other_commands_leave(saved: Path) -> None:
    assert state_of("sim:source") == "RUNNING"
    result(run("save", "sim:source", "stopped", "--after", "stop"))
    assert state_of("sim:source") == "STOP"
    assert run("save", "sim:source", "again").code == 5
    result(run("save", "sim:source", "again", "--from-stop"))
    assert state_of("sim:source") == "RUNNING"
