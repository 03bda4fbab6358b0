"""The check on real kernel drivers: mtty's known deviations, and the test device's of all kinds.

Whatever the test device is told to do wrong must be found by the rule that is named here, and what
it does by default must be found by none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kernel import command
from kernel.migtest import MigTest
from kernel.mtty import SOURCE, Mtty
from vfiomig.backends import open_device
from vfiomig.conform import Conformance, RuleResult, Verdict, conform
from vfiomig.device import Device
from vfiomig.errors import DeviceIOError
from vfiomig.uapi import DeviceState as S

STATE_BYTES = 65536
SMALL = {"state_bytes": STATE_BYTES}
# Whether the reader or the switch comes first is a race; the kernel may have no REPORT.
EITHER_WAY = {"read-across-the-switch"}
NO_REPORT = "EOPNOTSUPP: this kernel reports nothing; all counts as dirty"
# What mtty is like (samples/vfio-mdev/mtty.c); its DMA logging is a stub.
MTTY_FAILS = {"reset-flag", "refused-stays-refused", "log-start-twice"}
MTTY_NOTES = {
    "drained-enomsg",
    "poll",
    "load-corrupted",
    "killed-in-stop-copy",
    "killed-in-resuming",
    "log-empty-range",
}
# What the test device does if nothing is set: as most drivers, and it keeps its state as mtty.
TEST_NOTES = {"poll", "killed-in-stop-copy", "killed-in-resuming"}
DEVIATIONS = {
    "no-fd": "data-fd-given",
    "second-fd": "same-state",
    "precopy-fd": "data-fd-goes-on",
    "illegal-accepted": "refuse-stop-copy-to-pre-copy",
    "error-settable": "refuse-error",
    "restless": "save-twice",
    "forgetful": "load-gives-it-back",
    "eof-again": "end-stays",
    "early-eof": "end-stays",
    "info-anywhere": "info-refused-in-stop-copy",
    "reinit-unasked": "reinit-not-unasked",
    "undead-fd": "data-fd-dead-afterwards",
    "reset-no-run": "reset-runs",
    "reset-keeps-fd": "reset-ends-session",
    "seekable": "no-seek",
    "overwrite": "load-too-long",
    "lost-write": "load-gives-it-back",
    "write-after-error": "refused-stays-refused",
    "sticky-log": "log-report-clears",
    "log-twice": "log-start-twice",
    "log-overlap": "log-exact",
}
# The header does not say that every damage must be found.
ONLY_NOTED = {"overwrite"}
FAULTS = {
    f"enter {S.STOP:d} errno 5": "path-to-stop",
    f"enter {S.STOP:d} error 5": "path-to-stop",
    f"enter {S.RUNNING:d} errno 16": "path-to-running",
    f"enter {S.STOP_COPY:d} errno 5": "path-to-stop-copy",
    f"enter {S.RESUMING:d} errno 12": "path-to-resuming",
    f"enter {S.RUNNING_P2P:d} errno 110": "path-to-running-p2p",
    f"enter {S.PRE_COPY:d} errno 5": "path-to-pre-copy",
    f"enter {S.PRE_COPY_P2P:d} errno 5": "path-to-pre-copy-p2p",
    f"entered {S.STOP_COPY:d} errno 5": "path-to-stop-copy",
    f"entered {S.STOP:d} reset 0": "path-to-stop",
    "arc 1 errno 5": "path-to-stop",
    "read 4096 errno 5": "read-to-end",
    "read 4096 error 5": "read-to-end",
    "read 4096 reset 0": "read-to-end",
    "write 4096 errno 5": "load-own-state",
    "write 4096 error 5": "load-own-state",
    "write 4096 reset 0": "load-own-state",
    "size 0 errno 5": "size-in-each-state",
    "info 0 errno 5": "info-in-pre-copy",
    "reset 0 errno 5": "reset-runs",
    "log_start 0 errno 5": "log-start-stop",
    "log_stop 0 errno 5": "log-start-stop",
    "log_report 0 errno 5": "log-bits-only-set",
}
SHAPES: dict[str, tuple[dict[str, int | str], set[str]]] = {
    "STOP_COPY": ({"capabilities": 1}, set()),
    "P2P": ({"capabilities": 3}, set()),
    "PRE_COPY": ({"capabilities": 5}, set()),
    "nothing": ({"state_bytes": 0}, {"read-to-end", "info-in-pre-copy"}),
    "one byte": ({"state_bytes": 1}, {"load-corrupted"}),
    "odd": ({"state_bytes": 12345, "zero_percent": 50}, set()),
    "short reads and writes": ({"read_most": 777, "write_most": 555}, set()),
    "0 when drained": ({"drained": "0"}, {"drained-enomsg"}),
    "a wrong size": ({"reported_bytes": 5}, {"size-against-actual"}),
    "dirty": ({"dirty_bytes_per_s": 1 << 20}, set()),
    "checked in the write": ({"check": "write"}, set()),
}
UNCHECKED = {"load-empty", "load-truncated", "load-corrupted", "load-too-long"}


@contextmanager
def checked(device: MigTest) -> Iterator[Device]:
    """Open a test device by its name, and find it RUNNING in the end."""
    with open_device(device.uuid) as opened:
        yield opened
        assert opened.state() is S.RUNNING


def one(device: Device, rule: str) -> RuleResult:
    (found,) = conform(device, destructive=True, only=[rule]).results
    if found.verdict is Verdict.SKIP and found.seen == NO_REPORT:
        pytest.skip(NO_REPORT)
    return found


def ids(found: Conformance, verdict: Verdict) -> set[str]:
    return {result.id for result in found.results if result.verdict is verdict}


# mtty.


def test_the_known_deviations_of_mtty_are_found(source: Mtty) -> None:
    with open_device(source.uuid) as device:
        found = conform(device, destructive=True)
        assert device.state() is S.RUNNING
    # A kernel with IOMMUFD_DRIVER answers REPORT, which mtty's stub always does with success.
    assert ids(found, Verdict.FAIL) - {"log-report-when-off"} == MTTY_FAILS
    assert ids(found, Verdict.NOTE) - EITHER_WAY == MTTY_NOTES
    assert not [result for result in found.results if result.aftermath]
    assert found.code == 6


def test_a_check_without_leave_keeps_what_mtty_holds(source: Mtty) -> None:
    with source.opened() as mtty:
        found = conform(mtty.device)
        assert mtty.device.state() is S.RUNNING
        assert mtty.registers.ports() == list(SOURCE)
    assert ids(found, Verdict.FAIL) - {"log-report-when-off"} == {"log-start-twice"}


def test_each_state_change_of_mtty_is_timed(source: Mtty) -> None:
    with source.opened() as mtty:
        arcs = {(arc.before, arc.wanted): arc for arc in conform(mtty.device).arcs}
    assert (S.STOP, S.STOP_COPY) in arcs
    assert all(0 < arc.min_ns <= arc.median_ns <= arc.max_ns for arc in arcs.values())


def test_the_command_tells_people_and_build_servers(source: Mtty, tmp_path: Path) -> None:
    file = tmp_path / "conform.xml"
    words = ("conform", source.uuid, "--destructive", "--junit", str(file))
    found = command.run(*words, "--only", "reset,owners")
    assert found.code == 6
    assert "a reset works, and flags 0x2 do not have RESET" in found.text
    failed = ElementTree.parse(file).getroot().findall("testsuite/testcase/failure/..")
    assert [case.get("name") for case in failed] == ["reset-flag"]
    assert source.state() is S.RUNNING


# The test device.


@pytest.mark.usefixtures("driver")
def test_the_test_device_keeps_every_rule() -> None:
    with MigTest.created(**SMALL) as device, checked(device) as opened:
        found = conform(opened, destructive=True)
    assert ids(found, Verdict.FAIL) == set(), told(found)
    assert ids(found, Verdict.NOTE) - EITHER_WAY == TEST_NOTES, told(found)
    assert not [result for result in found.results if result.aftermath]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_so_whatever_its_shape(shape: str) -> None:
    settings, notes = SHAPES[shape]
    with MigTest.created(**SMALL | settings) as device, checked(device) as opened:
        groups = ["paths", "save", "pre-copy", "data-fd", "load", "reset"]
        found = conform(opened, destructive=True, only=groups)
    assert ids(found, Verdict.FAIL) == set(), told(found)
    assert ids(found, Verdict.NOTE) - EITHER_WAY == notes | {"poll"}, told(found)


@pytest.mark.usefixtures("driver")
def test_a_device_that_looks_at_nothing_it_loads_is_told() -> None:
    with MigTest.created(**SMALL, check="none") as device, checked(device) as opened:
        found = conform(opened, destructive=True, only=["load"])
    assert ids(found, Verdict.FAIL) == set(), told(found)
    assert ids(found, Verdict.NOTE) >= {"load-corrupted"}
    assert ids(found, Verdict.NOTE) <= UNCHECKED


@pytest.mark.usefixtures("driver")
def test_settings_that_are_no_deviations_are_told() -> None:
    settings = SMALL | {"keeps_state": 0, "poll": 1, "reset_flag": 0}
    with MigTest.created(**settings) as device, checked(device) as opened:
        found = conform(opened, destructive=True, only=["owners", "poll", "reset-flag"])
    assert ids(found, Verdict.NOTE) == set(), told(found)
    assert ids(found, Verdict.FAIL) == {"reset-flag"}, told(found)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_a_deviation_is_found_by_the_rule_that_it_breaks(deviation: str) -> None:
    rule = DEVIATIONS[deviation]
    settings: dict[str, int | str] = dict(SMALL)
    if deviation == "write-after-error":
        settings["check"] = "write"
    with MigTest.created(**settings) as device:
        with open_device(device.uuid) as opened:
            device.set("deviation", deviation)
            found = one(opened, rule)
        wanted = Verdict.NOTE if deviation in ONLY_NOTED else Verdict.FAIL
        assert found.verdict is wanted, found
        device.recovered()
        with checked(device) as opened:
            assert one(opened, rule).verdict in (Verdict.PASS, Verdict.SKIP)


def test_every_deviation_has_its_rule(driver: None) -> None:
    with MigTest.created() as device:
        device.set("deviation", " ".join(DEVIATIONS))
        assert set(device.get("deviation").split()) == set(DEVIATIONS)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_rule_that_names_it(fault: str) -> None:
    with MigTest.created(**SMALL) as device:
        with open_device(device.uuid) as opened:
            device.set("fault", fault)
            found = one(opened, FAULTS[fault])
            assert opened.state() is S.RUNNING
        assert found.verdict is Verdict.FAIL, found
        device.recovered()


@pytest.mark.usefixtures("driver")
def test_a_device_that_does_not_tell_its_state_is_not_checked() -> None:
    with MigTest.created(**SMALL) as device, open_device(device.uuid) as opened:
        device.set("fault", "get 0 errno 5")
        with pytest.raises(DeviceIOError, match="cannot read its state"):
            conform(opened)
        device.set("fault", "clear")


@pytest.mark.usefixtures("driver")
def test_a_device_that_cannot_be_reset_out_of_error_is_lost() -> None:
    with MigTest.created(**SMALL, fault=["reset 0 errno 5"]) as device:
        with open_device(device.uuid) as opened:
            device.set("fault", f"enter {S.STOP:d} error 5")
            found = conform(opened, only=["paths", "save"])
            assert opened.state() is S.ERROR
        assert (found.code, ids(found, Verdict.FAIL)) == (20, {"path-to-stop"})
        device.recovered()


@pytest.mark.usefixtures("driver")
def test_a_hang_is_no_failure_but_takes_its_time() -> None:
    with MigTest.created(**SMALL, fault=["read 0 hang 30"]) as device, checked(device) as opened:
        found = one(opened, "read-to-end")
    assert found.verdict is Verdict.PASS
    assert found.duration_ns > 30_000_000


def told(found: Conformance) -> str:
    news = (Verdict.FAIL, Verdict.NOTE)
    lines = [f"{x.verdict} {x.id}: {x.seen}" for x in found.results if x.verdict in news]
    return "\n".join(lines)
