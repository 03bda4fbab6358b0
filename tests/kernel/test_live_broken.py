"""Live migrations of real devices that are interrupted or killed: nothing is lost, ever."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.command import run
from kernel.live import Ends, Held, holding
from kernel.mtty import DESTINATION, SOURCE, Mtty
from vfiomig import DeviceState

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def held(source: Mtty, destination: Mtty, tmp_path: Path) -> Iterator[tuple[Held, Held]]:
    """Both devices, each held by a process of its own."""
    with (
        holding(source, tmp_path / "here.sock") as here,
        holding(destination, tmp_path / "there.sock") as there,
    ):
        yield here, there


def test_the_commands_move_a_held_device_from_one_process_to_another(
    held: tuple[Held, Held], ends: Ends
) -> None:
    here, there = held
    moved = ends.move([here.name], [there.name])
    assert moved.codes == (0, 0), moved.sent.text
    assert here.state() == "STOP"
    assert there.is_running(SOURCE)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_sender_in_pre_copy_leaves_both_as_they_were(
    source: Mtty, destination: Mtty, ends: Ends, number: signal.Signals
) -> None:
    with ends.staying(source.uuid, destination.uuid) as (sender, receiver):
        sender.signal(number)
        sent, received = sender.finish(), receiver.finish()
    assert (sent.code, received.code) == (128 + number, 9), sent.text + received.text
    (error,) = sent.of_type("error")
    assert error["source_state"] == f"{source.uuid} is RUNNING"
    assert error["dest_state"] == f"{destination.uuid} was reset and is RUNNING"
    assert source.is_untouched(SOURCE)
    assert destination.is_untouched(DESTINATION)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_receiver_in_resuming_leaves_both_as_they_were(
    source: Mtty, destination: Mtty, ends: Ends, number: signal.Signals
) -> None:
    with ends.staying(source.uuid, destination.uuid) as (sender, receiver):
        receiver.signal(number)
        sent, received = sender.finish(), receiver.finish()
    assert (sent.code, received.code) == (9, 128 + number), sent.text + received.text
    for end in (sent, received):
        (error,) = end.of_type("error")
        assert error["source_state"] == f"{source.uuid} is RUNNING"
        assert error["dest_state"] == f"{destination.uuid} was reset and is RUNNING"
    assert source.is_untouched(SOURCE)
    assert destination.is_untouched(DESTINATION)


def test_a_sender_that_is_killed_in_pre_copy_is_resolved_and_the_source_runs(
    held: tuple[Held, Held], ends: Ends
) -> None:
    here, there = held
    with ends.staying(here.name, there.name) as (sender, receiver):
        sender.kill()
        assert here.state() == "PRE_COPY"
        received = receiver.finish()
    assert received.code == 9
    assert there.is_running(DESTINATION)
    done = ends.resolve("here")
    assert (done.code, done.of_type("result")[0]["verdict"]) == (0, "back"), done.text
    assert here.is_running(SOURCE)
    assert ends.resolve("there").of_type("result")[0]["verdict"] == "never-ran"


@pytest.mark.parametrize("word", ["ready", "go", "done"])
def test_a_sender_that_is_killed_in_stop_copy_is_resolved_and_one_end_runs(
    held: tuple[Held, Held], ends: Ends, word: str
) -> None:
    here, there = held
    with ends.withheld(word, here.name, there.name) as (sender, receiver, between):
        sender.kill()
        assert here.state() == "STOP_COPY"
        between.cut()
        assert receiver.finish().code == (0 if word == "done" else 9)
    # Without the destination's word it runs here only if GO was not given.
    alone = ends.resolve("here")
    assert alone.code == (0 if word == "ready" else 21), alone.text
    (answer,) = ends.resolve("there").of_type("result")
    assert answer["verdict"] == ("ran" if word == "done" else "never-ran")
    done = ends.resolve("here", "--peer", answer["verdict"])
    assert done.code == 0, done.text
    if word == "done":
        assert here.state() == "STOP"
        assert there.is_running(SOURCE)
    else:
        assert here.is_running(SOURCE)
        assert there.state() == "RUNNING"


@pytest.mark.parametrize("word", ["ready", "go", "done"])
def test_a_receiver_that_is_killed_in_the_hand_over_is_resolved_and_one_end_runs(
    held: tuple[Held, Held], ends: Ends, word: str
) -> None:
    here, there = held
    with ends.withheld(word, here.name, there.name) as (sender, receiver, between):
        receiver.kill()
        assert there.state() == ("RUNNING" if word == "done" else "STOP")
        between.cut()
        assert sender.finish().code == (9 if word == "ready" else 21)
    assert here.state() == ("RUNNING" if word == "ready" else "STOP")
    done = ends.resolve("there")
    (answer,) = done.of_type("result")
    assert answer["verdict"] == ("ran" if word == "done" else "never-ran")
    assert there.state() == "RUNNING"
    done = ends.resolve("here", "--peer", answer["verdict"])
    assert done.code == 0, done.text
    if word == "done":
        assert here.state() == "STOP"
        assert there.is_running(SOURCE)
    else:
        assert here.is_running(SOURCE)


def test_a_receiver_that_is_killed_in_resuming_is_resolved_and_the_source_runs(
    held: tuple[Held, Held], ends: Ends
) -> None:
    here, there = held
    with ends.staying(here.name, there.name) as (sender, receiver):
        receiver.kill()
        sent = sender.finish()
    assert sent.code == 9, sent.text
    assert here.is_running(SOURCE)
    assert there.state() == "RESUMING"
    done = ends.resolve("there")
    assert (done.code, done.of_type("result")[0]["verdict"]) == (0, "never-ran"), done.text
    assert there.is_running(DESTINATION)


def test_what_a_killed_receiver_left_in_resuming_is_taken_only_once_it_is_reset(
    source: Mtty, destination: Mtty, ends: Ends
) -> None:
    with ends.staying(source.uuid, destination.uuid) as (sender, receiver):
        receiver.kill()
        assert sender.finish().code == 9
    assert destination.state() is DeviceState.RESUMING
    refused = run("receive", destination.uuid, ends.socket, "--json")
    (error,) = refused.of_type("error")
    assert (refused.code, error["actual_state"]) == (5, "RESUMING")
    with (
        ends.receiving(destination.uuid, ends.socket, "--force-reset") as (receiver, address),
        ends.sending(source.uuid, address) as sender,
    ):
        assert (sender.finish().code, receiver.finish().code) == (0, 0)
    assert destination.is_untouched(SOURCE)


def test_what_a_killed_sender_left_with_nobody_holding_it_is_resolved_by_its_name(
    source: Mtty, destination: Mtty, ends: Ends
) -> None:
    with ends.staying(source.uuid, destination.uuid) as (sender, receiver):
        sender.kill()
        assert receiver.finish().code == 9
    assert source.state() is DeviceState.PRE_COPY
    done = ends.resolve("here")
    assert (done.code, done.of_type("result")[0]["verdict"]) == (0, "back"), done.text
    assert source.state() is DeviceState.RUNNING
    moved = ends.move([source.uuid], [destination.uuid])
    assert moved.codes == (0, 0), moved.sent.text
    assert destination.is_untouched(SOURCE)
