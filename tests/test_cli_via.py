"""vfiomig send --via ssh:HOST: the receiver is started there, and what it says is said here."""

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from cli_runner import run, state_of
from live_commands import (
    HERE,
    SEND_JOURNAL,
    THERE,
    check_error,
    check_moved,
    check_stayed,
    in_state,
    of_type,
    send,
    sending,
)

# What ssh does, without the way there: the words behind the host are for a shell.
SSH = """#!/bin/sh
test "$1" = -p && shift 2
echo "$1" >> hosts
shift
PATH={bin}:$PATH VFIOMIG_JOURNAL=journal-there exec sh -c "$*"
"""
VIA = ("--via", "ssh:there.example")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    script(tmp_path / "ssh", SSH.format(bin=Path(sys.executable).parent))
    monkeypatch.setenv("VFIOMIG_SSH", f"{tmp_path}/ssh -p 2222")
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_device_moves_to_a_receiver_that_is_started_there() -> None:
    sent = send(HERE, *VIA, THERE)
    assert (sent.code, sent.err) == (0, "")
    assert (sent.last["peer"], sent.last["role"]) == ("ssh:there.example", "source")
    check_moved()
    assert Path("hosts").read_text() == "there.example\n"
    session = sent.last["session"]
    assert Path(f"journal-there/{session}.destination.journal").exists()
    assert Path(f"journal-here/{session}.source.journal").exists()


def test_people_are_told_where_it_went_and_nothing_twice() -> None:
    found = run("send", HERE, *VIA, "--", THERE)
    assert (found.code, found.out.splitlines()[0]) == (0, "sent sim:here to ssh:there.example")
    told = [line.partition(":")[2].split()[0] for line in found.err.splitlines()]
    assert told == ["connected", "stopping"]


def test_several_devices_are_named_with_commas() -> None:
    there = "sim:there?seed=3,sim:there2?seed=4"
    sent = send(*VIA, "sim:here?seed=1", "sim:here2?seed=2", there)
    assert sent.code == 0
    check_moved()
    check_moved(here="here2", there="there2")


@pytest.mark.parametrize("name", ["it's there", "$(touch x)", "a b;touch x", '"\\', "sp%2Cit"])
def test_no_shell_there_takes_a_name_apart(here: Path, name: str) -> None:
    sent = send(HERE, *VIA, f"sim:{name}?size=1M")
    assert sent.code == 0, sent
    assert not Path("x").exists()
    check_moved_to(name.replace("%2C", ","))


def check_moved_to(name: str) -> None:
    assert Path(name).read_bytes() == Path("here").read_bytes()


def test_limits_are_told_to_the_other_end() -> None:
    script(Path("ssh"), '#!/bin/sh\necho "$*" > words\nexit 1\n')
    send(HERE, *VIA, "--silence", "3s", "--max-state", "5M", "--buffer", "64K", "dev")
    assert Path("words").read_text().split() == [
        *("-p", "2222", "there.example", "vfiomig", "receive", "--json"),
        *("--silence", "3000000000ns", "--max-state", "5242880", "--buffer", "65536"),
        *("--", "dev", "-"),
    ]


# What fails there.

FAILURES = {
    "no such device": ("0000:ff:1f.7", 5, "0000:ff:1f.7"),
    "usage": ("sim:there?colour=red", 2, "no parameter 'colour'"),
    "an option": ("--insecure", 2, "required: |--insecure"),
    "does not fit": ("sim:there?profile=xe", 12, "its driver is 'sim:xe', not 'sim:generic'"),
    "too many": ("sim:there,sim:there2", 2, "1 devices, and 2 are here"),
    "resuming": ("sim:there?fault=set:EIO@RESUMING", 6, "cannot enter RESUMING: Input/output"),
    "writing": ("sim:there?fault=write:ENOSPC@100K", 6, "No space left on device"),
    "lost": ("sim:there?fault=set:EIO@RESUMING:ERROR&fault=reset:EIO", 20, "cannot be reset"),
}


@pytest.mark.parametrize(("there", "code", "text"), FAILURES.values(), ids=FAILURES)
def test_the_code_and_the_words_of_the_other_end_are_this_ones(
    there: str, code: int, text: str
) -> None:
    found = send(HERE, *VIA, "--", there)
    check_error(found, code, text)
    assert "there" in found.last["message"]
    assert found.last["source_state"] == "sim:here is RUNNING"
    assert state_of("sim:here") == "RUNNING"
    Path("there.sim").unlink(missing_ok=True)
    for_people = run("send", "sim:here", *VIA, *SEND_JOURNAL, "--", there)
    assert for_people.code == code
    assert "vfiomig: there.example: " in for_people.err or code in (2, 12)
    assert "  now: sim:here is RUNNING; " in for_people.err


SSH_FAILURES = {
    "no vfiomig": ("exec no-such-command", 9, "there.example: vfiomig cannot be run there"),
    "not executable": ("exec /dev/null", 9, "there.example: vfiomig cannot be run there"),
    "no way": (
        "echo Connection refused >&2; exit 255",
        9,
        "there.example: ssh ended with exit code 255",
    ),
    "killed": ("kill -TERM $$", 9, "there.example: ssh was ended by SIGTERM"),
    "not vfiomig": ("cat; exit 0", 9, "role|answers|its own|session protocol|not"),
    "noise": ("echo Welcome to there; exit 0", 9, "does not speak|gone"),
}


@pytest.mark.parametrize(("body", "code", "text"), SSH_FAILURES.values(), ids=SSH_FAILURES)
def test_an_ssh_that_fails_is_a_peer_that_failed(body: str, code: int, text: str) -> None:
    script(Path("ssh"), f"#!/bin/sh\n{body}\n")
    found = send(HERE, *VIA, THERE)
    check_error(found, code, text)
    assert found.last["source_state"] == "sim:here is RUNNING"
    if "exit 255" in body:
        assert found.err == "Connection refused\n"  # ssh's own words stay as they are
    assert state_of("sim:here") == "RUNNING"


def test_no_ssh_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOMIG_SSH", "/no/ssh")
    check_error(send(HERE, *VIA, THERE), 9, "cannot run /no/ssh: No such file", hint="VFIOMIG_SSH")
    assert not Path("journal-here").exists()
    monkeypatch.setenv("VFIOMIG_SSH", "ssh 'there")
    check_error(send(HERE, *VIA, THERE), 2, "VFIOMIG_SSH is .*: No closing quotation")


def test_a_device_that_does_not_run_is_refused_before_ssh_is_started() -> None:
    run("state", HERE, "--set", "STOP")
    assert send("sim:here", *VIA, THERE).code == 5
    assert not Path("hosts").exists()


def test_a_warning_of_the_other_end_names_its_host() -> None:
    text = '{"schema": 1, "type": "warning", "command": "receive", "text": "hot"}'
    body = SSH.format(bin=Path(sys.executable).parent)
    script(Path("ssh"), body.replace("shift\n", f"shift\necho '{text}' >&2\n"))
    found = run("send", HERE, *VIA, "--", THERE)
    assert found.code == 0
    assert "vfiomig: there.example: hot\n" in found.err


def test_an_ssh_that_others_share_is_not_waited_for() -> None:
    body = SSH.format(bin=Path(sys.executable).parent)
    # As ControlPersist: a process stays, and keeps standard error open.
    script(
        Path("ssh"), body.replace("shift\nPATH", "shift\nsleep 60 >&2 <&- & echo $! > left\nPATH")
    )
    try:
        assert send(HERE, *VIA, THERE).code == 0
    finally:
        os.kill(int(Path("left").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_both_ends(number: signal.Signals, code: int) -> None:
    with sending(f"{HERE}&bandwidth=1M", *VIA, THERE) as sender:
        sender.wait_for(in_state("PRE_COPY"))
        sender.process.send_signal(number)
        found = sender.ending()
    assert (found.code, found.last["message"]) == (code, f"stopped by {number.name}")
    assert found.last["dest_state"] == "sim:there was reset and is RUNNING"
    check_stayed()


def test_the_ctrl_c_of_a_terminal_reaches_every_process_and_tears_no_hand_over() -> None:
    hanging = f"{THERE}&fault=hang:400ms@set:RUNNING"
    with sending(HERE, *VIA, hanging, start_new_session=True) as sender:
        sender.wait_for(of_type("stopping"))
        sender.wait_for(in_state("STOP_COPY"))
        os.killpg(sender.process.pid, signal.SIGINT)
        found = sender.ending()
    # It came before GO or after it: both ends agree in either case.
    if found.code == 0:
        check_moved()
    else:
        assert found.code == 130
        check_stayed()
