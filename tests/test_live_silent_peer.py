"""A peer that says nothing, or never stops, or does not read; and what it says, on a terminal."""

import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import vfiomig
from cli_runner import run
from live_facing import (
    HERE,
    SHORT_NS,
    SLACK_NS,
    THERE,
    Facing,
    S,
    check_reset,
    check_untouched,
    greeting,
    grows_little,
    raw,
    receiver,
    sender,
    source_to,
)
from session_oracle import (
    DATA,
    MESSAGE,
    PROBE,
    Connection,
    Destination,
    Gone,
    Refused,
    Source,
    entry,
)
from test_live_oracle import Job
from vfiomig.cli.output import printable

# Silence, and the opposite.


def say_nothing(_: Source) -> None:
    """Not even a greeting."""


def greet_in_part(oracle: Source) -> None:
    oracle._connect().sendall(greeting()[:63])


def greet(oracle: Source) -> None:
    oracle._greet(0, bytes(16))


def say_half_a_header(oracle: Source) -> None:
    greet(oracle)
    oracle.control.socket.sendall(b"VMse")


def say_hello(oracle: Source) -> None:
    oracle.meet()


def begin(oracle: Source) -> None:
    oracle.meet()
    oracle.begin()


def announce(oracle: Source) -> None:
    begin(oracle)
    raw(oracle, DATA, 0, bytes(1000), length=1 << 20)


def copy(oracle: Source) -> None:
    begin(oracle)
    oracle.round(1, 1000)


def stop(oracle: Source) -> None:
    begin(oracle)
    oracle.control.say("stopping", expected_downtime_ns=0)


def wait_with_go(oracle: Source) -> None:
    begin(oracle)
    oracle.stop()
    oracle.ready()


@pytest.mark.parametrize(
    "until",
    [
        say_nothing,
        greet_in_part,
        greet,
        say_half_a_header,
        say_hello,
        begin,
        announce,
        copy,
        stop,
        wait_with_go,
    ],
)
def test_a_source_that_falls_silent_is_given_up(
    tmp_path: Path, until: Callable[[Source], None]
) -> None:
    wait_ns = SHORT_NS if until is say_nothing else 0
    with receiver(tmp_path, silence_ns=SHORT_NS, wait_ns=wait_ns) as there:
        oracle = source_to(there.sock)
        until(oracle)
        since_ns = time.monotonic_ns()
        # Nobody has ended the connection, and nobody will: it is found by the silence alone.
        assert_given_up(there, since_ns)
        there.refused()
        if S.RESUMING in [state for _, state in there.device.history]:
            check_reset(there.device)
        else:
            check_untouched(there.device)


def assert_given_up(found: Facing, since_ns: int, within_ns: int = SHORT_NS) -> None:
    """It says farewell, or just goes, once it has waited long enough. Reads what it says."""
    found.sock.settimeout((within_ns + SLACK_NS) / 1e9)
    while found.sock.recv(1 << 16):
        pass
    assert time.monotonic_ns() - since_ns < within_ns + SLACK_NS


def greet_a_source(there: Destination) -> None:
    there._greet()


def say_hello_to_a_source(there: Destination) -> None:
    there.meet()


def resume(there: Destination) -> None:
    there.meet()
    there.until("begin")
    there.control.say("resuming")


def get_ready(there: Destination) -> None:
    there.meet()
    there.take_all()
    there.ready()


@pytest.mark.parametrize(
    "until", [lambda _: None, greet_a_source, say_hello_to_a_source, resume, Destination.take_all]
)
def test_a_destination_that_falls_silent_is_given_up(
    tmp_path: Path, until: Callable[[Destination], None]
) -> None:
    with sender(tmp_path, silence_ns=SHORT_NS) as here:
        before = here.device.content()
        there = Destination(lambda: here.sock, 1)
        if until is Destination.take_all:
            there.meet()
        until(there)
        assert_given_up(here, time.monotonic_ns())
        here.refused()
        assert here.device.state() is S.RUNNING
        assert here.device.content() == before


def test_a_destination_that_falls_silent_after_go_leaves_it_held(tmp_path: Path) -> None:
    with sender(tmp_path, silence_ns=SHORT_NS) as here:
        there = Destination(lambda: here.sock, 1)
        get_ready(there)
        there.until("go")
        assert_given_up(here, time.monotonic_ns())
        here.refused("has not said", 21)
        assert here.device.state() is S.STOP


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait no longer for last words than for others."""
    monkeypatch.setattr("vfiomig.live.party.FAREWELL_NS", SHORT_NS)


@contextmanager
def babbling(connection: Connection, say: Callable[[], None]) -> Iterator[None]:
    """Say something again and again, as long as anybody takes it, and within this at the most."""
    over = threading.Event()

    def babble() -> None:
        with suppress(OSError):
            while not over.is_set():
                say()

    thread = threading.Thread(target=babble)
    thread.start()
    try:
        yield
    finally:
        over.set()
        # It may wait for room. A time-out would tear a frame, and what followed it would be damage.
        with suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)
        thread.join()


def probes(oracle: Source) -> None:
    raw_probe = bytes(1 << 20)
    oracle.control.frame(PROBE, 0, raw_probe)


def words(oracle: Source) -> None:
    oracle.control.say("status", phase="x", round=1, pending_bytes=1, expected_downtime_ns=1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("say", [probes, words])
def test_a_source_that_never_stops_talking_can_be_left(
    tmp_path: Path, say: Callable[[Source], None]
) -> None:
    with receiver(tmp_path) as there, grows_little():
        oracle = source_to(there.sock)
        begin(oracle)
        with babbling(oracle.control, lambda: say(oracle)):
            there.cancellation.cancel()
            since_ns = time.monotonic_ns()
            failure = there.failure()
            assert time.monotonic_ns() - since_ns < 2_500_000_000 + SLACK_NS
        assert failure.code == 14
        check_reset(there.device)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("phase", ["pre-copy", "stop-copy"])
def test_a_source_whose_peer_does_not_read_can_be_cancelled(tmp_path: Path, phase: str) -> None:
    limits = vfiomig.PreCopyLimits() if phase == "pre-copy" else None
    url = "sim:?size=8M&seed=1"
    with sender(tmp_path, url, pre_copy=limits, silence_ns=20 * SLACK_NS) as here, grows_little():
        before = here.device.content()
        there = Destination(lambda: here.sock, 1)
        resume(there)
        if limits is None:
            for frame in there._frames():
                if "stopping" in there.heard:
                    break
                assert frame.kind in {MESSAGE, PROBE}
        wait_until(lambda: is_stuck(here.sock))
        since_ns = time.monotonic_ns()
        here.cancellation.cancel()
        wait_until(lambda: here.device.history[-1][1] is S.RUNNING)
        # Measured: 0.1 s, the grace of a frame. The rest is for a busy machine.
        assert here.device.history[-1][0] - since_ns < 1_000_000_000
        here.refused(code=14)
        assert here.device.content() == before


@pytest.mark.usefixtures("hasty")
def test_a_destination_whose_peer_does_not_read_can_be_cancelled(tmp_path: Path) -> None:
    """It has answered so many marks that there is no room for another word."""
    with receiver(tmp_path, silence_ns=20 * SLACK_NS) as there:
        oracle = source_to(there.sock)
        begin(oracle)
        number = 0

        def mark() -> None:
            nonlocal number
            number += 1
            oracle.control.say("mark", 0, number=number)

        with babbling(oracle.control, mark):
            wait_until(lambda: is_stuck(there.sock))
            there.cancellation.cancel()
            failure = there.failure()
        assert failure.code == 14
        check_reset(there.device)


def is_stuck(sock: socket.socket) -> bool:
    """Whether what is to be read of it has stayed the same for a while, and is not nothing."""

    def waiting() -> int:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0])

    before = waiting()
    threading.Event().wait(0.1)
    return before == waiting() > 0


def wait_until(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends
        threading.Event().wait(0.001)


# What it says is shown to people.

EVIL = "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.exe\x00\x9b31m"


def test_what_a_false_destination_says_does_not_drive_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFIOMIG_JOURNAL", str(tmp_path / "journal"))
    near, far = socket.socketpair()

    def refuse() -> vfiomig.MigrationReport:
        with far:
            there = Destination(lambda: far, 1)
            there.meet()
            texts = dict.fromkeys(("error", "message", "hint", "phase"), EVIL)
            there.control.say("fail", code=6, **texts)
            there.control.say("left", never_ran=True, states=[EVIL, EVIL])
            with suppress(Gone):
                there.until("left")
        raise vfiomig.PeerError("done")

    job = Job(refuse)
    with near:
        found = run("send", HERE, f"fd:{near.fileno()}")
    job.failure()
    assert found.code == 9
    shown = found.err.replace("\n", "")
    assert "owned" in shown
    assert printable(shown) == shown


def test_what_a_false_source_says_does_not_drive_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFIOMIG_JOURNAL", str(tmp_path / "journal"))
    near, far = socket.socketpair()

    def claim() -> vfiomig.MigrationReport:
        with far:
            oracle = source_to(far)
            oracle._greet(0, bytes(16))
            identity = dict.fromkeys(entry("a")["identity"], EVIL)  # type: ignore[call-overload]
            evil = entry(EVIL, capabilities=[EVIL], identity=identity)
            oracle.control.say("hello", tool=EVIL, devices=[evil])
            with suppress(Gone, Refused):
                oracle.hear("hello")
        raise vfiomig.PeerError("done")

    job = Job(claim)
    with near:
        found = run("receive", THERE, f"fd:{near.fileno()}")
    job.failure()
    assert found.code == 12
    shown = found.err.replace("\n", "")
    assert "owned" in shown
    assert printable(shown) == shown
