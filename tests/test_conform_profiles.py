"""Every simulated driver keeps the rules, but for what is known of the real one."""

import pytest

from devices import URLS, Simulated, no_leak
from vfiomig.conform import conform
from vfiomig.conform.result import Verdict
from vfiomig.simulator.profiles import PROFILES
from vfiomig.uapi import DeviceState

# Drivers that check nothing: whatever is written is the state.
TAKES_ALL = {"load-empty", "load-truncated", "load-corrupted", "load-too-long"}
# Where DMA logging is: the kernel lets a range of 0 bytes through.
LOGS = {"log-empty-range"}
# A fixed form, whose header is checked in write(); the bytes that were refused count all the same.
HEADER = {"drained-enomsg", "load-corrupted"}
NOTES = {
    "generic": TAKES_ALL | LOGS,
    "mlx5": TAKES_ALL | LOGS,
    "virtio": TAKES_ALL,
    "hisi": HEADER,
    "qat": HEADER,
    "pds": LOGS | TAKES_ALL - {"load-too-long"},  # its buffer has an end
    "xe": {"load-corrupted", "load-too-long", "session-begins-again"},
    "mtty": HEADER | LOGS,
}
# Its DMA logging is a stub that is never on and never has anything to report.
STUB = {"log-start-twice", "log-report-when-off", "log-exact", "log-report-clears"}
FAILS = {
    "hisi": {"refused-stays-refused"},
    "qat": {"refused-stays-refused"},
    # It stops the VF at a request that is refused.
    "xe": {"refuse-error", "refuse-unknown-state", "refuse-unsupported-state"},
    "mtty": {"refused-stays-refused"} | STUB,
}
DEVICES = URLS | {
    "generic-chunks": "sim:?size=30001&chunk=1000",
    "generic-0-bytes": "sim:?size=0",
    "pds-short": "sim:?profile=pds&size=3000",
}


def test_every_profile_is_here() -> None:
    shown = {name.split("-")[0] for name in DEVICES}
    assert {name.split("-")[0] for name in PROFILES} == shown
    assert set(FAILS) <= set(NOTES) == shown


@pytest.mark.parametrize("name", DEVICES)
def test_a_simulated_driver_deviates_as_the_real_one_does(name: str) -> None:
    kind = name.split("-")[0]
    with no_leak(), Simulated(DEVICES[name]) as device:
        found = conform(device, destructive=True)
        assert device.state() is DeviceState.RUNNING
    by_verdict = {
        verdict: {result.id for result in found.results if result.verdict is verdict}
        for verdict in Verdict
    }
    expected = NOTES[kind] | ({"size-against-actual"} if name == "pds-short" else set())
    if name == "generic-0-bytes":
        expected = {"load-too-long", "read-to-end"} | LOGS
    assert by_verdict[Verdict.FAIL] == FAILS.get(kind, set())
    assert by_verdict[Verdict.NOTE] == expected
    assert found.code == (6 if kind in FAILS else 0)
    assert not [result for result in found.results if result.aftermath]
    assert not found.lost


@pytest.mark.parametrize("name", DEVICES)
def test_without_leave_no_state_is_lost(name: str) -> None:
    with Simulated(DEVICES[name]) as device:
        before, history = device.content(), len(device.history)
        found = conform(device)
        assert device.content() == before
        states = [state for _, state in device.history[history:]]
    assert DeviceState.RESUMING not in states
    assert DeviceState.ERROR not in states
    assert all(result.verdict is Verdict.SKIP for result in found.results if result.destructive)
    assert not [arc for arc in found.arcs if arc.by == "reset"]
