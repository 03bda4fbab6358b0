"""Both ends of a session once more, from docs/session-protocol.md and nothing else.

They import no vfiomig, block, and keep the whole state in memory: a second reader and writer, so
that a mistake in one of the two shows as a difference.
"""

import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

MAGIC = bytes.fromhex("89564d47530d0a1a")
MESSAGE, DATA, ZEROS, PROBE = 1, 2, 3, 4
PRE_COPY, CONTINUED = 1, 2
CONTROL = 0xFFFF
LARGEST = {MESSAGE: 64 << 10, DATA: 128 << 20, ZEROS: 128 << 20, PROBE: 1 << 20}
_GREETING = struct.Struct("<8sIIHH16s16sI")
_HEADER = struct.Struct("<4sBBHQQQ24s")
_IDENTITY = ("driver", "model", "vendor_id", "device_id")
_SUBSYSTEM = ("subsystem_vendor_id", "subsystem_device_id")


class Refused(Exception):
    """What the page does not allow."""


class Gone(Exception):
    """The other end of a connection."""


def _must(claim: bool, otherwise: str) -> None:  # noqa: FBT001
    if not claim:
        raise Refused(otherwise)


def _xxh3(content: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(content, seed)


def _linked(head: bytes, seed: int = 0) -> bytes:
    return head + _xxh3(head, seed).to_bytes(8, "little")


@dataclass(frozen=True)
class Greeting:
    session: bytes
    index: int = 0
    count: int = 1
    token: bytes = bytes(16)
    newest: int = 1
    oldest: int = 1

    def encode(self) -> bytes:
        numbers = (self.newest, self.oldest, self.index, self.count)
        return _linked(_GREETING.pack(MAGIC, *numbers, self.session, self.token, 0))


def _greeted(content: bytes) -> Greeting:
    magic, newest, oldest, index, count, session, token, reserved = _GREETING.unpack(content[:56])
    _must(magic == MAGIC and content == _linked(content[:56]), "greeting")
    _must(min(newest, 1) >= max(oldest, 1), "versions")
    _must(newest > 1 or reserved == 0, "reserved bytes")
    _must(index < count <= 64, "index of the connection")
    return Greeting(session, index, count, token, newest, oldest)


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    length: int
    checksum: int
    payload: bytes

    @property
    def message(self) -> dict[str, Any]:
        _must(self.kind == MESSAGE, f"a frame of kind {self.kind} where a message belongs")
        plain = json.loads(self.payload.decode(), object_pairs_hook=_once)
        _must(isinstance(plain, dict) and isinstance(plain.get("type"), str), "a message")
        return dict(plain)

    @property
    def state(self) -> bytes:
        return bytes(self.length) if self.kind == ZEROS else self.payload


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _must(len(dict(pairs)) == len(pairs), "a name twice")
    return dict(pairs)


class Connection:
    """One connection: greetings, then frames. Does not own the socket."""

    def __init__(self, sock: socket.socket, *, from_source: bool) -> None:
        self.socket, self._from_source = sock, from_source
        sock.settimeout(30)
        self.session = b""
        self._sent: dict[int, tuple[int, int]] = {}
        self._heard: dict[int, tuple[int, int]] = {}

    def greet(self, greeting: Greeting) -> None:
        self.session = greeting.session
        self.socket.sendall(greeting.encode())

    def greeted(self) -> Greeting:
        greeting = _greeted(self._exactly(64))
        self.session = self.session or greeting.session
        return greeting

    def say(self, kind: str, stream: int = CONTROL, /, **fields: object) -> None:
        self.frame(MESSAGE, stream, json.dumps({"type": kind, **fields}).encode())

    def frame(
        self,
        kind: int,
        stream: int,
        payload: bytes,
        *,
        flags: int = 0,
        length: int | None = None,
        checksum: int | None = None,
    ) -> None:
        number, link = self._sent.get(stream) or self._first(stream, own=True)
        length = len(payload) if length is None else length
        checksum = _xxh3(payload) if checksum is None else checksum
        numbers = (number, length, checksum)
        header = _linked(_HEADER.pack(b"VMse", kind, flags, stream, *numbers, bytes(24)), link)
        self._sent[stream] = number + 1, int.from_bytes(header[56:], "little")
        self.socket.sendall(header + payload + bytes(-len(payload) % 64))

    def next(self) -> Frame:
        header = self._exactly(64)
        magic, kind, flags, stream, number, length, checksum, reserved = _HEADER.unpack(header[:56])
        _must(magic == b"VMse", "magic of a frame")
        wanted, link = self._heard.get(stream) or self._first(stream, own=False)
        _must(header == _linked(header[:56], link), "link")
        _must(number == wanted and not any(reserved), "number, or reserved bytes")
        _must(kind in LARGEST and 0 < length <= LARGEST[kind], "kind, or length")
        _must(not flags & ~(PRE_COPY | CONTINUED if kind in {DATA, ZEROS} else 0), "flags")
        self._heard[stream] = number + 1, int.from_bytes(header[56:], "little")
        payload = b"" if kind == ZEROS else self._exactly(length)
        _must(not any(self._exactly(-len(payload) % 64)), "padding")
        if kind in {MESSAGE, PROBE}:
            _must(_xxh3(payload) == checksum, "checksum of a payload")
        return Frame(kind, flags, stream, length, checksum, payload)

    def _first(self, stream: int, *, own: bool) -> tuple[int, int]:
        return 0, _xxh3(self.session, 2 * stream + (own == self._from_source))

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = self.socket.recv(count - len(found))
            if not piece:
                raise Gone(f"after {len(found)} of {count} bytes")
            found += piece
        return bytes(found)


def part(connections: Sequence[Connection]) -> None:
    """End all connections, and then read until the other has."""
    for connection in connections:
        connection.socket.shutdown(socket.SHUT_WR)
    for connection in connections:
        while connection.socket.recv(65536):
            pass


def entry(name: str, **values: object) -> dict[str, object]:
    """Return one device of a hello, about which nothing is known but what is given."""
    given: dict[str, object] = {
        "name": name,
        "protocol": "v2",
        "capabilities": [],
        "stop_copy_length": None,
        "identity": dict.fromkeys(_IDENTITY + _SUBSYSTEM, ""),
    }
    return given | values


@dataclass
class _Device:
    """A device in RESUMING: what was written to it."""

    state: bytearray = field(default_factory=bytearray)
    digest: Any = field(default_factory=xxhash.xxh3_64)
    pre_copy: int = 0
    zeros: int = 0
    ended: bool = False

    def take(self, frame: Frame) -> None:
        _must(not self.ended, "state behind the end")
        self.state += frame.state
        self.digest.update(frame.state)
        self.pre_copy += frame.length * bool(frame.flags & PRE_COPY)
        self.zeros += frame.length * (frame.kind == ZEROS)
        _must(self.digest.intdigest() == frame.checksum, "running digest")

    def end(self, device_bytes: int, digest: str) -> None:
        _must((device_bytes, digest) == (len(self.state), self.digest.hexdigest()), "end")
        self.ended = True


class Destination:
    """A destination that holds what it gets, and may refuse to play on.

    heard: the types of all messages, in order, "mark" and "end" with their device. connect gives
    the next connection of the source.
    """

    def __init__(self, connect: Callable[[], socket.socket], devices: int) -> None:
        self._connect, self._count = connect, devices
        self.devices = [_Device() for _ in range(devices)]
        self.heard: list[str] = []
        self.last: dict[str, dict[str, Any]] = {}
        self.probed = 0
        self.connections: list[Connection] = []

    @property
    def control(self) -> Connection:
        return self.connections[0]

    def meet(self, **hello: object) -> None:
        """Greet, hear the hello, answer it, and let further connections in."""
        first, greeting = self._greet()
        _must((greeting.index, greeting.token) == (0, bytes(16)), "connection 0")
        said = first.next().message
        _must(said["type"] == "hello" and len(said["devices"]) == self._count, "hello")
        self.last["hello"] = said
        token = os.urandom(16)
        entries = [entry(f"oracle{index}") for index in range(self._count)]
        first.say("hello", tool="oracle", devices=entries, token=token.hex(), **hello)
        for index in range(1, greeting.count):
            other = self._greet()[1]
            wanted = (greeting.session, index, greeting.count, token)
            _must((other.session, other.index, other.count, other.token) == wanted, "connection")

    def _greet(self) -> tuple[Connection, Greeting]:
        connection = Connection(self._connect(), from_source=False)
        greeting = connection.greeted()
        connection.greet(Greeting(greeting.session, greeting.index, greeting.count))
        self.connections.append(connection)
        return connection, greeting

    def take_all(self) -> None:
        """Say resuming after begin, and take everything up to the last end."""
        self.until("begin")
        self.control.say("resuming")
        for _ in self._frames():
            if all(device.ended for device in self.devices):
                return

    def ready(self) -> None:
        counts = [len(device.state) for device in self.devices]
        digests = [device.digest.hexdigest() for device in self.devices]
        self.control.say("ready", device_bytes=counts, digests=digests, commit_ns=0)

    def done(self) -> None:
        self.control.say("done", ran_after_ns=0, fixed_ns=0, stopped_ns=0)

    def until(self, kind: str) -> dict[str, Any]:
        """Read on until this message of the control stream."""
        for frame in self._frames():
            if frame.kind == MESSAGE and frame.message["type"] == kind:
                return frame.message
        raise Gone(f"before {kind}")

    def run(self, **hello: object) -> None:
        """Play the whole part."""
        self.meet(**hello)
        self.take_all()
        self.ready()
        self.until("go")
        self.done()
        self.until("bye")
        part(self.connections)

    def _frames(self) -> Iterator[Frame]:
        """Yield frames of all connections as they come, each when it was heeded."""
        sockets = {connection.socket: connection for connection in self.connections}
        while True:
            for sock in select.select(list(sockets), [], [])[0]:
                frame = sockets[sock].next()
                self._heed(frame)
                yield frame

    def _heed(self, frame: Frame) -> None:
        if frame.kind == PROBE:
            self.probed += frame.length
        elif frame.kind != MESSAGE:
            _must("begin" in self.heard, "state before begin")
            self.devices[frame.stream].take(frame)
            self.control.say("progress", loaded_bytes=[len(each.state) for each in self.devices])
        elif frame.stream == CONTROL:
            said = frame.message
            self.heard.append(said["type"])
            self.last[said["type"]] = said
        else:
            self._heed_device(frame.stream, frame.message)

    def _heed_device(self, index: int, said: dict[str, Any]) -> None:
        self.heard.append(f"{said['type']} {index}")
        if said["type"] == "mark":
            self.control.say("marked", device=index, number=said["number"])
        else:
            _must(said["type"] == "end" and "stopping" in self.heard, "end")
            self.devices[index].end(said["device_bytes"], said["digest"])


class Source:
    """A source of devices that hold the states given. connect gives a connection to the other."""

    def __init__(
        self, connect: Callable[[], socket.socket], states: Sequence[bytes], connections: int = 1
    ) -> None:
        self._states, self._digests = states, [xxhash.xxh3_64() for _ in states]
        self._sent = [0] * len(states)
        self._connect, self._count = connect, connections
        self.session = os.urandom(16)
        self.connections: list[Connection] = []
        self.last: dict[str, dict[str, Any]] = {}

    @property
    def control(self) -> Connection:
        return self.connections[0]

    def meet(self, devices: Sequence[dict[str, object]] | None = None) -> None:
        self._greet(0, bytes(16))
        entries = devices or [entry(f"oracle{index}") for index in range(len(self._states))]
        self.control.say("hello", tool="oracle", devices=entries)
        token = bytes.fromhex(self.hear("hello")["token"])
        for index in range(1, self._count):
            self._greet(index, token)

    def _greet(self, index: int, token: bytes) -> None:
        connection = Connection(self._connect(), from_source=True)
        connection.greet(Greeting(self.session, index, self._count, token))
        wanted = (self.session, index, self._count, bytes(16))
        found = connection.greeted()
        _must((found.session, found.index, found.count, found.token) == wanted, "greeting")
        self.connections.append(connection)

    def begin(self, lease_ns: int = 30_000_000_000) -> None:
        self.control.say("begin", lease_ns=lease_ns)
        self.hear("resuming")

    def hear(self, kind: str) -> dict[str, Any]:
        """Read on until this message. A fail in its stead is what the other end refuses for."""
        while True:
            frame = self.control.next()
            _must(frame.stream == CONTROL, "a frame of a device from a destination")
            said = frame.message
            self.last[said["type"]] = said
            if said["type"] == kind:
                return said
            if said["type"] == "fail":
                raise Refused(f"{said['code']}: {said['message']}")

    def of(self, device: int) -> Connection:
        return self.connections[device % self._count]

    def give(self, device: int, length: int, *, flags: int = 0, damaged: bool = False) -> None:
        """Send so many bytes of a device's state, as one frame."""
        at = self._sent[device]
        piece = self._states[device][at : at + length]
        if not piece:
            return
        self._sent[device] += len(piece)
        self._digests[device].update(piece)
        checksum = self._digests[device].intdigest()
        if any(piece):
            payload = bytes([piece[0] ^ 1]) + piece[1:] if damaged else piece
            self.of(device).frame(DATA, device, payload, flags=flags, checksum=checksum)
        else:
            size = len(piece)
            self.of(device).frame(ZEROS, device, b"", flags=flags, length=size, checksum=checksum)

    def round(self, number: int, length: int) -> None:
        """Send so much of every device, and wait until all have it."""
        for device in range(len(self._states)):
            self.give(device, length, flags=PRE_COPY)
            self.of(device).say("mark", device, number=number)
        for _ in self._states:
            _must(self.hear("marked")["number"] == number, "marked")

    def stop(self, piece: int = 100_000) -> None:
        """Send all that is left, and the ends; then the destination must be ready."""
        self.control.say("stopping", expected_downtime_ns=0)
        for device, state in enumerate(self._states):
            while self._sent[device] < len(state):
                self.give(device, piece)
            self.end(device)

    def end(self, device: int) -> None:
        digest = self._digests[device].hexdigest()
        self.of(device).say("end", device, device_bytes=self._sent[device], digest=digest)

    def ready(self) -> None:
        said = self.hear("ready")
        ours = list(zip(self._sent, (each.hexdigest() for each in self._digests), strict=True))
        _must(list(zip(said["device_bytes"], said["digests"], strict=True)) == ours, "ready")

    def go(self) -> None:
        self.control.say("go")
        self.hear("done")

    def part(self) -> None:
        rates = [0] * len(self._states)
        times = {"downtime_ns": 3, "downtime_error_ns": 2, "source_downtime_ns": 5}
        self.control.say("bye", rates=rates, **times)
        part(self.connections)

    def run(self, rounds: int = 0, length: int = 100_000) -> None:
        """Play the whole part."""
        self.meet()
        self.begin()
        for number in range(1, rounds + 1):
            self.round(number, length)
        self.stop()
        self.ready()
        self.go()
        self.part()


def read_journal(content: bytes) -> list[dict[str, Any]]:
    """Return the events of a journal. Raises Refused for a damaged one."""
    lines, events, chain = content.rstrip(b" ").splitlines(keepends=True), [], 0
    for line in lines:
        head, mark, tail = line.rpartition(b',"sum":"')
        _must(mark != b"" and line.endswith(b'"}\n'), "a line")
        chain = _xxh3(head + b"}", chain)
        _must(tail == b'%016x"}\n' % chain, "sum")
        events.append(json.loads(line))
    _must(events[0]["format"] == 1 and events[0]["size"] == len(content), "begun")
    return events
