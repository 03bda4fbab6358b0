"""One connection at work: frames of several streams out of it and into it, whoever is at the end.

Every stream has its own numbers and its own chain of checksums; whole frames of them alternate.
"""

import errno
import os
import threading
import time
from collections.abc import Callable

from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader, Template, Turns, xxh3_64
from vfiomig.errors import CancelledError, MigrationError, PeerError
from vfiomig.framing.native import FrameFlag
from vfiomig.live import messages, wire
from vfiomig.live.connection import Connection
from vfiomig.live.messages import Message
from vfiomig.live.wire import CONTROL, FrameHeader, Greeting, Kind
from vfiomig.worker import Cancellation


class Outbox:
    """The way out of a connection: its streams' writers take turns. say() from any thread."""

    def __init__(
        self, connection: Connection, session: bytes, last: Cancellation, *, from_source: bool
    ) -> None:
        """Borrow connection. last: ends what is said even where the peer does not read."""
        self._connection, self._session, self._from_source = connection, session, from_source
        self._turns, self._speaking = Turns(), threading.Lock()
        self._since_ns = 0
        self._control = self.writer(CONTROL, wire.MAX_MESSAGE_BYTES, last)
        self._template = wire.template(Kind.MESSAGE, CONTROL)

    def greet(self, greeting: Greeting) -> None:
        """Write the 64 bytes that every connection begins with. Raises PeerError."""
        try:
            self._control.put(greeting.encode())
        except OSError as err:
            raise self._connection.failed(err) from err

    def writer(
        self,
        stream: int,
        buffer_bytes: int,
        wake: Cancellation,
        *,
        ring_slots: int = 1,
        grown_bytes: int = 0,
    ) -> FrameWriter:
        """Return a writer for one stream, for one thread; it takes turns with the others."""
        writer = FrameWriter(
            self._connection.out_fd,
            buffer_bytes,
            wake_fd=wake.fileno(),
            ring_slots=ring_slots,
            grown_bytes=grown_bytes,
            turns=self._turns,
        )
        writer.chain = wire.first_chain(self._session, stream, from_source=self._from_source)
        return writer

    def say(self, message: Message) -> None:
        """Say something on the control stream. Blocks while the peer does not read.

        Raises PeerError; CancelledError when last ended it.
        """
        with self._speaking:
            self._since_ns = time.monotonic_ns()
            try:
                self._put(self._control, self._template, messages.encode(message))
            finally:
                self._since_ns = 0

    @property
    def stuck_ns(self) -> int:
        """How long what is being said has found no room; 0: nothing is. From any thread."""
        since_ns = self._since_ns
        return time.monotonic_ns() - since_ns if since_ns else 0

    def say_in(self, writer: FrameWriter, stream: int, message: Message) -> None:
        """Say something in the stream of a device, behind what was copied; by its own thread."""
        self._put(writer, wire.template(Kind.MESSAGE, stream), messages.encode(message))

    def probe(self, writer: FrameWriter, stream: int, count: int) -> None:
        """Send count bytes that the peer drops. The size is at most the writer's buffer."""
        self._put(writer, wire.template(Kind.PROBE, stream), bytes(count))

    def _put(self, writer: FrameWriter, template: Template, payload: bytes) -> None:
        try:
            writer.put_frame(template, payload)
        except OSError as err:
            if err.errno == errno.ECANCELED:
                raise CancelledError("cancelled") from err
            raise self._connection.failed(err) from err

    @property
    def out_fd(self) -> int:
        """The descriptor that is written to, still the connection's."""
        return self._connection.out_fd

    def failed(self, err: OSError) -> MigrationError:
        """Return what an OSError of out_fd means."""
        return self._connection.failed(err)

    @property
    def is_torn(self) -> bool:
        """Whether half a frame was left in the connection: then nothing more can be said."""
        return self._turns.is_torn

    def close(self) -> None:
        """Free what the control stream holds. The connection stays open."""
        self._control.close()


class Inbox:
    """The way in of a connection. One thread reads it, frame after frame."""

    def __init__(
        self,
        connection: Connection,
        wake: Cancellation,
        *,
        buffer_bytes: int,
        silence_ns: int,
        devices: int,
    ) -> None:
        """Borrow connection. silence_ns: how long to wait for a byte. devices: streams it has."""
        self._connection, self._devices = connection, devices
        self._reader = StreamReader(connection.in_fd, buffer_bytes, wake_fd=wake.fileno())
        self._reader.silence_ns = silence_ns
        self._numbers: dict[int, tuple[int, int]] = {}
        self._stream = CONTROL
        self._templates: dict[tuple[int, FrameFlag], Template] = {}
        self._copied, self._is_inside = CONTROL, False  # whose frame is not whole yet

    def greeting(self) -> Greeting:
        """Read the peer's greeting. Raises PeerError."""
        data = self._guarded(lambda: self._reader.take(wire.GREETING_BYTES))
        if not data:
            raise self._gone()
        return wire.decode_greeting(data, self._connection.name)

    def begin(self, session: bytes, *, from_source: bool) -> None:
        """Expect frames of this session, of the peer's role."""
        self._session, self._from_source = session, from_source
        self._reader.chain = wire.first_chain(session, CONTROL, from_source=from_source)

    def header(self) -> FrameHeader:
        """Wait for the next frame, check its header, and stay before it. Raises PeerError."""
        if self._is_inside:  # a write that failed, or a wait that was ended, left the rest of it
            self.go_on(-1, None, 1 << 62, 0, frames=1)
        data = self._guarded(lambda: self._reader.peek(wire.HEADER_BYTES))
        if len(data) < wire.HEADER_BYTES:
            raise self._gone()
        stream = wire.stream_of(data)
        if stream != CONTROL and stream >= self._devices:
            raise PeerError(f"{self._connection.name}: a frame of device {stream}: there is none")
        self._turn_to(stream)
        reader, name = self._reader, self._connection.name
        header = wire.decode_header(data, name, reader.sequence, reader.chain)
        if stream == CONTROL and header.kind in (Kind.DATA, Kind.ZEROS):
            raise PeerError(f"{name}: a frame of state, and of no device")
        return header

    def message(self, header: FrameHeader) -> Message:
        """Take the message of this header, the one that header() returned. Raises PeerError."""
        payload = self._payload(header)
        try:
            return messages.decode(payload)
        except ValueError as err:
            raise PeerError(f"{self._connection.name} says what cannot be: {err}") from err

    def drop(self, header: FrameHeader) -> None:
        """Take a PROBE frame."""
        self._payload(header)

    def copy(
        self, header: FrameHeader, data_fd: int, digest: Digest | None, limit: int, ends_ns: int
    ) -> Outcome:
        """Write the payload of this DATA or ZEROS frame, and of those like it, to data_fd.

        As StreamReader.copy(): after DEADLINE_REACHED go on with go_on(). -1: to nowhere. A write
        that fails raises its OSError; everything else about the peer raises PeerError.
        """
        self._copied = header.stream
        key = (header.stream, header.flags & FrameFlag.PRE_COPY)
        if key not in self._templates:
            self._templates[key] = wire.template(Kind.DATA, header.stream, flags=key[1])
        self._template = self._templates[key]
        return self.go_on(data_fd, digest, limit, ends_ns)

    def go_on(
        self, data_fd: int, digest: Digest | None, limit: int, ends_ns: int, *, frames: int = 0
    ) -> Outcome:
        """Go on with a copy that its deadline, or a write that failed, has ended."""
        self._is_inside = True
        try:
            outcome = self._reader.copy(
                data_fd, self._template, limit, digest, frames=frames, deadline_ns=ends_ns
            )
        except OSError as err:
            if data_fd >= 0 and self._reader.failed_fd == data_fd:
                raise
            raise self._failed(err) from err
        self._is_inside = outcome is Outcome.DEADLINE_REACHED
        if outcome is Outcome.END_OF_STREAM:
            raise self._gone()
        if outcome in (Outcome.DAMAGED, Outcome.PADDING_DAMAGED):
            raise PeerError(
                f"{self._connection.name}: the state in frame {self._reader.sequence - 1} of"
                f" device {self._copied} was damaged on its way"
            )
        return outcome

    @property
    def device_bytes(self) -> int:
        """Bytes of all devices that were copied so far."""
        return self._reader.device_bytes

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._reader.offset

    @property
    def zero_bytes(self) -> int:
        """Of device_bytes, those that travelled as runs of zeros."""
        return self._reader.zero_bytes

    def set_silence(self, silence_ns: int) -> None:
        """Wait so long for a byte, from the next wait on."""
        self._reader.silence_ns = silence_ns

    def wake_on(self, wake: Cancellation) -> None:
        """Let another cancellation end its waits: between two calls only."""
        self._reader.wake_fd = wake.fileno()

    def _turn_to(self, stream: int) -> None:
        if stream == self._stream:
            return
        reader = self._reader
        self._numbers[self._stream] = reader.sequence, reader.chain
        first = wire.first_chain(self._session, stream, from_source=self._from_source)
        reader.sequence, reader.chain = self._numbers.get(stream, (0, first))
        self._stream = stream

    def _payload(self, header: FrameHeader) -> bytes:
        reader = self._reader
        reader.chain = wire.next_chain(self._exactly(wire.HEADER_BYTES))
        reader.sequence += 1
        payload = self._exactly(header.length)
        padding = self._exactly(-header.length % wire.ALIGN)
        if any(padding) or xxh3_64(payload) != header.checksum:
            raise PeerError(f"{self._connection.name}: a {header.kind.name} frame is damaged")
        return payload

    def _exactly(self, count: int) -> bytes:
        data, most = b"", self._reader.buffer_bytes

        def take() -> bytes:
            return self._reader.take(min(count - len(data), most))

        while piece := self._guarded(take):
            data += piece
        if len(data) < count:
            raise self._gone()
        return data

    def _guarded(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except OSError as err:
            raise self._failed(err) from err

    def _failed(self, err: OSError) -> MigrationError:
        if err.errno == errno.ECANCELED:
            return CancelledError("cancelled")
        return self._connection.failed(err)

    def _gone(self) -> MigrationError:
        gone = OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return self._connection.failed(gone)
