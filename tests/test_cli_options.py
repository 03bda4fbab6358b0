"""Options of the command: twins in the environment, sizes, quiet and verbose, dry runs, blobs."""

import re
from pathlib import Path

import pytest

from cli_runner import run, state_of
from devices import names_in
from vfiomig import inspect


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(here: Path) -> Path:
    assert run("save", "sim:source?size=70000&seed=1", "state.vmig").code == 0
    return here / "state.vmig"


# The environment.


def test_an_option_has_a_twin_in_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = {
        "VFIOMIG_FRAMING": "qemu",
        "VFIOMIG_IDSTR": "0000:00:05.0/vfio",
        "VFIOMIG_SECTION_ID": "77",
        "VFIOMIG_NO_DIGEST": "1",
        "VFIOMIG_AFTER": "stop",
        "VFIOMIG_BUFFER": "64K",
        "VFIOMIG_JSON": "1",
        "VFIOMIG_PRE_COPY": "0",
    }
    for name, text in twins.items():
        monkeypatch.setenv(name, text)
    found = run("save", "sim:a?size=300000", "out")
    assert (found.last["state"], found.last["digest"]) == ("STOP", "")
    section = inspect(here / "out")
    assert (section.framing, section.section_id) == ("qemu", 77)
    assert section.idstr == "0000:00:05.0/vfio"


def test_what_is_typed_wins_over_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFIOMIG_FRAMING", "qemu")
    assert run("save", "sim:?size=5000", "out", "--framing", "native").code == 0
    assert inspect(here / "out").framing == "native"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("FRAMING", "tar", "VFIOMIG_FRAMING is 'tar', and must be native or qemu"),
        ("FORCE", "yes", "VFIOMIG_FORCE is 'yes', and must be 0 or 1"),
        ("JSON", "", "VFIOMIG_JSON is '', and must be 0 or 1"),
        ("BUFFER", "1X", "'1X' is not a size"),
        ("AFTER", "sleep", "neither run nor stop"),
        ("SECTION_ID", "one", "'one'"),
        ("PRE_COPY_TIME", "soon", "'soon' is not a duration"),
    ],
)
def test_a_twin_that_makes_no_sense_is_a_usage_error(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, said: str
) -> None:
    monkeypatch.setenv(f"VFIOMIG_{name}", text)
    found = run("save", "sim:", "out")
    assert (found.code, said in found.err, names_in(here)) == (2, True, [])


def test_a_required_option_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "--socket" in run("hold", "sim:").err
    monkeypatch.setenv("VFIOMIG_SOCKET", "lent.sock")
    assert "cannot be held" in run("hold", "sim:").err


# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [("64K", 65536), ("64KiB", 65536), ("64kb", 64000), ("65536", 65536), ("0.0625M", 65536)],
)
def test_sizes_are_read_as_people_write_them(here: Path, text: str, size: int) -> None:
    # The buffer is the length of a QEMU record.
    assert run("save", "sim:?size=1M", "out", "--framing", "qemu", "--buffer", text).code == 0
    lengths: list[int] = []
    inspect("out", on_frame=lambda frame: lengths.append(frame.length_bytes))
    assert max(lengths) == size


def test_pre_copy_limits_are_options() -> None:
    found = run("save", "sim:?size=1M&dirty=10G", "one", "--pre-copy", "--json")
    names = [phase["name"] for phase in found.last["phases"]]
    assert names == ["pre-copy", "stop-copy", "resume", "commit"]
    few = ["--pre-copy-rounds", "3", "--pre-copy-bytes", "100K", "--pre-copy-time", "5s"]
    found = run("save", "sim:?size=1M&dirty=10G", "two", "--pre-copy", *few, "--json")
    assert found.last["phases"][0]["device_bytes"] == 100 << 10


# Quiet, and verbose.


def test_quiet_says_nothing_but_errors(saved: Path) -> None:
    for words in (
        ["save", "sim:source", "new"],
        ["load", "state.vmig", "sim:source"],
        ["reset", "sim:source"],
        ["verify", "state.vmig"],
        ["save", "sim:?size=0", "empty"],  # a warning
    ):
        found = run(*words, "--quiet")
        assert (found.code, found.out, found.err) == (0, "", "")
    found = run("save", "sim:source", "new", "-q")
    assert (found.code, found.out, "new exists" in found.err) == (10, "", True)


def test_quiet_keeps_what_was_asked_for(saved: Path) -> None:
    assert run("state", "sim:source", "-q").out == "RUNNING\n"
    assert "sound" in run("inspect", saved, "-q").out
    assert "same state" in run("diff", saved, saved, "-q").out


def test_verbose_tells_every_state_change(saved: Path) -> None:
    found = run("load", saved, "sim:b?size=70000&fault=write:EIO@5*1", "-v")
    arcs = [re.sub(r" [0-9.]+ (ns|us|ms|s)", "", line) for line in found.err.splitlines()]
    assert arcs[:4] == [
        "vfiomig: sim:b: RUNNING -> RUNNING_P2P",
        "vfiomig: sim:b: RUNNING_P2P -> STOP",
        "vfiomig: sim:b: STOP -> RESUMING",
        "vfiomig: sim:b: RESUMING -> reset",
    ]
    failed = run("save", "sim:?size=5000&fault=set:EIO@STOP*1", "x", "-v")
    assert "-> STOP " in failed.err
    assert "failed: Input/output error" in failed.err


def test_a_warning_is_said_and_is_a_record() -> None:
    assert (
        "vfiomig: the device gave no state at all: 0 bytes\n" in run("save", "sim:?size=0", "a").err
    )
    documents = run("save", "sim:?size=0", "b", "--json").documents
    texts = [document["text"] for document in documents if document["type"] == "warning"]
    assert texts == documents[-1]["warnings"] == ["the device gave no state at all: 0 bytes"]


# Dry runs.


def test_a_dry_run_changes_nothing(saved: Path) -> None:
    assert run("state", "sim:stopped?size=70000", "--set", "stop").code == 0
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    expected = {
        ("save", "sim:source", "new"): 0,
        ("save", "sim:source", "new", "--pre-copy"): 0,
        ("save", "sim:source", "/dev/null"): 0,
        ("save", "sim:source", "state.vmig"): 10,
        ("save", "sim:source", "none/new"): 10,
        ("save", "sim:stopped", "new"): 5,
        ("save", "sim:stopped", "new", "--from-stop"): 0,
        ("save", "sim:?profile=pds", "new", "--pre-copy"): 3,
        ("load", "state.vmig", "sim:source"): 0,
        ("load", "state.vmig", "sim:stopped"): 5,
        ("load", "state.vmig", "sim:stopped", "--force-reset"): 0,
        ("load", "state.vmig", "sim:?profile=mlx5"): 8,
        ("load", "state.vmig", "sim:?profile=mlx5", "--allow-mismatch", "driver"): 0,
        ("load", "state.vmig", "sim:source", "--max-state", "1K"): 7,
        ("load", "source", "sim:source"): 8,
    }
    for words, code in expected.items():
        assert run(*words, "--dry-run").code == code, words
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_dry_run_names_the_damage_once(saved: Path) -> None:
    Path("cut").write_bytes(saved.read_bytes()[:5000])
    found = run("load", "cut", "sim:source", "--dry-run")
    assert found.code == 7
    assert found.err == "vfiomig: cut: the stream ends inside the padding (at byte 5000)\n"


# Blobs.


def test_a_config_blob_travels_from_file_to_file() -> None:
    Path("blob").write_bytes(bytes(range(256)) * 17)
    assert run("save", "sim:?size=5000", "with", "--config", "blob").code == 0
    assert run("save", "sim:?size=5000", "without").code == 0
    found = run("load", "with", "sim:?size=5000")
    assert "carries a config blob of 4352 bytes: not kept" in found.err
    assert run("load", "with", "sim:?size=5000", "--config-out", "got").code == 0
    assert Path("got").read_bytes() == Path("blob").read_bytes()
    found = run("load", "without", "sim:?size=5000", "--config-out", "none")
    assert (found.code, "no config blob" in found.err, Path("none").exists()) == (0, True, False)


def test_a_config_blob_that_has_no_place_stops_the_load_before_it_begins(saved: Path) -> None:
    assert run("load", saved, "sim:b?size=70000", "--config-out", saved).code == 10
    assert Path("b").read_bytes() != Path("source").read_bytes()
    assert state_of("sim:b") == "RUNNING"


def test_a_config_blob_that_is_too_large_is_refused() -> None:
    with Path("huge").open("wb") as file:
        file.truncate(1 << 34)
    assert run("save", "sim:?size=5000", "out", "--config", "huge").code == 2
    assert not Path("out").exists()


# States.


def test_resuming_is_left_by_a_reset_or_by_a_commit_that_is_meant() -> None:
    assert run("state", "sim:a?size=5000", "--set", "RESUMING").code == 0
    found = run("state", "sim:a", "--set", "STOP")
    assert (found.code, "leaving it commits" in found.err) == (3, True)
    assert "vfiomig reset drops it" in found.err
    assert state_of("sim:a") == "RESUMING"
    assert run("load", "x", "sim:a").code in (5, 10)
    assert run("reset", "sim:a").code == 0
    assert run("state", "sim:a", "--set", "resuming").code == 0
    assert run("state", "sim:a", "--set", "stop", "--commit").out == "STOP\n"


def test_force_reset_makes_room_for_a_load(saved: Path) -> None:
    assert run("state", "sim:b?size=70000", "--set", "stop").code == 0
    assert run("load", saved, "sim:b").code == 5
    found = run("load", saved, "sim:b", "--force-reset")
    assert (found.code, "is in STOP: resetting it" in found.err) == (0, True)
    assert Path("b").read_bytes() == Path("source").read_bytes()
