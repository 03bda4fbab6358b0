"""vfiomig send and receive that cannot: each a sentence, where, why, both devices, what to do."""

import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cli_runner import run, start, state_of
from live_commands import (
    HERE,
    RECEIVE_JOURNAL,
    SEND_JOURNAL,
    THERE,
    check_error,
    check_stayed,
    in_state,
    receiving,
    send,
    sending,
)
from vfiomig.fd import OwnedFd


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    return tmp_path


# What is refused at once, without a journal and without a device being touched.

NONSENSE = ["", "tcp:", "tcp:host", "tcp:host:", "tcp:host:http", "tcp:h:65536", "tcp:::1:5", "fd:"]
NONSENSE += ["fd:-1", "fd:x", "unix:", "vsock:1", "vsock:x:1", "http://host/", "host:4444", "--"]
NONSENSE += ["unix:" + "x" * 200, "TCP:host:1", "tcp:[::1:5", "tcp:user@:1:2"]


@pytest.mark.parametrize("url", NONSENSE)
@pytest.mark.parametrize("command", ["send", "receive"])
def test_a_url_that_is_none_is_refused(here: Path, command: str, url: str) -> None:
    found = run(command, "--json", HERE, url) if url != "--" else run(command, "--json", HERE)
    check_error(found, 2, "no address of a session|at most 107 bytes|required: (DEVICE, )?URL")
    assert os.listdir(here) == []


USAGE = {
    "no device": (["send", "tcp::1"], "URL"),
    "no such device": (["send", "sim:?colour=red", "tcp::1"], "no parameter 'colour'"),
    "connections": (["send", "sim:", "tcp::1", "--connections", "0"], "0 connections: 1 to 64"),
    "many connections": (["send", "sim:", "tcp::1", "--connections", "x"], "'x'"),
    "lease": (["send", "sim:", "tcp::1", "--lease", "0s"], "more than nothing"),
    "silence": (["receive", "sim:", "tcp::1", "--silence", "0s"], "more than nothing"),
    "limit": (["send", "sim:", "tcp::1", "--downtime-limit", "soon"], "'soon'"),
    "on limit": (["send", "sim:", "tcp::1", "--on-limit", "wait"], "'wait'"),
    "rate": (["send", "sim:", "tcp::1", "--max-bandwidth", "fast"], "'fast'"),
    "buffer": (["receive", "sim:", "tcp::1", "--buffer", "1"], "4 KiB to 128 MiB"),
    "field": (["receive", "sim:", "tcp::1", "--allow-mismatch", "colour"], "no such field"),
    "peer": (["send", "sim:", "tcp::1", "--tls-peer", "name"], "--tls-peer needs --tls-dir"),
    "via": (["send", "sim:", "sim:", "--via", "rsh:host"], "'rsh:host' is not ssh:HOST"),
    "via option": (["send", "sim:", "sim:", "--via", "ssh:-oProxyCommand=x"], "is not ssh:HOST"),
    "via nobody": (["send", "sim:", "a,,b", "--via", "ssh:host"], "does not name the devices"),
    "via tls": (["send", "sim:", "sim:", "--via", "ssh:h", "--tls-dir", "."], "exclude each other"),
    "far": (["send", "sim:", "tcp:192.0.2.1:4444"], "tcp:192.0.2.1:4444 is not this host"),
    "wide": (["receive", "sim:", "tcp:0.0.0.0:0"], "there is no TLS"),
    "wide v6": (["receive", "sim:", "tcp:[::]:0"], "there is no TLS"),
    "file": (["send", "sim:", "fd:FILE"], "is no socket"),
    "closed": (["receive", "sim:", "fd:999"], "fd:999: Bad file descriptor"),
    "tls over fd": (["send", "sim:", "fd:FILE", "--tls-dir", "."], "there is no TLS over it"),
}


@pytest.mark.parametrize(("words", "text"), USAGE.values(), ids=USAGE)
def test_what_makes_no_sense_is_a_usage_error(words: list[str], text: str) -> None:
    with open("/dev/null", "rb") as file:
        words = [word.replace("FILE", str(file.fileno())) for word in words]
        check_error(run(*words, "--json", *SEND_JOURNAL), 2, re.escape(text))
        for_people = run(*words, *SEND_JOURNAL)
    assert (for_people.code, for_people.out) == (2, "")
    assert for_people.err.startswith("vfiomig: ")


def test_a_datagram_socket_is_no_stream() -> None:
    near, far = socket.socketpair(type=socket.SOCK_DGRAM)
    with near, far:
        check_error(send("sim:", f"fd:{near.fileno()}"), 2, "no stream socket")


@pytest.mark.parametrize("command", ["send", "receive"])
def test_a_terminal_is_no_connection(here: Path, command: str) -> None:
    ours, theirs = pty.openpty()
    with OwnedFd(ours), OwnedFd(theirs):
        pipes: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.PIPE}
        with start(command, HERE, "-", **pipes) as process:
            _, err = process.communicate(timeout=60)
    assert (process.returncode, os.listdir(here)) == (2, [])
    assert b"standard input and output are a terminal\n  hint: " in err


# Nobody there, or not who was wanted.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("tcp:no-such-host.invalid:4444", "no-such-host.invalid does not resolve: "),
        ("tcp:.:4444", "does not resolve: "),
        ("tcp::PORT", "tcp:127.0.0.1:PORT: Connection refused"),
        ("unix:nobody.sock", "unix:nobody.sock: No such file or directory"),
        ("unix:file", "unix:file: Connection refused"),
    ],
)
def test_a_sender_finds_nobody(url: str, text: str) -> None:
    Path("file").write_bytes(b"")
    port = str(free_port())
    text = text.replace("PORT", port)
    found = send(HERE, "--insecure", url.replace("PORT", port))
    check_error(found, 9, "^(?!.*Traceback).*" + re.escape(text))
    assert found.last["phase"] == "hello"
    assert found.last["source_state"] == "sim:here is RUNNING"
    assert found.last["aftermath"] == "sim:here is RUNNING; the other end has had no part in it"
    assert found.last["hint"]
    assert state_of("sim:here") == "RUNNING"


def test_an_address_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"tcp::{sock.getsockname()[1]}"
        found = run("receive", THERE, url, "--json", *RECEIVE_JOURNAL)
    check_error(found, 10, rf"cannot listen at {url.replace('::', ':127.0.0.1:')}: .* in use")
    assert found.last["errno_name"] == "EADDRINUSE"
    assert found.last["dest_state"] == "sim:there is RUNNING"
    with receiving() as (_, where):
        found = run("receive", "sim:other", where, "--json")
        check_error(found, 5, "there.sock: somebody serves there already")
    Path("file").write_bytes(b"kept")
    found = run("receive", "sim:other", "unix:file", "--json")
    check_error(found, 10, "file exists, and is no socket of ours")
    assert Path("file").read_bytes() == b"kept"
    check_error(run("receive", "sim:other", "unix:no/where", "--json"), 10, "No such file")
    # 192.0.2.0/24 is nobody's, and so not this host's: RFC 5737.
    found = run("receive", "sim:other", "tcp:192.0.2.1:0", "--insecure", "--json")
    check_error(found, 10, "cannot listen at tcp:192.0.2.1:0: Cannot assign requested address")


def test_a_device_that_does_not_run_is_not_sent() -> None:
    run("state", HERE, "--set", "STOP")
    found = send("sim:here", "tcp::1")
    check_error(found, 5, "sim:here: it is in STOP and not RUNNING|sim:here is in STOP")
    assert (found.last["actual_state"], state_of("sim:here")) == ("STOP", "STOP")
    assert not Path("journal-here").exists()


def test_certificates_that_cannot_be_read_are_told_before_anything_else(here: Path) -> None:
    for command in ("send", "receive"):
        found = run(command, HERE, "tcp::1", "--tls-dir", here / "none", "--json", *SEND_JOURNAL)
        role = {"send": "client", "receive": "server"}[command]
        check_error(found, 13, f"cannot read {here}/none/{role}-key.pem: No such file")
        assert "--tls-dir needs" in found.last["hint"]
    assert state_of("sim:here") == "RUNNING"


def test_a_journal_that_cannot_be_written_is_found_before_the_stop() -> None:
    Path("file").write_bytes(b"")
    bad = ("--journal", "file/below")
    found = send(HERE, "tcp::1", *bad)
    check_error(found, 10, "cannot write the journal file/below/", hint="--journal DIR")
    assert found.last["source_state"] == "sim:here is RUNNING"
    with receiving(THERE, *bad) as (receiver, where):
        sent, received = send(HERE, where), receiver.ending()
    check_error(received, 10, "cannot write the journal file/below/", hint="--journal DIR")
    check_error(sent, 9, f"{where}: cannot write the journal", hint="at the other end: ")
    assert "STOP_COPY" not in sent.out
    check_stayed()


# The exit codes of a session.

# What is wrong with the device at either end, and what the two commands end with.
FAULTS = {
    "source fails": ("size=1M&fault=read:EIO@100000*1", "size=1M", (6, 9)),
    "destination fails": ("size=1M", "size=1M&fault=write:EIO@100000*1", (9, 6)),
    "does not fit": ("size=1M", "profile=xe", (12, 12)),
    "over the limit": ("profile=xe&size=64M", "profile=xe&size=64M", (11, 9)),
    "no descriptor": ("size=1M&fault=set-after:EMFILE@PRE_COPY*1", "size=1M", (15, 9)),
    "lost": ("size=1M&fault=set:EIO@STOP_COPY:ERROR&fault=reset:EIO", "size=1M", (20, 9)),
    "lost there": ("size=1M", "size=1M&fault=set:EIO@RESUMING:ERROR&fault=reset:EIO", (9, 20)),
}


@pytest.mark.parametrize(("here_is", "there_is", "codes"), FAULTS.values(), ids=FAULTS)
def test_the_exit_codes_are_those_of_the_help(
    here_is: str, there_is: str, codes: tuple[int, int]
) -> None:
    limit = ["--downtime-limit", "1ns"] if codes[0] == 11 else []
    with receiving(f"sim:there?seed=2&{there_is}") as (receiver, where):
        sent, received = send(f"sim:here?seed=1&{here_is}", where, *limit), receiver.ending()
    check_error(sent, codes[0], ".")
    check_error(received, codes[1], ".")
    for found in (sent, received):
        # Who is turned away at once has nothing to say of a device that was not touched.
        if (found, codes[0]) != (received, 12):
            assert found.last["source_state"].startswith("sim:here "), found.last
        assert found.last["dest_state"].startswith("sim:there "), found.last
        assert found.last["aftermath"]
    if 20 not in codes:
        check_stayed()


def test_a_misfit_is_told_field_by_field() -> None:
    with receiving("sim:there?profile=xe") as (receiver, where):
        sent, received = send(HERE, where), receiver.ending()
    assert ["driver", "sim:generic", "sim:xe"] in received.last["fields"]
    assert "its driver is 'sim:xe', not 'sim:generic'" in sent.last["message"]
    assert "--allow-mismatch driver" in sent.last["hint"]
    assert "PRE_COPY" not in "".join(map(str, [d.get("wanted") for d in sent.documents]))


def test_more_devices_than_are_there_are_refused() -> None:
    with receiving() as (receiver, where):
        sent, received = send(HERE, "sim:?size=1M", where), receiver.ending()
    check_error(sent, 2, "sends 2 devices, and 1 are here")
    check_error(received, 2, "sends 2 devices, and 1 are here")


def test_devices_without_p2p_are_not_sent_together() -> None:
    found = send("sim:?profile=hisi", "sim:?profile=hisi", "tcp::1")
    check_error(found, 3, "has no P2P", hint="--without-p2p")


def test_a_state_that_is_too_large_is_refused_at_either_end() -> None:
    with receiving() as (receiver, where):
        sent, received = send(HERE, where, "--max-state", "100K"), receiver.ending()
    check_error(sent, 15, "larger|more than")
    check_error(received, 9, ".")
    with receiving(THERE, "--max-state", "100K") as (receiver, where):
        sent, received = send(HERE, where), receiver.ending()
    check_error(received, 15, "larger|more than")
    check_error(sent, 9, ".")
    assert any("--max-state there allows more" in str(told) for told in sent.documents)
    check_stayed()


@pytest.mark.parametrize("url", ["unix:there.sock", "tcp::0"])
@pytest.mark.parametrize("state", ["PRE_COPY", "STOP_COPY"])
def test_a_receiver_that_hangs_is_given_up_though_its_socket_takes_nothing_more(
    url: str, state: str
) -> None:
    off = ("--pre-copy", "off", "--on-limit", "switch") * (state == "STOP_COPY")
    slow = "sim:here?size=64M&bandwidth=30M&seed=1"
    with (
        receiving("sim:there?size=64M&seed=2", url=url) as (receiver, where),
        sending(slow, where, "--silence", "500ms", *off) as sender,
    ):
        sender.wait_for(in_state(state))
        receiver.process.send_signal(signal.SIGSTOP)
        sent = sender.ending()
        receiver.process.send_signal(signal.SIGCONT)
        received = receiver.ending()
    check_error(sent, 9, "it says nothing any more")
    assert sent.last["source_state"] == "sim:here is RUNNING"
    assert sent.last["aftermath"].endswith("what became of the other end is not known")
    check_error(received, 9, "gone|cut|cancelled|says nothing")
    check_stayed()
