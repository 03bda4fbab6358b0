"""Who else comes to a receiver: a second sender, a port scan, somebody of a newer version."""

import os
import re
import socket
import struct
from pathlib import Path

import pytest

from live_commands import (
    HERE,
    check_error,
    check_moved,
    in_state,
    of_type,
    receiving,
    send,
    sending,
)
from vfiomig._fastcopy import xxh3_64
from vfiomig.live.wire import Greeting


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VFIOMIG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VFIOMIG_JOURNAL", "journal")  # where a test names no other
    return tmp_path


def test_a_second_sender_is_turned_away_and_the_first_is_not_disturbed() -> None:
    slow = "sim:here?size=4M&bandwidth=8M"
    with receiving("sim:there?size=4M") as (receiver, where), sending(slow, where) as first:
        first.wait_for(in_state("PRE_COPY"))
        second = send("sim:other?size=4M", where)
        check_error(second, 5, "at work on another migration", hint="wait until it is over")
        assert second.last["source_state"] == "sim:other is RUNNING"
        sent, received = first.ending(), receiver.ending()
    assert (sent.code, received.code) == (0, 0)
    assert any("was turned away: another migration" in text for text in received.last["warnings"])
    check_moved()


GREETING = Greeting(bytes(16), 0, 1).encode()


def newer(greeting: bytes) -> bytes:
    """Return a greeting of somebody who speaks nothing older than version 2."""
    versions = greeting[:8] + struct.pack("<II", 2, 2) + greeting[16:56]
    return versions + struct.pack("<Q", xxh3_64(versions))


NOT_OURS = "does not speak vfiomig's session protocol"
STRANGERS = {
    "a port scan": (b"", "came, and went without a word"),
    "a browser": (
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(64),
        "does not speak vfiomig's session protocol",
    ),
    "half a greeting": (GREETING[:40], NOT_OURS),
    "a damaged greeting": (GREETING[:30] + b"!" + GREETING[31:], "damaged"),
    "a newer version": (newer(GREETING), "version"),
}


@pytest.mark.parametrize(("words", "why"), STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_at_the_port_is_told_of_and_changes_nothing(words: bytes, why: str) -> None:
    with receiving(url="tcp::0") as (receiver, where):
        host, port = where.removeprefix("tcp:").split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            told = receiver.wait_for(of_type("warning"))
            while stranger.recv(100):  # a newer one may be told which versions there are
                pass
        assert re.search(f"was turned away: .*({why})", told["text"]), told
        assert '"state": "RUNNING"' in Path("there.sim").read_text()
        sent, received = send(HERE, where), receiver.ending()
    assert (sent.code, received.code) == (0, 0)
    assert told["text"] in received.last["warnings"]
    check_moved()


def test_a_source_that_goes_in_the_middle_of_its_hello_ends_the_receiver() -> None:
    with receiving() as (receiver, where):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(where.removeprefix("unix:"))
            stranger.sendall(GREETING)
            assert len(stranger.recv(64)) == 64
        received = receiver.ending()
    check_error(received, 9, "the other end has gone")
    assert received.last["dest_state"] == "sim:there is RUNNING"
