"""vfiomig send and receive: every way to connect them, what both say, and their options."""

import os
import re
import signal
import socket
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cli_runner import run, start, state_of
from live_commands import (
    HERE,
    RECEIVE_JOURNAL,
    SEND_JOURNAL,
    SHORT,
    THERE,
    check_moved,
    receiving,
    send,
    sending,
    started,
)
from vfiomig import MigrationReport

PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    return tmp_path


# Ways to connect them.


@pytest.mark.parametrize("url", ["unix:there.sock", "tcp::0", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
def test_a_device_moves_over_a_socket_that_the_receiver_tells(url: str) -> None:
    if "::1" in url and not has_ipv6():
        pytest.skip("this host has no IPv6 loopback")
    with receiving(url=url) as (receiver, where):
        assert where.startswith(url.replace("tcp::", "tcp:127.0.0.1:").removesuffix("0"))
        sent = send(HERE, where)
        received = receiver.ending()
    assert (sent.code, received.code, sent.err) == (0, 0, "")
    assert sent.last["devices"][0]["digest"] == received.last["devices"][0]["digest"]
    check_moved()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_device_moves_over_an_inherited_socket() -> None:
    near, far = socket.socketpair()
    with near, far, receiving(url=f"fd:{far.fileno()}", pass_fds=[far.fileno()]) as (receiver, _):
        far.close()
        assert send(HERE, f"fd:{near.fileno()}").code == 0
        assert receiver.ending().code == 0
    check_moved()


@pytest.mark.parametrize("kind", ["pipes", "sockets"])
def test_a_device_moves_over_standard_input_and_output(kind: str) -> None:
    if kind == "pipes":
        (from_there, to_here), (from_here, to_there) = os.pipe(), os.pipe()
    else:
        near, far = socket.socketpair()
        from_there = to_there = near.detach()
        to_here = from_here = far.detach()
    receive = ("receive", THERE, "-", *RECEIVE_JOURNAL, *SHORT)
    with (
        started(*receive, on_stderr=True, stdin=from_here, stdout=to_here) as receiver,
        sending(HERE, "-", on_stderr=True, stdin=from_there, stdout=to_there) as sender,
    ):
        for fd in {from_there, to_here, from_here, to_there}:
            os.close(fd)
        sent, received = sender.ending(), receiver.ending()
    assert (sent.code, received.code) == (0, 0)
    assert sent.last["peer"] == "standard input and output"
    assert sent.last["devices"][0]["digest"] == received.last["devices"][0]["digest"]
    check_moved()


def test_several_devices_move_together() -> None:
    there = [f"sim:there{index}?size=100001&seed={index + 10}" for index in range(3)]
    here = [f"sim:here{index}?size=100001&seed={index}" for index in range(3)]
    with receiving(*there) as (receiver, where):
        sent = send(*here, where, "--connections", "2")
        assert receiver.ending().code == 0
    assert sent.code == 0
    for index in range(3):
        check_moved(here=f"here{index}", there=f"there{index}")


# What they say.


def test_both_tell_people_what_happened() -> None:
    words = ("receive", THERE, "unix:there.sock", *RECEIVE_JOURNAL)
    with start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"vfiomig: listening at unix:there.sock\n"
        sent = run("send", HERE, "unix:there.sock", *SEND_JOURNAL)
        out, err = process.communicate(timeout=60)
    assert (sent.code, process.returncode) == (0, 0)
    assert re.fullmatch(
        r"vfiomig: connected at unix:there.sock: process \d+, user \d+\n"
        r"vfiomig: stopping the source, for [\d.]+ \w+ \(.+\)\n",
        sent.err,
    )
    assert re.fullmatch(
        rb"vfiomig: connected at unix:there.sock: process \d+, user \d+\n",
        err,
    )
    assert sent.out.startswith("sent sim:here to unix:there.sock\n")
    assert out.startswith(b"received sim:there from unix:there.sock from process ")
    for text in (sent.out, out.decode()):
        rows = [line.split()[0] for line in text.splitlines()[1:]]
        assert rows == ["state", "digest", "took", "downtime", "device", "session"]
        assert re.search(r"downtime +[\d.]+ \w+ \(within [\d.]+ \w+\), .*as the source saw", text)
        session = re.search(r"session +([0-9a-f]{32})", text)
        assert session is not None
        assert Path(f"journal-here/{session[1]}.source.journal").exists()
        assert Path(f"journal-there/{session[1]}.destination.journal").exists()
    assert "sim:here is STOP" in sent.out
    assert b"sim:there is RUNNING" in out


def test_both_tell_programs_everything() -> None:
    with receiving() as (receiver, where):
        sent = send(HERE, where)
        received = receiver.ending()
    everything = {field.name for field in fields(MigrationReport)}
    for found, role, command in ((sent, "source", "send"), (received, "destination", "receive")):
        assert {document["command"] for document in found.documents} == {command}
        assert found.last["type"] == "result"
        assert everything <= set(found.last)
        assert found.last["role"] == role
        assert [document["type"] for document in found.documents].count("connected") == 1
    assert sent.last["session"] == received.last["session"]
    assert sent.last["downtime_ns"] == received.last["downtime_ns"] > 0
    assert sent.last["devices"][0]["state"] == "STOP"
    assert received.last["devices"][0]["state"] == "RUNNING"
    stopping = [document for document in sent.documents if document["type"] == "stopping"]
    assert stopping[0]["expected_downtime_ns"] == sent.last["expected_downtime_ns"]
    assert stopping[0]["text"]
    told = [document for document in sent.documents if document["type"] == "transition"]
    assert [change["actual"] for change in told] == [
        "PRE_COPY",
        "PRE_COPY_P2P",
        "STOP_COPY",
        "STOP",
    ]
    assert len(sent.last["state_changes"]) == len(told)


def test_quiet_says_nothing_and_verbose_every_state_change() -> None:
    assert both_say("--quiet") == ("", "", "", "")
    for name in ("here", "here.sim", "there", "there.sim"):
        Path(name).unlink()
    _, sent, _, received = both_say("--verbose")
    assert re.search(r"^vfiomig: sim:here: RUNNING -> PRE_COPY [\d.]+ \w+$", sent, re.MULTILINE)
    assert re.search(r"^vfiomig: sim:there: STOP -> RESUMING [\d.]+ \w+$", received, re.MULTILINE)


def both_say(option: str) -> tuple[str, str, str, str]:
    """Return what a sender and a receiver say for people, on standard output and error each."""
    near, far = socket.socketpair()
    words = ("receive", THERE, f"fd:{far.fileno()}", *RECEIVE_JOURNAL, option)
    with near, far, start(*words, pass_fds=[far.fileno()], **PIPES) as process:
        far.close()
        sent = run("send", HERE, f"fd:{near.fileno()}", *SEND_JOURNAL, option)
        out, err = process.communicate(timeout=60)
    assert (sent.code, process.returncode) == (0, 0)
    check_moved()
    return sent.out, sent.err, out.decode(), err.decode()


def test_usr1_shows_where_both_stand() -> None:
    slow = ("send", "sim:here?size=4M&bandwidth=4M", "unix:there.sock", *SEND_JOURNAL)
    receive = ("receive", "sim:there?size=4M", "unix:there.sock", *RECEIVE_JOURNAL, "-v")
    with start(*receive, **PIPES) as receiver:
        assert receiver.stderr is not None
        assert receiver.stderr.readline() == b"vfiomig: listening at unix:there.sock\n"
        with start(*slow, "-v", **PIPES) as sender:
            for process, state, phase in (
                (receiver, b"-> RESUMING", b"load"),
                (sender, b"-> PRE_COPY", b"pre-copy"),
            ):
                assert process.stderr is not None
                assert any(state in line for line in process.stderr)
                process.send_signal(signal.SIGUSR1)
                said = (
                    rb"vfiomig: (nothing copied yet|" + phase + rb", round \d: .+ in .+, .+ left)"
                )
                assert any(re.match(said, line) for line in process.stderr)
            sender.communicate(timeout=60)
        receiver.communicate(timeout=60)
    assert (sender.returncode, receiver.returncode) == (0, 0)


def test_progress_is_told_to_programs() -> None:
    slow = "sim:here?size=12M&bandwidth=8M"
    with receiving("sim:there?size=12M") as (receiver, where):
        sent = send(slow, where, "--pre-copy", "off", "--on-limit", "switch")
        received = receiver.ending()
    for found, phase in ((sent, "stop-copy"), (received, "load")):
        told = [document for document in found.documents if document["type"] == "progress"]
        assert told
        assert {document["phase"] for document in told} == {phase}
        assert 0 < told[-1]["device_bytes"] <= 12 << 20
        assert {"round", "pending_bytes", "expected_downtime_ns"} <= set(told[-1])
    assert "longer than allowed" in sent.last["warnings"][-1]


# Options.


def test_a_dry_run_looks_at_the_device_and_at_nobody_else() -> None:
    found = run("send", HERE, "tcp::1", "--dry-run", *SEND_JOURNAL)
    assert (found.code, found.out) == (0, "would send sim:here: about 1 MiB\n")
    last = send(HERE, "unix:nobody.sock", "--dry-run").last
    assert (last["ready"], last["stop_copy_length"]) == (True, [1 << 20])
    via = send(HERE, "sim:there", "--via", "ssh:nowhere.invalid", "--dry-run")
    assert (via.code, via.last["ready"]) == (0, True)
    assert run("state", "sim:here", "--set", "STOP").code == 0
    found = send(HERE, "tcp::1", "--dry-run")
    assert (found.code, found.last["actual_state"]) == (5, "STOP")
    assert not Path("journal-here").exists()


def test_options_have_twins_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = {
        "DOWNTIME_LIMIT": "1ns",
        "ON_LIMIT": "switch",
        "AFTER": "reset",
        "PRE_COPY": "off",
        "MAX_BANDWIDTH": "10M",
        "JSON": "1",
    }
    with receiving() as (receiver, where):
        for name, text in twins.items():
            monkeypatch.setenv(f"VFIOMIG_{name}", text)
        monkeypatch.setenv("VFIOMIG_JOURNAL", "journal-here")
        sent = run("send", HERE, where)
        assert receiver.ending().code == 0
    assert sent.code == 0
    assert (sent.last["downtime_limit_ns"], sent.last["rounds"]) == (1, 0)
    assert sent.last["devices"][0]["pre_copy_bytes"] == 0
    assert sent.last["devices"][0]["state"] == "RUNNING"
    assert not any(Path("here").read_bytes())
    assert sent.last["downtime_ns"] > 50_000_000
    assert os.listdir("journal-here")


def test_what_is_insecure_has_to_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOMIG_INSECURE", "1")
    # 192.0.2.0/24 is nobody's: RFC 5737.
    for words in (["send", HERE, "tcp:192.0.2.1:4444"], ["receive", THERE, "tcp:0.0.0.0:0"]):
        found = run(*words, "--json")
        assert (found.code, "is not this host" in found.last["message"]) == (2, True)
        assert "--insecure" in found.last["hint"]
    assert "there is no TLS" in run("receive", THERE, "tcp:0.0.0.0:0").err


def test_after_says_what_becomes_of_the_device_here() -> None:
    with receiving() as (receiver, where):
        assert send(HERE, where, "--after", "reset").code == 0
        assert receiver.ending().code == 0
    assert (state_of("sim:here"), any(Path("here").read_bytes())) == ("RUNNING", False)
    assert any(Path("there").read_bytes())


def test_a_receiver_resets_a_device_that_is_not_running_when_told_to() -> None:
    run("state", THERE, "--set", "STOP")
    refused = run("receive", THERE, "unix:there.sock", "--json")
    assert (refused.code, refused.last["actual_state"]) == (5, "STOP")
    with receiving(THERE, "--force-reset") as (receiver, where):
        assert send(HERE, where).code == 0
        assert receiver.ending().code == 0
    check_moved()


def test_a_mismatch_is_allowed_by_the_receiver() -> None:
    other = "sim:there?profile=mlx5"
    with receiving(other, "--allow-mismatch", "driver") as (receiver, where):
        assert send(HERE, where).code == 0
        assert receiver.ending().code == 0
    check_moved()


def test_a_receiver_waits_no_longer_than_told() -> None:
    found = run("receive", THERE, "unix:there.sock", "--wait", "50ms", "--json", *RECEIVE_JOURNAL)
    assert (found.code, found.last["message"]) == (9, "no source came to unix:there.sock in time")
    assert found.last["aftermath"] == "sim:there is RUNNING; the other end has had no part in it"
    assert not Path("there.sock").exists()
    assert not list(Path().glob("journal-there/*.journal"))


def test_a_second_migration_of_the_same_devices_is_a_session_of_its_own() -> None:
    with receiving() as (receiver, where):
        first = send(HERE, where)
        assert receiver.ending().code == 0
    run("reset", "sim:here")
    with receiving("sim:here", url="unix:here.sock") as (receiver, where):
        second = send("sim:there", where)
        assert receiver.ending().code == 0
    assert second.code == 0
    assert first.last["session"] != second.last["session"]
    check_moved(here="there", there="here")
    assert first.last["devices"][0]["digest"] == second.last["devices"][0]["digest"]
