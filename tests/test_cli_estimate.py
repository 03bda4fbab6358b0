"""vfiomig estimate: what a migration would take, from what was measured, and whether it may."""

import json
from pathlib import Path

import pytest

import vfiomig
from cli_runner import run, state_of
from devices import Simulated, names_in
from vfiomig.identity import Identity
from vfiomig.rates import Measured, Rates, Role

MIB, MS = 1 << 20, 1_000_000
GENERIC, XE = Identity("sim:generic"), Identity("sim:xe")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty directory, with the measurements in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VFIOMIG_JOURNAL", str(tmp_path / "journal"))
    return tmp_path


def known(role: Role, identity: Identity, bytes_per_s: int, fixed_ns: int = 0) -> None:
    rates = Rates(Path("journal"))
    for _ in range(2):  # one alone would have a band of its own
        rates.add(role, identity, bytes_per_s=bytes_per_s, fixed_ns=fixed_ns, moved_bytes=MIB)


def test_without_a_measurement_it_is_a_lower_bound_and_says_so(here: Path) -> None:
    found = run("estimate", "sim:a?size=100M", "--bandwidth", "1G")
    assert (found.code, found.err) == (0, "")
    assert "size      100 MiB (104857600 bytes)" in found.out
    assert "at least 97.7 ms without pre-copy (97.7 ms to" in found.out
    assert "but it may take more; never measured: device, loading device, fixed" in found.out
    assert (state_of("sim:a"), names_in(here)) == ("RUNNING", ["a", "a.sim"])


def test_json_has_it_all_as_numbers() -> None:
    known("read", GENERIC, 50 * MIB, 7 * MS)
    found = run("estimate", "sim:?size=100M", "--bandwidth", "1G", "--json")
    assert found.code == 11
    wanted = {
        "device": "sim:?size=100M",
        "capabilities": ["STOP_COPY", "P2P", "PRE_COPY"],
        "pre_copy": True,
        "size_known": True,
        "bandwidth_bytes_per_s": 1 << 30,
        "reading_bytes_per_s": {"median": 50 * MIB, "low": 50 * MIB, "high": 50 * MIB},
        "loading_bytes_per_s": None,
        "total_ns": 2_007 * MS,
        "downtime_ns": 2_007 * MS,
        "low_ns": 2_007 * MS,
        "high_ns": 8_007 * MS,
        "bytes": 100 * MIB,
        "bytes_per_s": 50 * MIB,
        "fixed_ns": 7 * MS,
        "unknown": ["loading device"],
        "downtime_limit_ns": 300 * MS,
        "within_limit": False,
    }
    assert wanted.items() <= found.last.items()


@pytest.mark.parametrize(
    ("limit", "code", "verdict"),
    [
        ("1s", 0, "within the limit of 1 s"),
        ("510ms", 0, "within the limit of 510 ms"),
        ("509ms", 11, "over the limit of 509 ms"),
        ("0", 11, "over the limit of 0 ns"),
    ],
)
def test_all_that_was_measured_decides(limit: str, code: int, verdict: str) -> None:
    known("read", XE, 200 * MIB, 100 * MS)  # with the way back to RUNNING
    known("source", XE, MIB, 4 * MS)  # over whatever link that was
    known("destination", XE, 100 * MIB, 6 * MS)
    words = ["estimate", "sim:?profile=xe&size=50M", "--bandwidth", "1G", "--downtime-limit", limit]
    found = run(*words)
    assert (found.code, found.err) == (code, "")
    assert found.out.endswith(f"verdict   {verdict}\n")
    assert "stopped   about 510 ms without pre-copy (510 ms to 510 ms)" in found.out
    assert "pre-copy  not possible" in found.out


def test_a_session_that_was_measured_counts_where_nothing_else_is_known() -> None:
    known("source", XE, 100 * MIB)
    found = run("estimate", "sim:?profile=xe&size=50M", "--bandwidth", "1G", "--json")
    assert (found.code, found.last["downtime_ns"]) == (11, 500 * MS)


def test_pre_copy_is_a_hope_only_where_there_is_some() -> None:
    for name, hope in (("generic", "; pre-copy may bring it below\n"), ("xe", "300 ms\n")):
        found = run("estimate", f"sim:?size=1M&profile={name}", "--bandwidth", "1M")
        assert found.code == 11
        assert found.out.endswith(hope)


@pytest.mark.parametrize("reported", ["error", "max"])
def test_a_size_that_cannot_be_known_counts_as_100_gib(reported: str) -> None:
    url = f"sim:?profile=xe&reported_size={reported}"
    found = run("estimate", url, "--bandwidth", "100Gbit", "--json")
    assert (found.code, found.last["bytes"]) == (11, 100 << 30)
    assert found.last["size_known"] is False
    for_people = run("estimate", url, "--bandwidth", "100Gbit")
    assert "it does not tell: counted as 100 GiB" in for_people.out


def test_measuring_is_within_a_tenth_of_what_a_save_takes(here: Path) -> None:
    """A hundred milliseconds of a device that reads so slowly that nothing else counts."""
    url = "sim:?profile=xe&size=24M&bandwidth=200M"
    found = run("estimate", url, "--bandwidth", "1T", "--measure", "--json", "-q")
    assert found.code == 0
    with Simulated(url) as device:
        report = vfiomig.save(device, here / "saved")
    assert report.stopped_ns is not None
    assert report.stopped_ns > 80 * MS
    assert found.last["downtime_ns"] == pytest.approx(report.stopped_ns, rel=0.1)
    assert found.last["low_ns"] < report.stopped_ns < found.last["high_ns"]


def test_measuring_says_so_and_leaves_the_device_running(here: Path) -> None:
    found = run("estimate", "sim:a?size=2M", "--bandwidth", "1G", "--measure")
    assert found.code == 0
    assert found.err == "vfiomig: sim:a is stopped while its state is read once\n"
    assert state_of("sim:a") == "RUNNING"
    assert names_in(here) == ["a", "a.sim", "journal"]
    measured = Rates(here / "journal").read("read", GENERIC)
    assert measured is not None
    assert measured.bytes_per_s is not None
    as_json = run("estimate", "sim:a", "--bandwidth", "1G", "--json")
    assert as_json.last["unknown"] == ["loading device"]


def test_a_size_that_was_measured_is_known() -> None:
    url = "sim:?profile=xe&size=3M&reported_size=error"
    found = run("estimate", url, "--bandwidth", "1G", "--measure", "--json")
    assert (found.code, found.last["bytes"], found.last["size_known"]) == (0, 3 * MIB, True)


def test_a_state_too_small_to_tell_a_rate_tells_what_it_takes(here: Path) -> None:
    found = run("estimate", "sim:?profile=mtty", "--bandwidth", "1G", "--measure", "--json")
    assert found.last["fixed_ns"] > 0
    assert found.last["reading_bytes_per_s"] is None
    measured = Rates(here / "journal").read("read", Identity("sim:mtty", "mtty-2"))
    assert measured == Measured(None, measured and measured.fixed_ns)


def test_a_measurement_that_cannot_be_kept_still_counts(here: Path) -> None:
    (here / "file").write_text("")
    words = ["estimate", "sim:?size=2M", "--bandwidth", "1G", "--measure", "--json"]
    found = run(*words, "--journal", here / "file")
    assert found.code == 0
    assert found.last["unknown"] == ["loading device"]


def test_a_device_that_fails_while_it_is_measured_ends_as_a_save_does() -> None:
    url = "sim:a?size=2M&fault=read:EIO@1M"
    found = run("estimate", url, "--bandwidth", "1G", "--measure", "--json")
    assert (found.code, found.last["actual_state"]) == (6, "RUNNING")
    assert not Path("journal").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["sim:"], 2, "required: --bandwidth"),
        (["sim:", "--bandwidth", "0"], 2, "must be more than nothing"),
        (["sim:", "--bandwidth", "fast"], 2, "is not a rate"),
        (["sim:", "--bandwidth", "1G", "--downtime-limit", "soon"], 2, "is not a duration"),
        (["sim:?size=x", "--bandwidth", "1G"], 2, "is not a size"),
        (["fd:999", "--bandwidth", "1G"], 5, "no descriptor 999"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], code: int, text: str) -> None:
    found = run("estimate", *words)
    assert (found.code, found.out) == (code, "")
    assert text in found.err
    assert json.loads(run("estimate", *words, "--json").out)["code"] == code
