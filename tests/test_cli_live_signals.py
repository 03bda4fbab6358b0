"""SIGINT and SIGTERM at vfiomig send and receive, in every phase: undone, or too late to be."""

import os
import signal
import socket
from pathlib import Path

import pytest

from cli_runner import Run, state_of
from live_commands import (
    HERE,
    THERE,
    Wanted,
    check_moved,
    check_stayed,
    in_state,
    of_type,
    proxy,
    receiving,
    send,
    sending,
)

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
# What makes the moment last (device here, device there, options of send), and what begins it, at
# the end that is told: a document of that end.
Moment = tuple[str, str, tuple[str, ...], Wanted]
SOURCE_MOMENTS: dict[str, Moment] = {
    "the receiver prepares": ("", "fault=hang:400ms@set:RESUMING", (), of_type("connected")),
    "pre-copy": ("bandwidth=1M", "", (), in_state("PRE_COPY")),
    "to P2P": ("fault=hang:400ms@set:PRE_COPY_P2P", "", (), of_type("stopping")),
    "to STOP_COPY": ("fault=hang:400ms@set:STOP_COPY", "", (), in_state("PRE_COPY_P2P")),
    "stop-copy": (
        "bandwidth=1M",
        "",
        ("--pre-copy", "off", "--on-limit", "switch"),
        in_state("STOP_COPY"),
    ),
    "the receiver commits": ("", "fault=hang:300ms@set:STOP", (), in_state("STOP_COPY")),
}
DESTINATION_MOMENTS: dict[str, Moment] = {
    "to RESUMING": ("", "fault=hang:400ms@set:RESUMING", (), in_state("STOP")),
    "loading": ("bandwidth=1M", "", (), in_state("RESUMING")),
    "writing": ("", "fault=hang:400ms@write:100K", (), in_state("RESUMING")),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    return tmp_path


def check_stopped(found: Run, number: signal.Signals, code: int, *, both_told: bool = True) -> None:
    """It ended by the signal, and says that the source runs, and what became of the destination."""
    last = found.last
    assert (found.code, last["code"], last["message"]) == (code, code, f"stopped by {number.name}")
    if both_told:
        assert "sim:here is RUNNING" in last["source_state"], last
        assert "sim:there " in last["dest_state"], last
        assert last["dest_state"].endswith("is RUNNING"), last
        assert last["phase"]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("moment", SOURCE_MOMENTS)
def test_a_sender_that_is_stopped_runs_on_and_the_receiver_is_reset(
    moment: str, number: signal.Signals, code: int
) -> None:
    here_is, there_is, options, begins = SOURCE_MOMENTS[moment]
    with (
        receiving(f"{THERE}&{there_is}") as (receiver, where),
        sending(f"{HERE}&{here_is}", where, *options) as sender,
    ):
        sender.wait_for(begins)
        sender.process.send_signal(number)
        sent, received = sender.ending(), receiver.ending()
    check_stopped(sent, number, code)
    assert (received.code, "cancelled" in received.last["message"]) == (9, True), received.last
    assert received.last["dest_state"] == "sim:there was reset and is RUNNING"
    check_stayed()
    check_second_attempt()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("moment", DESTINATION_MOMENTS)
def test_a_receiver_that_is_stopped_is_reset_and_the_sender_runs_on(
    moment: str, number: signal.Signals, code: int
) -> None:
    here_is, there_is, options, begins = DESTINATION_MOMENTS[moment]
    with (
        receiving(f"{THERE}&{there_is}") as (receiver, where),
        sending(f"{HERE}&{here_is}", where, *options) as sender,
    ):
        receiver.wait_for(begins)
        receiver.process.send_signal(number)
        sent, received = sender.ending(), receiver.ending()
    check_stopped(received, number, code)
    assert (sent.code, "cancelled" in sent.last["message"]) == (9, True), sent.last
    assert sent.last["dest_state"] == "sim:there was reset and is RUNNING"
    check_stayed()
    check_second_attempt()


def check_second_attempt() -> None:
    with receiving("sim:there") as (receiver, where):
        sent, received = send("sim:here", where), receiver.ending()
    assert (sent.code, received.code) == (0, 0), (sent, received)
    check_moved()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_receiver_that_waits_for_a_sender_can_be_stopped(
    number: signal.Signals, code: int
) -> None:
    with receiving() as (receiver, _):
        receiver.process.send_signal(number)
        received = receiver.ending()
    check_stopped(received, number, code, both_told=False)
    assert received.last["dest_state"] == "sim:there is RUNNING"
    assert not Path("there.sock").exists()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_sender_that_nobody_answers_can_be_stopped(number: signal.Signals, code: int) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind("mute.sock")
        mute.listen()
        with sending(HERE, "unix:mute.sock") as sender:
            caller, _ = mute.accept()
            with caller:
                assert len(caller.recv(64)) == 64
                sender.process.send_signal(number)
                sent = sender.ending()
    check_stopped(sent, number, code, both_told=False)
    assert sent.last["source_state"] == "sim:here is RUNNING"
    assert state_of("sim:here") == "RUNNING"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_receiver_that_is_stopped_while_it_commits_is_reset(
    number: signal.Signals, code: int
) -> None:
    with (
        receiving(f"{THERE}&fault=hang:300ms@set:STOP") as (receiver, where),
        sending(HERE, where) as sender,
    ):
        sender.wait_for(in_state("STOP_COPY"))
        receiver.process.send_signal(number)
        sent, received = sender.ending(), receiver.ending()
    check_stopped(received, number, code)
    assert sent.code == 9
    check_stayed()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_receiver_that_is_stopped_while_it_waits_for_go_never_runs(
    number: signal.Signals, code: int
) -> None:
    with (
        receiving() as (receiver, where),
        proxy(b'"go"', listen="proxy.sock", connect=where.removeprefix("unix:")) as between,
        sending(HERE, "unix:proxy.sock") as sender,
    ):
        assert between.held.wait(30)
        receiver.process.send_signal(number)
        sent = sender.ending()
        between.cut()
        received = receiver.ending()
    check_stopped(received, number, code, both_told=False)
    assert received.last["dest_state"] == "sim:there was reset and is RUNNING"
    # GO was recorded here, and the receiver has said that it never ran, and never will.
    assert (sent.code, "cancelled" in sent.last["message"]) == (9, True), sent.last
    check_stayed()


@pytest.mark.parametrize("at", ["sender", "receiver", "both"])
@pytest.mark.parametrize("number", [number for number, _ in SIGNALS])
def test_a_signal_after_go_undoes_nothing(number: signal.Signals, at: str) -> None:
    with (
        receiving(f"{THERE}&fault=hang:300ms@set:RUNNING") as (receiver, where),
        sending(HERE, where) as sender,
    ):
        receiver.wait_for(in_state("RUNNING_P2P", before="STOP"))
        for command in {"sender": [sender], "receiver": [receiver]}.get(at, [sender, receiver]):
            command.process.send_signal(number)
        sent, received = sender.ending(), receiver.ending()
    assert (sent.code, received.code) == (0, 0), (sent, received)
    assert (sent.last["type"], received.last["type"]) == ("result", "result")
    check_moved()


def test_a_second_signal_does_not_tear_the_roll_back() -> None:
    slow = "bandwidth=1M&fault=hang:400ms@set:RUNNING"
    with receiving() as (receiver, where), sending(f"{HERE}&{slow}", where) as sender:
        sender.wait_for(in_state("PRE_COPY"))
        sender.process.send_signal(signal.SIGINT)
        receiver.wait_for(lambda told: told.get("by") == "reset")
        sender.process.send_signal(signal.SIGTERM)
        sent, received = sender.ending(), receiver.ending()
    check_stopped(sent, signal.SIGINT, 130)
    assert received.code == 9
    check_stayed()
