"""What a run of the bench is made of: products of lists, names, argv, and what is refused."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from devices import failure_of
from vfiomig import LocalIOError, MigrationError, ResourceLimitError, UsageError
from vfiomig.bench.baselines import NAMES, Baseline, chosen, find_baselines
from vfiomig.bench.cases import SINKS, Case, Sweep
from vfiomig.bench.check import check
from vfiomig.bench.measure import Usage
from vfiomig.bench.messages import Opened, Received, Sent
from vfiomig.bench.plan import Plan

MIB = 1 << 20
SMALL = Sweep(["null"], [MIB])


def plan_of(sweep: Sweep = SMALL, **changes: object) -> Plan:
    plan = Plan("sim:", None, MIB, sweep, [], None, 1, Path())
    return replace(plan, **changes)  # type: ignore[arg-type]


def test_a_sweep_is_the_product_of_its_lists() -> None:
    sweep = Sweep(
        ["null", "tcp"], [4096, None], [1, 4], ["native", "qemu"], [True], [0, 50], [1, 2]
    )
    cases = list(sweep.cases())
    assert len(cases) == len(set(cases)) == 2**6
    assert {case.program for case in cases} == {"vfiomig"}
    assert Case("vfiomig", "tcp", None, 1, "qemu", zeros=50, devices=2) in cases


def test_native_framing_is_left_out_without_checksum() -> None:
    sweep = Sweep(["null"], [MIB], framings=["native", "qemu"], checksums=[True, False])
    found = [(case.framing, case.checksum) for case in sweep.cases()]
    assert found == [("native", True), ("qemu", True), ("qemu", False)]


def test_a_baseline_runs_once_in_each_setting() -> None:
    sweep = Sweep(["null", "tcp"], [4096, MIB, None], [1, 4], ["native", "qemu"], zeros=[0, 50])
    cases = list(sweep.baseline_cases("dd", hashes=False))
    assert [case.setting for case in cases] == [
        (sink, zeros, 1) for sink in ("null", "tcp") for zeros in (0, 50)
    ]
    assert {(case.buffer_bytes, case.checksum) for case in cases} == {(MIB, False)}
    sweep = replace(sweep, checksums=[True, False])
    checksums = [case.checksum for case in sweep.baseline_cases("plain_ring", hashes=True)]
    assert checksums == [True, False] * 4


@pytest.mark.parametrize(
    ("case", "label"),
    [
        (Case("vfiomig", "null"), "vfiomig"),
        (
            Case("vfiomig", "null", MIB, 1, "qemu", checksum=False, zeros=95, devices=4),
            "vfiomig qemu ring1 nosum zeros95 x4",
        ),
        (Case("plain_ring", "null", framing=""), "plain_ring xxh3"),
        (Case("dd", "tcp", framing="", checksum=False, zeros=5), "dd zeros5"),
    ],
)
def test_a_label_says_what_is_not_the_default(case: Case, label: str) -> None:
    assert case.label == label


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (replace(SMALL, sinks=[]), "--sink is empty"),
        (replace(SMALL, sinks=["floppy"]), "--sink: floppy is not possible: null, file, durable"),
        (replace(SMALL, sinks=["tcp", "tcp"]), "--sink: a value is there twice"),
        (replace(SMALL, buffers=[4095]), "--buffer: 4095 is not possible: auto, or 4K to 128M"),
        (replace(SMALL, buffers=[(128 << 20) + 1]), "--buffer"),
        (replace(SMALL, buffers=[None, None]), "--buffer: a value is there twice"),
        (replace(SMALL, rings=[0]), "--ring: 0 is not possible: 1 to 64"),
        (replace(SMALL, framings=["tar"]), "--framing: tar is not possible: native, qemu"),
        (replace(SMALL, checksums=[False]), "native framing always carries its checksums"),
        (replace(SMALL, zeros=[101]), "--zeros: 101 is not possible"),
        (replace(SMALL, devices=[0]), "--devices: 0 is not possible"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep: Sweep, said: str) -> None:
    refused = failure_of(sweep.check)
    assert isinstance(refused, UsageError)
    assert said in str(refused)


def test_auto_and_the_limits_of_a_buffer_are_fine() -> None:
    replace(SMALL, buffers=[None, 4096, 128 << 20]).check()


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        (plan_of(runs=0), UsageError, "--runs 0"),
        (plan_of(device="sim:?size=1M", size_bytes=MIB), UsageError, "--size is in sim:?size=1M"),
        (
            plan_of(replace(SMALL, zeros=[50]), device="sim:?zeros=1"),
            UsageError,
            "--zeros is in sim:?zeros=1 already",
        ),
        (plan_of(device="sim:?speed=1"), UsageError, "there is no parameter 'speed'"),
        (plan_of(device="sim:file", size_bytes=MIB), UsageError, "--size is for simulated devices"),
        (
            plan_of(replace(SMALL, zeros=[0, 50]), device="fd:9"),
            UsageError,
            "--zeros is for simulated devices",
        ),
        (
            plan_of(replace(SMALL, devices=[1, 2]), device="fd:9"),
            UsageError,
            "--devices is for simulated devices",
        ),
        (plan_of(size_bytes=0), UsageError, "nothing to measure"),
        (plan_of(into="memory"), UsageError, "none of these sinks has a receiver"),
        (
            plan_of(Sweep(["tcp"], [MIB]), into="sim:", baselines=[Baseline("cat", "/bin/cat")]),
            UsageError,
            "only vfiomig can load a device",
        ),
        (
            plan_of(Sweep(["tcp"], [MIB], devices=[2]), into="sim:"),
            UsageError,
            "--devices must be 1",
        ),
        (plan_of(directory=Path("/proc/nothing")), LocalIOError, "--dir: cannot make files"),
        (plan_of(Sweep(["file"], [MIB]), size_bytes=1 << 50), LocalIOError, "has no room for"),
        (plan_of(size_bytes=1 << 50), ResourceLimitError, "of memory"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_starts(
    plan: Plan, kind: type[MigrationError], said: str
) -> None:
    refused = failure_of(plan.check)
    assert type(refused) is kind
    assert said in str(refused)


def test_devices_that_are_made_get_their_size_share_of_zeros_and_contents() -> None:
    assert plan_of().device_name(0, 0) == f"sim:?size={MIB}&seed=1"
    assert plan_of(size_bytes=4096).device_name(50, 2) == "sim:?size=4096&zeros=50&seed=3"
    named = plan_of(device="sim:?bandwidth=1G&size=5000&seed=9")
    assert named.device_name(0, 1) == "sim:?bandwidth=1G&size=5000&seed=9"
    # Some profiles have one size.
    assert plan_of(device="sim:?profile=qat").device_name(0, 0) == "sim:?profile=qat&seed=1"
    assert plan_of(device="sim:file?chunk=1K").device_name(0, 0) == "sim:file?chunk=1K"
    assert plan_of(device="fd:9").device_name(0, 0) == "fd:9"


# What is compared.

USAGE = Usage(0, 1, 0.0, None)
DEVICE = Opened("sim:", 10, "aa")


def sent(length: int | None, digest: str = "") -> Sent:
    return Sent(USAGE, length, 0, digest)


@pytest.mark.parametrize(
    ("device", "sent", "received"),
    [
        (DEVICE, sent(10, "aa"), Received(USAGE, 10, "aa")),
        (DEVICE, sent(10, "aa"), None),
        (DEVICE, sent(None), Received(USAGE, 10)),
        (DEVICE, sent(None), None),
        # A state that is another one at each read.
        (Opened("sim:", 10, ""), sent(11, "bb"), Received(USAGE, 11, "bb")),
        (Opened("sim:", 10, ""), sent(None), Received(USAGE, 12, "cc")),
    ],
)
def test_bytes_that_agree_are_fine(device: Opened, sent: Sent, received: Received | None) -> None:
    check(Case("dd", "tcp"), device, sent, received)


@pytest.mark.parametrize(
    ("device", "sent", "received", "said"),
    [
        (DEVICE, sent(9), None, "sim: has 10 bytes, the sender read 9"),
        (DEVICE, sent(10, "ab"), None, "sim: has xxh3:aa, the sender read xxh3:ab"),
        (DEVICE, sent(None), Received(USAGE, 11), "sim: has 10 bytes, there arrived 11"),
        (DEVICE, sent(None), Received(USAGE, 10, "b"), "sim: has xxh3:aa, there arrived xxh3:b"),
        (DEVICE, sent(10), Received(USAGE, 10, "b"), "sim: has xxh3:aa, there arrived xxh3:b"),
        (
            Opened("sim:", 10, ""),
            sent(11, "bb"),
            Received(USAGE, 11, "cc"),
            "the sender read xxh3:bb, there arrived xxh3:cc",
        ),
    ],
)
def test_a_wrong_answer_is_never_faster(
    device: Opened, sent: Sent, received: Received | None, said: str
) -> None:
    wrong = failure_of(lambda: check(Case("dd", "tcp"), device, sent, received))
    assert (wrong.code, str(wrong)) == (7, f"dd xxh3 into tcp: {said}")


# Baselines.


def script(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_baselines_are_what_is_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "programs").mkdir()
    for name in ("dd", "pv", "programs/qemu_like"):
        script(tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    names = [baseline.name for baseline in find_baselines("auto", None)]
    assert names == ["dd", "pv", "copyfileobj"]
    found = find_baselines("auto", tmp_path / "programs")
    assert found[0] == Baseline("qemu_like", str(tmp_path / "programs" / "qemu_like"))
    assert find_baselines("none", None) == []
    assert [one.name for one in find_baselines("pv,dd", None)] == ["pv", "dd"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("socat", "not on this machine: socat"), ("rsync", "there is no 'rsync'"), ("", "no ''")],
)
def test_a_baseline_that_is_asked_for_has_to_be_there(
    wanted: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = failure_of(lambda: find_baselines(wanted, None))
    assert said in str(refused)


def test_ratios_are_to_the_first_of_those_preferred() -> None:
    found = [Baseline(name, name) for name in ("plain_ring", "cat", "dd")]
    assert chosen(found, None) == "dd"
    assert chosen([*found, Baseline("qemu_like", "")], None) == "qemu_like"
    assert chosen(found, "plain_ring") == "plain_ring"
    assert chosen(found[:1], None) == "plain_ring"
    assert chosen([], None) is None
    assert "--against pv" in str(failure_of(lambda: chosen(found, "pv")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sink", SINKS)
def test_every_baseline_says_how_it_is_called_for_every_sink(name: str, sink: str) -> None:
    baseline, case = Baseline(name, f"/bin/{name}"), Case(name, sink, MIB, checksum=False)
    assert bool(baseline.cannot(case)) == (name == "cp" and sink not in ("file", "durable"))
    words = baseline.send_words(case)
    assert words[0] == f"/bin/{name}"
    if name not in ("cat", "cp"):
        assert any(str(MIB) in word for word in words)


def test_durable_means_direct_and_synced_for_those_that_can() -> None:
    direct = {
        name: Baseline(name, name).send_words(Case(name, "durable", MIB, checksum=True))
        for name in ("dd", "plain_ring", "qemu_like")
    }
    assert "oflag=direct" in direct["dd"]
    assert {"--sync", "--direct", "--checksum"} <= set(direct["plain_ring"])
    assert "--direct" not in direct["qemu_like"]


def test_an_unwritable_directory_is_refused(
    tmp_path: Path, in_child: Callable[[Callable[[], object]], None]
) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)

    def as_nobody() -> None:
        os.chdir("/")
        if os.getuid() == 0:  # root may write everywhere
            os.setgroups([])
            os.setuid(65534)
        assert "--dir" in str(failure_of(plan_of(directory=tmp_path).check))

    in_child(as_nobody)
