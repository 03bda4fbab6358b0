"""A peer that lies in the middle of a session: a reset there, and here it runs on."""

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

import vfiomig
from live_facing import (
    LARGEST,
    LENGTHS,
    STATE,
    Facing,
    S,
    check_reset,
    check_untouched,
    grows_little,
    raw,
    receiver,
    sender,
    source_to,
    until_left,
)
from session_oracle import CONTROL, DATA, MESSAGE, PROBE, ZEROS, Destination, Gone, Refused, Source

# Once it is in RESUMING: a reset, and it has never run.


def steps(*each: Callable[[Source], object]) -> Callable[[Source], None]:
    def take(oracle: Source) -> None:
        for step in each:
            step(oracle)

    return take


def end(device_bytes: int, digest: str) -> Callable[[Source], None]:
    """Stop, send 1000 bytes, and say that it was something else."""

    def say(oracle: Source) -> None:
        oracle.control.say("stopping", expected_downtime_ns=0)
        oracle.give(0, 1000)
        oracle.control.say("end", 0, device_bytes=device_bytes, digest=digest)

    return say


def spoilt(kind: int, stream: int, payload: bytes = b"x", **odd: Any) -> Callable[[Source], None]:  # noqa: ANN401
    return lambda oracle: raw(oracle, kind, stream, payload, **odd)


def lengths() -> Iterator[tuple[str, tuple[Callable[[Source], None], str]]]:
    for kind, most in LARGEST.items():
        for name, length in (LENGTHS | {"max+1": most + 1}).items():
            yield f"length-{name}-of-kind-{kind}", (spoilt(kind, 0, length=length), "bytes")


DIGEST = xxhash.xxh3_64_hexdigest(STATE[:1000])
# What it does once all devices are in RESUMING, and a word of what the destination says to that.
MISDEEDS: dict[str, tuple[Callable[[Source], None], str]] = {
    "end-with-a-byte-more": (end(1001, DIGEST), "1000 bytes came"),
    "end-with-a-byte-less": (end(999, DIGEST), "1000 bytes came"),
    "end-with-2^64-1-bytes": (end(2**64 - 1, DIGEST), "1000 bytes came"),
    "end-with-another-digest": (end(1000, "0" * 16), "of digest"),
    "end-with-no-digest": (end(1000, ""), "of digest"),
    "end-twice": (steps(Source.stop, lambda oracle: oracle.end(0)), "none was to come"),
    "end-without-a-stop": (
        steps(lambda oracle: oracle.round(1, 99), lambda oracle: oracle.end(0)),
        "stopped",
    ),
    "state-after-the-end": (
        steps(
            lambda oracle: oracle.control.say("stopping", expected_downtime_ns=0),
            lambda oracle: oracle.end(0),
            lambda oracle: oracle.give(0, 10),
        ),
        "none was to come",
    ),
    "go-before-ready": (
        steps(lambda oracle: oracle.control.say("go"), Source.stop, Source.ready),
        "GO before",
    ),
    "state-of-no-device": (spoilt(DATA, CONTROL), "no device"),
    "zeros-of-no-device": (spoilt(ZEROS, CONTROL, b"", length=9), "no device"),
    "state-of-another-device": (spoilt(DATA, 1), "there is none"),
    "a-damaged-digest": (lambda oracle: oracle.give(0, 1000, damaged=True), "damaged"),
    "unknown-message": (lambda oracle: oracle.control.say("hurry"), "no message 'hurry'"),
    "message-for-a-device": (lambda oracle: oracle.control.say("go", 0), "Go for a device"),
    "mark-without-a-number": (lambda oracle: oracle.control.say("mark", 0), "number"),
    "a-bomb": (spoilt(MESSAGE, CONTROL, b"[" * 60_000), "cannot be"),
    "kind-9": (spoilt(9, 0), "kind 9"),
    "reserved-flag": (spoilt(DATA, 0, flags=4), "flags"),
    "reserved-bytes": (spoilt(DATA, 0, reserved=b"\1" * 24), "belongs"),
    "flagged-message": (spoilt(MESSAGE, 0, flags=1), "flags"),
    "wrong-link": (spoilt(DATA, 0, link=1), "belongs here"),
    "wrong-number": (spoilt(DATA, 0, number=1), "belongs"),
    **dict(lengths()),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_source_that_misbehaves_in_the_middle_gets_nothing_run(tmp_path: Path, name: str) -> None:
    misdeed, text = MISDEEDS[name]
    with receiver(tmp_path) as there, grows_little():
        oracle = source_to(there.sock)
        oracle.meet()
        oracle.begin()
        with suppress(Refused, Gone, OSError):
            misdeed(oracle)
            oracle.hear("done")
        there.refused(text)
        check_reset(there.device)


def test_a_lease_of_no_time_is_no_lease(tmp_path: Path) -> None:
    with receiver(tmp_path) as there:
        oracle = source_to(there.sock)
        oracle.meet()
        with pytest.raises(Refused, match="lease"):
            oracle.begin(lease_ns=0)
        there.refused("lease")
        check_untouched(there.device)


@pytest.mark.parametrize("words", ["state", "end", "mark"])
def test_what_is_for_a_device_before_begin_touches_nothing(tmp_path: Path, words: str) -> None:
    with receiver(tmp_path) as there:
        oracle = source_to(there.sock)
        oracle.meet()
        if words == "state":
            oracle.give(0, 1000)
        elif words == "end":
            oracle.end(0)
        else:
            oracle.control.say("mark", 0, number=1)
        with pytest.raises((Refused, Gone)):
            oracle.hear("resuming")
        there.refused()
        check_untouched(there.device)


def test_a_large_frame_that_is_only_announced_reserves_nothing(tmp_path: Path) -> None:
    with receiver(tmp_path) as there, grows_little():
        oracle = source_to(there.sock)
        oracle.meet()
        oracle.begin()
        raw(oracle, DATA, 0, bytes(range(256)) * 1000, length=128 << 20)
        there.refused("gone")
        check_reset(there.device)


# A false destination: the source runs on.


def meet(here: Facing) -> Destination:
    there = Destination(lambda: here.sock, 1)
    there.meet()
    return there


def take_all(there: Destination) -> None:
    """Take everything, or what comes until the source gives up."""
    with suppress(Gone, OSError):
        there.until("begin")
        there.control.say("resuming")
        for _ in there._frames():
            if there.devices[0].ended or "left" in there.heard:
                return


def ready(there: Destination, **fields: object) -> None:
    [device] = there.devices
    given = {"device_bytes": [len(device.state)], "digests": [device.digest.hexdigest()]}
    there.control.say("ready", **(given | {"commit_ns": 0} | fields))


def after_all(**fields: object) -> Callable[[Destination], None]:
    """Take everything, and then be ready with something else."""

    def say(there: Destination) -> None:
        take_all(there)
        ready(there, **fields)

    return say


def before_all(*words: Callable[[Destination], None]) -> Callable[[Destination], None]:
    """Say something first, and then take everything, and be ready with what is right."""

    def say(there: Destination) -> None:
        for word in words:
            word(there)
        after_all()(there)

    return say


def said(kind: str, stream: int = CONTROL, /, **fields: object) -> Callable[[Destination], None]:
    return lambda there: there.control.say(kind, stream, **fields)


def sent(
    kind: int,
    stream: int,
    payload: bytes = b"x",
    length: int | None = None,
) -> Callable[[Destination], None]:
    return lambda there: there.control.frame(kind, stream, payload, length=length)


# What it does after both hellos, and a word of what the source says to that.
FALSEHOODS: dict[str, tuple[Callable[[Destination], None], str]] = {
    "ready-without-counts": (after_all(device_bytes=[]), "loaded"),
    "ready-with-more-devices": (after_all(device_bytes=[100001] * 9, digests=["x"] * 9), "loaded"),
    "ready-with-a-byte-less": (after_all(device_bytes=[7]), "loaded"),
    "ready-with-another-digest": (after_all(digests=["0" * 16]), "loaded"),
    "ready-with-no-digest": (after_all(digests=[]), "loaded"),
    "ready-before-anything": (before_all(ready), "READY before"),
    "done-before-go": (before_all(Destination.done), "DONE"),
    "done-and-ready-first-of-all": (
        before_all(Destination.done, Destination.ready),
        "READY before",
    ),
    "marked-without-a-number": (said("marked", device=0, number="1"), "number"),
    "state": (sent(DATA, 0), "DATA"),
    "zeros": (sent(ZEROS, 0, b"", 9), "ZEROS"),
    "probe": (sent(PROBE, CONTROL), "PROBE"),
    "state-of-no-device": (sent(DATA, CONTROL), "no device"),
    "unknown-kind": (sent(9, CONTROL), "kind 9"),
    "unknown-message": (said("hurry"), "hurry"),
    "resuming-for-a-device": (said("resuming", 0), "of stream 0"),
    "resuming-for-another-device": (said("resuming", 7), "there is none"),
    "a-bomb": (sent(MESSAGE, CONTROL, b"[" * 60_000), "cannot be"),
    **{
        f"length-{name}": (sent(MESSAGE, CONTROL, b"x", length), "bytes")
        for name, length in (LENGTHS | {"max+1": (64 << 10) + 1}).items()
    },
}


@pytest.mark.parametrize("name", FALSEHOODS)
def test_a_false_destination_does_not_stop_the_source(tmp_path: Path, name: str) -> None:
    falsehood, text = FALSEHOODS[name]
    with sender(tmp_path) as here, grows_little():
        before = here.device.content()
        there = meet(here)
        with suppress(Gone, OSError):
            falsehood(there)
            if "left" not in there.heard:
                until_left(there.control)
        here.refused(text)
        assert here.device.state() is S.RUNNING
        assert here.device.content() == before
        assert "go" not in there.heard


def test_numbers_of_a_destination_that_cannot_be_are_only_numbers(tmp_path: Path) -> None:
    most = (1 << 64) - 1
    with sender(tmp_path) as here:
        there = Destination(lambda: here.sock, 1)
        there.meet(rates=[most] * 300, fixed_ns=[0] * 300, max_state_bytes=1)
        there.control.say("progress", loaded_bytes=[most] * 1000)
        for device in (0, 1, most):
            there.control.say("marked", device=device, number=0)
        there.take_all()
        ready(there, commit_ns=most)
        there.until("go")
        there.control.say("done", ran_after_ns=most, fixed_ns=most, stopped_ns=most)
        there.until("bye")
        here.sock.shutdown(socket.SHUT_WR)
        assert here.done().downtime_ns is not None


def test_a_destination_that_claims_to_take_for_ever_is_not_waited_for(tmp_path: Path) -> None:
    with sender(tmp_path, pre_copy=vfiomig.PreCopyLimits(rounds=1)) as here:
        there = Destination(lambda: here.sock, 1)
        there.meet(fixed_ns=[(1 << 64) - 1])
        take_all(there)
        here.refused("downtime are allowed", 11)
        assert here.device.state() is S.RUNNING
