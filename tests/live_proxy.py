"""A bad link: it stands between the two ends of a session, knows the frames, and does one wrong."""

import json
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum, auto
from types import TracebackType
from typing import NamedTuple, Self

from vfiomig.live import wire
from vfiomig.live.wire import Kind

# Sent when the clock says so and not when the session does: passed on, and never counted.
PULSE = frozenset({"status", "progress"})
_RECORD_BYTES = 5
_RESET = struct.pack("ii", 1, 0)  # struct linger: on, and no time at all


class Wrong(StrEnum):
    """What a link may do. The first five at a byte, and for good; the others to one frame."""

    CUT = auto()  # both ends read an end of file
    RESET = auto()  # both ends get ECONNRESET; TCP only
    HALF = auto()  # who hears this direction reads an end of file, the other direction goes on
    SILENCE = auto()  # nobody hears anything more, not even that the other has gone
    MUTE = auto()  # ... of this direction
    DELAY = auto()
    DUPLICATE = auto()
    DROP = auto()
    SWAP = auto()  # with the frame behind it
    FLIP = auto()  # one bit


FOR_GOOD = frozenset({Wrong.CUT, Wrong.RESET, Wrong.HALF, Wrong.SILENCE, Wrong.MUTE})


class Trouble(NamedTuple):
    """What goes wrong once. sender: whose bytes. frame: which of them, as Proxy.seen names it.

    at: of what is for good, how many bytes more than that frame still pass; negative: fewer, modulo
    its size. Of FLIP: which byte of it, modulo its size. delay_ns: of DELAY.
    """

    wrong: Wrong
    sender: str
    frame: str
    at: int = 0
    delay_ns: int = 0


@dataclass
class _Way:
    """One direction. passed_bytes: what was read of it in whole frames; limit_bytes: of trouble."""

    sender: str
    source: socket.socket
    sink: socket.socket
    buffer: bytearray = field(default_factory=bytearray)
    counts: Counter[str] = field(default_factory=Counter)
    is_greeted: bool = False
    is_tls: bool = False
    is_open: bool = True
    is_mute: bool = False
    held: bytes = b""
    passed_bytes: int = 0
    limit_bytes: int | None = None

    def frames(self) -> Iterator[tuple[str, bytes]]:
        """Yield the whole frames that have come, each with its name, and take them away."""
        while (size := self._size()) and len(self.buffer) >= size:
            frame = bytes(self.buffer[:size])
            del self.buffer[:size]
            yield self._name(frame), frame

    def _size(self) -> int:
        if self.is_tls:  # RFC 8446, 5.1: a type, a version, a length
            return _RECORD_BYTES + int.from_bytes(self.buffer[3:5], "big")
        if not self.is_greeted:
            return wire.GREETING_BYTES
        if len(self.buffer) < wire.HEADER_BYTES:
            return 0
        length = int.from_bytes(self.buffer[16:24], "little")
        carried = 0 if self.buffer[4] == Kind.ZEROS else -(-length // wire.ALIGN) * wire.ALIGN
        return wire.HEADER_BYTES + carried

    def _name(self, frame: bytes) -> str:
        name = "record" if self.is_tls else "greeting"
        if self.is_greeted and not self.is_tls:
            name = Kind(frame[4]).name.lower()
            if frame[4] == Kind.MESSAGE:
                length = int.from_bytes(frame[16:24], "little")
                name = json.loads(frame[64 : 64 + length])["type"]
            stream = wire.stream_of(frame)
            name += f" {stream}" if stream != wire.CONTROL else ""
        self.is_greeted = True
        self.counts[name] += 1
        return f"{name}#{self.counts[name]}" if self.counts[name] > 1 else name


class Proxy:
    """A link that a source has at near and a destination at far, until both have ended it.

    Who takes near and far closes them; leave the with block when that is done.
    seen: the frames that have come, as (sender, name), without those of the pulse; the second of a
    name is "NAME#2". sizes: of each in bytes. delivered: those that were passed on whole and
    undamaged. has_happened: whether the trouble has come to pass.
    """

    def __init__(self, trouble: Trouble | None = None, *, tcp: bool = False) -> None:
        pair = tcp_pair if tcp else socket.socketpair
        self.near, source = pair()
        self.far, destination = pair()
        self._begin(trouble, source, destination)

    @classmethod
    def between(
        cls,
        source: socket.socket,
        destination: socket.socket,
        trouble: Trouble | None,
        *,
        tls: bool,
    ) -> Self:
        """Return a link of which both sides are connected already. Takes these two over.

        tls: what comes are records, which are named "record", "record#2" and so on.
        """
        self = cls.__new__(cls)
        self.near, self.far = source, destination
        self._begin(trouble, source, destination)
        for way in self._ways:
            way.is_tls = tls
        return self

    def _begin(
        self, trouble: Trouble | None, source: socket.socket, destination: socket.socket
    ) -> None:
        self._trouble = trouble
        self._ways = [
            _Way("source", source, destination),
            _Way("destination", destination, source),
        ]
        self.seen: list[tuple[str, str]] = []
        self.sizes: dict[tuple[str, str], int] = {}
        self.delivered: set[tuple[str, str]] = set()
        self.has_happened = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while ways := {way.source: way for way in self._ways if way.is_open}:
            for sock in select.select(list(ways), [], [])[0]:
                if ways[sock].is_open:
                    self._move(ways[sock])
        for way in self._ways:
            way.source.close()

    def _move(self, way: _Way) -> None:
        try:
            data = way.source.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            return self._end(way)
        way.buffer += data
        for name, frame in way.frames():
            if name.partition("#")[0] not in PULSE:
                self.seen.append((way.sender, name))
                self.sizes[way.sender, name] = len(frame)
            self._take(way, name, frame)
        return None

    def _take(self, way: _Way, name: str, frame: bytes) -> None:
        held, way.held = way.held, b""
        trouble, is_intact = self._trouble, True
        if trouble is not None and (trouble.sender, trouble.frame) == (way.sender, name):
            if trouble.wrong in FOR_GOOD:
                more = trouble.at if trouble.at >= 0 else trouble.at % len(frame) - len(frame)
                way.limit_bytes = way.passed_bytes + len(frame) + more
            else:
                self.has_happened = True
                is_intact = trouble.wrong not in (Wrong.DROP, Wrong.FLIP)
                frame = self._spoiled(way, trouble, frame)
        if self._pass(way, frame + held) and is_intact:
            self.delivered.add((way.sender, name))

    def _spoiled(self, way: _Way, trouble: Trouble, frame: bytes) -> bytes:
        match trouble.wrong:
            case Wrong.DELAY:
                time.sleep(trouble.delay_ns / 1e9)  # that is what a slow link does
            case Wrong.DUPLICATE:
                return frame + frame
            case Wrong.DROP:
                return b""
            case Wrong.SWAP:
                way.held = frame
                return b""
            case Wrong.FLIP:
                at = trouble.at % len(frame)
                return frame[:at] + bytes([frame[at] ^ 1 << at % 8]) + frame[at + 1 :]
        return frame

    def _pass(self, way: _Way, data: bytes) -> bool:
        """Pass on what still may, and return whether that was all."""
        left = len(data) if way.limit_bytes is None else way.limit_bytes - way.passed_bytes
        is_whole = not way.is_mute and left >= len(data)
        way.passed_bytes += len(data)
        if not way.is_mute:
            _write(way.sink, data[:left])
        if way.limit_bytes is not None and way.limit_bytes <= way.passed_bytes:
            self.has_happened, way.limit_bytes = True, None
            self._break(way)
        return is_whole

    def _break(self, way: _Way) -> None:
        assert self._trouble is not None
        wrong = self._trouble.wrong
        way.is_mute = True
        if wrong is Wrong.HALF:
            _end_writing(way.sink)
        elif wrong is Wrong.SILENCE:
            for each in self._ways:
                each.is_mute = True
        elif wrong in (Wrong.CUT, Wrong.RESET):
            for each in self._ways:
                each.is_open, each.is_mute = False, True
                if wrong is Wrong.RESET:
                    each.sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.sink.close()

    def _end(self, way: _Way) -> None:
        way.is_open = False
        if not way.is_mute:
            _write(way.sink, way.held + way.buffer)
            _end_writing(way.sink)
        elif self._trouble is not None and self._trouble.wrong is Wrong.SILENCE:
            # It has given up by itself, and would now wait for an end: that would be two seconds.
            _end_writing(way.source)


def _write(sink: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # nobody is there any more
        sink.sendall(data)


def _end_writing(sink: socket.socket) -> None:
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection within this host."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


class Relay:
    """A link of several connections, from one UNIX socket to another. trouble: on that of index.

    A source dials path; whoever listens at target gets it. links: as they came.
    """

    def __init__(
        self, path: str, target: str, trouble: Trouble, index: int = 0, *, tls: bool = False
    ) -> None:
        self._target, self._trouble, self._index, self._tls = target, trouble, index, tls
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self.links: list[Proxy] = []
        self._thread = threading.Thread(target=self._accept_on)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    def _accept_on(self) -> None:
        with ExitStack() as stack, suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                onward = socket.socket(socket.AF_UNIX)
                onward.connect(self._target)
                trouble = self._trouble if len(self.links) == self._index else None
                self.links.append(Proxy.between(caller, onward, trouble, tls=self._tls))
                stack.enter_context(self.links[-1])
