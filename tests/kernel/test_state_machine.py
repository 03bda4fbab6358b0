"""Every pair of states on a live device, against the kernel's own table (tests/data/fsm.json)."""

import fcntl
import json
import os
from typing import NoReturn

import pytest

from kernel.mtty import SOURCE, Mtty, OpenMtty, state_bytes
from kernel.streams import DATA
from vfiomig import Capability, DeviceBusyError, IllegalArcError, StateChange, ioctl
from vfiomig.channel import DataChannel
from vfiomig.fd import OwnedFd
from vfiomig.report import Event
from vfiomig.save import save
from vfiomig.uapi import DeviceState

TABLE = json.loads((DATA / "fsm.json").read_text())["caps"]["STOP_COPY|P2P|PRE_COPY"]
# mtty is never in ERROR.
STATES = [state for state in DeviceState if state is not DeviceState.ERROR]
PAIRS = [(start, target) for start in STATES for target in DeviceState]
LEGAL = [(s, t) for s, t in PAIRS if TABLE["matrix"][s.name][t.name] is not None]
REFUSED = [pair for pair in PAIRS if pair not in LEGAL]
MODES = {"save": os.O_RDONLY, "load": os.O_WRONLY}


def name(state: DeviceState) -> str:
    return state.name


def enter(mtty: OpenMtty, state: DeviceState) -> DataChannel | None:
    """Go to a state; in RESUMING write what lets it be left again."""
    channel = mtty.device.set_state(state)
    if state is DeviceState.RESUMING:
        assert channel is not None
        os.write(channel.fileno(), state_bytes(SOURCE))
    return channel


def test_there_are_56_pairs_of_which_the_kernel_takes_47() -> None:
    assert (len(LEGAL), len(REFUSED)) == (47, 9)


@pytest.mark.parametrize(("start", "target"), LEGAL, ids=name)
def test_a_device_is_walked_arc_by_arc(
    source: Mtty, start: DeviceState, target: DeviceState
) -> None:
    events: list[Event] = []
    with source.opened() as mtty:
        before = enter(mtty, start)
        with mtty.device.observed(events.append):
            channel = mtty.device.set_state(target)
        assert mtty.device.state() is target
        kind = TABLE["data_fd"][start.name][target.name]
        if kind is not None:
            assert channel is not None
            assert channel is not before
            assert fcntl.fcntl(channel.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == MODES[kind]
        elif start is not target and not TABLE["ends_session"][start.name][target.name]:
            assert channel is before  # one session goes on, or there is none
        else:
            assert channel is None
    steps = [event.wanted.name for event in events if isinstance(event, StateChange)]
    assert [start.name, *steps] == TABLE["matrix"][start.name][target.name]


@pytest.mark.parametrize(("start", "target"), LEGAL, ids=name)
def test_the_kernel_goes_there_by_one_request_too(
    source: Mtty, start: DeviceState, target: DeviceState
) -> None:
    with source.opened() as mtty:
        enter(mtty, start)
        data_fd = ioctl.set_device_state(mtty.device_fd, target)
        with OwnedFd(data_fd):
            assert ioctl.get_device_state(mtty.device_fd) is target
            assert (data_fd != -1) == (TABLE["data_fd"][start.name][target.name] is not None)


@pytest.mark.parametrize(("start", "target"), REFUSED, ids=name)
def test_what_the_kernel_would_refuse_is_not_asked(
    source: Mtty, start: DeviceState, target: DeviceState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> NoReturn:
        pytest.fail("the kernel was asked")

    with source.opened() as mtty:
        enter(mtty, start)
        with monkeypatch.context() as patch:
            patch.setattr(ioctl, "set_device_state", asked)
            with pytest.raises(IllegalArcError) as caught:
                mtty.device.set_state(target)
        assert mtty.device.state() is start
    assert (caught.value.wanted, caught.value.actual) == (target, start)
    assert caught.value.code == 3


@pytest.mark.parametrize("state", STATES, ids=name)
def test_mtty_keeps_its_state_after_a_close_and_a_reset_makes_it_run(
    source: Mtty, state: DeviceState
) -> None:
    with source.opened() as mtty:
        enter(mtty, state)
    with source.opened() as mtty:
        assert mtty.device.state() is state
        mtty.device.reset()
        assert mtty.device.state() is DeviceState.RUNNING
        assert mtty.registers.ports() == list(SOURCE)


@pytest.mark.parametrize("state", set(STATES) - {DeviceState.RUNNING}, ids=name)
def test_a_device_that_is_not_running_is_not_saved(source: Mtty, state: DeviceState) -> None:
    with source.opened() as mtty:
        mtty.device.set_state(state)
    with source.opened() as mtty, open(os.devnull, "wb") as sink:
        with pytest.raises(DeviceBusyError, match=f"is in {state.name} ") as caught:
            save(mtty.device, sink)
        assert mtty.device.state() is state
    assert (caught.value.code, caught.value.actual) == (5, state)


def test_its_capabilities_are_those_of_the_table(source: Mtty) -> None:
    with source.opened() as mtty:
        assert mtty.device.capabilities == TABLE["flags"]
        assert mtty.device.capabilities & Capability.PRE_COPY
        assert mtty.device.stop_copy_length() == source.size
