"""A peer that lies before anything is touched: it gets a sentence, and the device nothing."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash

from live_facing import (
    LARGEST,
    LENGTHS,
    STATE,
    S,
    check_untouched,
    frame,
    greeting,
    grows_little,
    receiver,
    sealed,
    sender,
    source_to,
)
from session_oracle import (
    CONTROL,
    DATA,
    MESSAGE,
    PROBE,
    ZEROS,
    Connection,
    Greeting,
    Refused,
    entry,
)

BAD_GREETINGS = {
    "noise": (bytes(range(64)), "does not speak"),
    "zeros": (bytes(64), "does not speak"),
    "http": (b"GET / HTTP/1.1\r\n".ljust(64), "does not speak"),
    "a-saved-stream": (greeting(magic=b"VMIGSTRM"), "does not speak"),
    "damaged": (greeting()[:-1] + b"\0", "damaged"),
    "cut": (greeting()[:63], "does not speak"),
    "newer-only": (greeting(newest=7, oldest=2), "speaks versions 2 to 7"),
    "newest-there-can-be": (greeting(newest=2**32 - 1, oldest=2**32 - 1), "versions"),
    "none": (greeting(newest=0, oldest=0), "speaks versions 0 to 0"),
    "reserved": (greeting(reserved=1), "reserved"),
    "index-out-of-range": (greeting(index=1), "connection 1 of 1"),
    "no-connections": (greeting(count=0), "connection 0 of 0"),
    "too-many-connections": (greeting(count=65), "connection 0 of 65"),
    "not-the-first": (greeting(index=1, count=2), ""),
}


@pytest.mark.parametrize("name", BAD_GREETINGS)
def test_a_greeting_that_is_none_is_refused_at_the_destination(tmp_path: Path, name: str) -> None:
    words, text = BAD_GREETINGS[name]
    with receiver(tmp_path) as there:
        there.sock.sendall(words)
        there.sock.shutdown(socket.SHUT_WR)
        failure = there.refused(text, 8 if "versions" in text else 9)
        if "versions" in text:
            assert "install versions" in failure.hint
        check_untouched(there.device)


@pytest.mark.parametrize("name", BAD_GREETINGS)
def test_a_greeting_that_is_none_is_refused_at_the_source(tmp_path: Path, name: str) -> None:
    words, text = BAD_GREETINGS[name]
    with sender(tmp_path) as here:
        here.sock.sendall(words)
        here.sock.shutdown(socket.SHUT_WR)
        code = 8 if "versions" in text else 9
        here.refused("another session" if name == "not-the-first" else text, code)
        assert [state for _, state in here.device.history if state is not S.RUNNING] == []


def test_another_session_in_the_answer_is_refused(tmp_path: Path) -> None:
    with sender(tmp_path) as here:
        here.sock.sendall(Greeting(os.urandom(16)).encode())
        here.refused("answers for another session")


def test_a_newer_peer_that_still_speaks_this_version_is_served(tmp_path: Path) -> None:
    with receiver(tmp_path) as there:
        oracle = source_to(there.sock)
        plain = Greeting(oracle.session, newest=7).encode()
        # In a newer greeting, reserved bytes may mean something that is not needed.
        there.sock.sendall(sealed(plain[:52] + b"\1\0\0\0"))
        connection = Connection(there.sock, from_source=True)
        connection.session = oracle.session
        assert connection.greeted().session == oracle.session
        oracle.connections.append(connection)
        connection.say("hello", tool="newer", devices=[entry("a")], colour="green")
        oracle.hear("hello")
        oracle.begin()
        oracle.stop()
        oracle.ready()
        oracle.go()
        oracle.part()
        assert there.done().devices[0].device_bytes == len(STATE)


# The first frame, and the hello in it.


HELLO = {"type": "hello", "tool": "x", "devices": [entry("a")]}


def first_frames() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Yield what a first frame must not be, as a function of the session id."""

    def of(
        payload: bytes = b"x", kind: int = MESSAGE, stream: int = CONTROL, **odd: object
    ) -> Callable[[bytes], bytes]:
        return lambda session: frame(kind, stream, payload, session=session, **odd)  # type: ignore[arg-type]

    for kind in (0, 5, 6, 64, 255):
        yield f"kind-{kind}", of(kind=kind)
    for kind, what in ((DATA, "data"), (ZEROS, "zeros"), (PROBE, "probe")):
        yield f"{what}-of-a-device", of(kind=kind, stream=0)
        yield f"{what}-of-none", of(kind=kind)
    for kind, most in LARGEST.items():
        for size, length in (LENGTHS | {"max+1": most + 1}).items():
            yield f"length-{size}-of-kind-{kind}", of(kind=kind, stream=0, length=length)
    for stream in (1, 2, 255, 256, 0xFFFE):
        yield f"stream-{stream}", of(json.dumps(HELLO).encode(), stream=stream)
    for bit in range(8):
        yield f"flag-{bit}-of-a-message", of(json.dumps(HELLO).encode(), flags=1 << bit)
    yield "reserved-byte", of(json.dumps(HELLO).encode(), reserved=bytes(23) + b"\1")
    yield "magic", of(json.dumps(HELLO).encode(), magic=b"VMfr")
    yield "number", of(json.dumps(HELLO).encode(), number=1)
    yield (
        "link-of-another-session",
        lambda _: frame(MESSAGE, CONTROL, json.dumps(HELLO).encode(), session=bytes(16)),
    )
    yield (
        "link-of-a-destination",
        of(
            json.dumps(HELLO).encode(), link=xxhash.xxh3_64_intdigest(bytes(range(16)), 2 * CONTROL)
        ),
    )
    yield (
        "padding",
        lambda session: (
            frame(MESSAGE, CONTROL, json.dumps(HELLO).encode(), session=session)[:-1] + b"\1"
        ),
    )
    yield (
        "payload",
        lambda session: frame(
            MESSAGE, CONTROL, json.dumps(HELLO).encode(), session=session
        ).replace(b"hello", b"hallo"),
    )
    for word in ("begin", "go", "mark", "bye", "left", "ready", "resuming"):
        yield f"{word}-first", of(json.dumps({"type": word}).encode())


def bombs() -> Iterator[tuple[str, bytes]]:
    """Yield what a hello must not be."""
    whole = json.dumps(HELLO)

    def put(name: str, value: str) -> bytes:
        return whole.replace('"tool": "x"', f'"tool": "x", "{name}": {value}').encode()

    yield "nothing", b" "
    yield "no-json", b"{"
    yield "no-object", b"[]"
    yield "a-text", b'"hello"'
    yield "no-utf-8", whole.encode().replace(b'"x"', b'"\xff"')
    yield "utf-16", whole.encode("utf-16")
    yield "nine-deep", put("deep", "[" * 9 + "]" * 9)
    yield "deep", put("deep", "[" * 30_000 + "]" * 30_000)
    yield "deep-and-cut", b"[" * 60_000
    yield "huge-integer", put("big", "9" * 60_000)
    yield "2^64", put("big", str(1 << 64))
    yield "negative", put("big", "-1")
    yield "fraction", put("big", "1.5")
    yield "exponent", put("big", "1e999999999")
    yield "nan", put("big", "NaN")
    yield "infinity", put("big", "Infinity")
    yield "a-name-twice", put("tool", '"y"')
    yield "half-a-pair", put("half", '"\\ud800"')
    yield "too-long", put("long", '"' + "x" * (64 << 10) + '"')
    yield "unknown-type", whole.replace('"hello"', '"hail"').encode()
    yield "type-is-a-number", whole.replace('"hello"', "1").encode()
    yield "no-devices", whole.replace('"devices"', '"gadgets"').encode()
    yield "devices-is-a-number", json.dumps(HELLO | {"devices": 1}).encode()
    yield "a-device-is-a-number", json.dumps(HELLO | {"devices": [1]}).encode()
    yield "a-device-is-empty", json.dumps(HELLO | {"devices": [{}]}).encode()
    yield "a-rate-is-true", put("rates", "[true]")
    yield "rates-is-an-object", put("rates", "{}")
    yield "token-is-null", put("token", "null")
    yield "another-protocol", whole.replace('"v2"', '"v1"').encode()
    yield (
        "a-length-is-a-text",
        json.dumps(HELLO | {"devices": [entry("a", stop_copy_length="1")]}).encode(),
    )


FIRST_FRAMES, BOMBS = dict(first_frames()), dict(bombs())


@pytest.mark.parametrize("name", FIRST_FRAMES)
def test_a_first_frame_that_is_no_hello_touches_nothing(tmp_path: Path, name: str) -> None:
    with receiver(tmp_path) as there, grows_little():
        there.sock.sendall(greeting())
        there.sock.sendall(FIRST_FRAMES[name](bytes(range(16))))
        there.refused()
        check_untouched(there.device)


@pytest.mark.parametrize("name", BOMBS)
def test_a_hello_that_is_a_bomb_touches_nothing(tmp_path: Path, name: str) -> None:
    started = time.monotonic()
    with receiver(tmp_path) as there, grows_little():
        there.sock.sendall(greeting())
        there.sock.sendall(frame(MESSAGE, CONTROL, BOMBS[name], session=bytes(range(16))))
        there.refused()
        check_untouched(there.device)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("name", BOMBS)
def test_a_hello_that_is_a_bomb_does_nothing_to_a_source(tmp_path: Path, name: str) -> None:
    with sender(tmp_path) as here, grows_little():
        there = Connection(here.sock, from_source=False)
        there.greet(Greeting(there.greeted().session))
        with suppress(BrokenPipeError):
            there.frame(MESSAGE, CONTROL, BOMBS[name])
        here.refused()
        assert [state for _, state in here.device.history if state is not S.RUNNING] == []


STRANGE = dict.fromkeys(
    ("driver", "model", "vendor_id", "device_id", "subsystem_vendor_id", "subsystem_device_id"), "x"
)
LIES: dict[str, tuple[list[dict[str, object]], int, str]] = {
    "no-device": ([], 2, "0 devices"),
    "two-devices": ([entry("a"), entry("b")], 2, "2 devices"),
    "many-devices": ([entry("a")] * 200, 2, "200 devices"),
    "another-driver": ([entry("a", identity=STRANGE)], 12, "driver is"),
    "a-power-too-much": ([entry("a", capabilities=["STOP_COPY", "FLY"])], 12, "FLY"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_hello_that_does_not_fit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    devices, code, text = LIES[name]
    with receiver(tmp_path) as there:
        oracle = source_to(there.sock)
        oracle._greet(0, bytes(16))
        oracle.control.say("hello", tool="x", devices=devices)
        with pytest.raises(Refused, match=f"^{code}: "):
            oracle.hear("hello")
        there.refused(text, code)
        check_untouched(there.device)


def test_absurd_sizes_in_a_hello_are_hints_and_reserve_nothing(tmp_path: Path) -> None:
    most = (1 << 64) - 1
    with receiver(tmp_path) as there, grows_little():
        oracle = source_to(there.sock)
        oracle.meet([entry("a", stop_copy_length=most)])
        oracle.begin(lease_ns=most)
        oracle.control.say(
            "status", phase="x", round=most, pending_bytes=most, expected_downtime_ns=most
        )
        oracle.stop()
        oracle.ready()
        oracle.go()
        times = dict.fromkeys(("downtime_ns", "downtime_error_ns", "source_downtime_ns"), most)
        oracle.control.say("bye", rates=[most] * 5, **times)
        there.sock.shutdown(socket.SHUT_WR)
        assert there.done().downtime_ns == most
