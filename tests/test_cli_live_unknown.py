"""vfiomig send that does not know what came of it: 21, both devices as they are, and resolve."""

import os
import signal
from pathlib import Path

import pytest

from cli_runner import Run, state_of
from live_commands import (
    HERE,
    THERE,
    check_error,
    check_moved,
    check_stayed,
    in_state,
    proxy,
    receiving,
    resolve,
    send,
    sending,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    return tmp_path


def cut_at(text: bytes) -> tuple[Run, Run]:
    """Cut the connection when text comes by, and return what both ends said."""
    with (
        receiving() as (receiver, where),
        proxy(text, listen="proxy.sock", connect=where.removeprefix("unix:")) as between,
        sending(HERE, "unix:proxy.sock") as sender,
    ):
        assert between.held.wait(30)
        between.cut()
        return sender.ending(), receiver.ending()


def check_held(sent: Run) -> str:
    """The source does not run, and says what to do. Returns the session."""
    session = str(sent.last["session"])
    check_error(sent, 21, "was told to run, and has not said whether it does")
    assert f"vfiomig resolve {session}" in sent.last["hint"]
    assert (sent.last["phase"], sent.last["source_state"]) == ("hand-over", "sim:here is STOP")
    assert state_of("sim:here") == "STOP"
    return session


def test_a_go_that_is_lost_is_resolved_and_the_source_runs_again() -> None:
    sent, received = cut_at(b'"go"')
    session = check_held(sent)
    check_error(received, 9, "the other end has gone|was cut")
    assert "sim:there was reset and is RUNNING" in received.last["dest_state"]
    unknown = resolve(session, "here")
    check_error(unknown, 21, "GO was given", hint="at the destination")
    assert resolve(session, "there").last["verdict"] == "never-ran"
    back = resolve(session, "here", "--peer", "never-ran")
    assert (back.code, back.last["verdict"]) == (0, "back")
    check_stayed()
    with receiving() as (receiver, where):
        assert (send(HERE, where).code, receiver.ending().code) == (0, 0)
    check_moved()


def test_a_done_that_is_lost_is_resolved_and_the_source_stays_stopped() -> None:
    sent, received = cut_at(b'"done"')
    session = check_held(sent)
    assert (received.code, received.last["type"]) == (0, "result")
    assert any(f"vfiomig resolve {session}" in text for text in received.last["warnings"])
    assert resolve(session, "there").last["verdict"] == "ran"
    journal = next(Path("journal-there").glob("*.journal"))
    done = resolve(session[:6], "here", "--peer-journal", journal)
    assert (done.code, done.last["verdict"]) == (0, "released")
    check_moved()


def test_a_receiver_that_is_killed_when_it_was_told_to_run_is_resolved() -> None:
    hanging = f"{THERE}&fault=hang:600ms@set:RUNNING"
    with receiving(hanging) as (receiver, where), sending(HERE, where) as sender:
        receiver.wait_for(in_state("RUNNING_P2P", before="STOP"))
        receiver.process.kill()
        session = check_held(sender.ending())
    there = resolve(session, "there")
    assert (there.code, there.last["verdict"]) == (0, "ran"), there
    assert resolve(session, "here", "--peer", "ran").last["verdict"] == "released"
    check_moved()


def test_a_receiver_that_falls_silent_when_it_was_told_to_run_is_not_waited_for() -> None:
    with receiving(f"{THERE}&fault=hang:300ms@set:RUNNING") as (receiver, where):
        with sending(HERE, where, "--silence", "500ms") as sender:
            receiver.wait_for(in_state("RUNNING_P2P", before="STOP"))
            receiver.process.send_signal(signal.SIGSTOP)
            sent = sender.ending()
        assert "it says nothing any more" in sent.last["message"]
        session = check_held(sent)
        receiver.process.send_signal(signal.SIGCONT)
        assert receiver.ending().code == 0
    assert resolve(session, "there").last["verdict"] == "ran"
    assert resolve(session, "here", "--peer", "ran").last["verdict"] == "released"
    check_moved()
