"""The state machine against the kernel's own answers (tests/data/fsm.json)."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vfiomig import states
from vfiomig.uapi import Capability, DeviceState

FSM = json.loads((Path(__file__).parent / "data" / "fsm.json").read_text())
TRIPLES = [
    pytest.param(caps, start, target, id=f"{name}:{start}:{target}")
    for name, caps in FSM["caps"].items()
    for start in FSM["states"]
    for target in FSM["states"]
    if start in caps["matrix"]
]


@pytest.mark.parametrize(("caps", "start", "target"), TRIPLES)
def test_path_and_sessions_are_the_kernels(caps: dict[str, Any], start: str, target: str) -> None:
    capabilities = Capability(caps["flags"])
    expected = caps["matrix"][start].get(target)
    steps = states.path(capabilities, DeviceState[start], DeviceState[target])
    if expected is None:
        assert steps is None
        return
    assert steps is not None
    assert [start, *(step.name for step in steps)] == expected
    walked = [DeviceState[start], *steps]
    pairs = list(pairwise(walked))
    gives = [to for at, to in pairs if states.starts_session(at, to)]
    kind = {"save": states.SAVING, "load": {DeviceState.RESUMING}, None: set[DeviceState]()}
    wanted = caps["data_fd"][start][target]
    assert all(to in kind[wanted] for to in gives)
    assert len(gives) == (wanted is not None)
    ends = any(states.ends_session(at, to) for at, to in pairs)
    assert ends == caps["ends_session"][start][target]


@pytest.mark.parametrize("caps", FSM["caps"].values(), ids=list(FSM["caps"]))
def test_arcs_are_those_a_driver_implements(caps: dict[str, Any]) -> None:
    expected = {(arc["from"], arc["to"]) for arc in caps["driver_arcs"]}
    found = {(at.name, to.name) for at, to in states.arcs(Capability(caps["flags"]))}
    assert found == expected


def test_unknown_states_keep_their_number_and_have_a_name() -> None:
    state = DeviceState(42)
    assert (int(state), state.name) == (42, "UNKNOWN_42")
    assert states.path(Capability(7), state, DeviceState.RUNNING) is None
