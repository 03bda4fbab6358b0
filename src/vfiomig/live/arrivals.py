"""Who comes to a destination: the source, its further connections, and who is turned away."""

import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial

from vfiomig.errors import CancelledError, DeviceBusyError, MigrationError, PeerError
from vfiomig.live import wire
from vfiomig.live.address import Address
from vfiomig.live.connection import Connection, from_descriptors
from vfiomig.live.link import Inbox, Outbox
from vfiomig.live.listener import MAX_HANDSHAKES, Arrival, Listener, read_greeting
from vfiomig.live.options import ReceiveOptions
from vfiomig.live.relay import is_ready
from vfiomig.live.session import fail_of
from vfiomig.live.wire import Greeting
from vfiomig.threads import start_thread
from vfiomig.worker import Cancellation


class Arrivals:
    """Owns the listener, and every connection that nobody took. For the working thread.

    address: where it listens, as bound. on_stranger is told of those who were turned away, in
    threads of its own.
    """

    def __init__(
        self,
        address: Address,
        options: ReceiveOptions,
        cancellation: Cancellation,
        on_stranger: Callable[[str], None],
    ) -> None:
        """Begin to listen, unless address is descriptors. Raises MigrationError."""
        self.address, self._options = address, options
        self._cancellation, self._on_stranger = cancellation, on_stranger
        self._end = Cancellation()
        self._joining: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._session, self._token, self._missing = b"", b"", set[int]()
        self._listener: Listener | None = None
        self._turning: list[threading.Thread] = []
        with ExitStack() as made:
            made.callback(self._end.close)
            if not address.is_open:
                self._listener = Listener(
                    address,
                    tls=options.tls,
                    insecure=options.insecure,
                    handshake_ns=options.handshake_ns,
                    on_stranger=on_stranger,
                )
                self.address = self._listener.address
            made.pop_all()
        self._doorman: threading.Thread | None = None

    def first(self, stack: ExitStack, wait_ns: int) -> tuple[Connection, Greeting]:
        """Wait for a source. The connection is stack's. Raises PeerError when none came."""
        if self._listener is None:
            connection = from_descriptors(self.address, self._options.tls)
            stack.callback(connection.close)
            ends_ns, wake_fd = time.monotonic_ns() + wait_ns, self._cancellation.fileno()
            if not is_ready(connection.in_fd, select.POLLIN, ends_ns if wait_ns else 0, wake_fd):
                raise PeerError(f"no source came to {self.address} in time")
            ends_ns = time.monotonic_ns() + self._options.handshake_ns
            return connection, read_greeting(connection, ends_ns, wake_fd)
        ends_ns = time.monotonic_ns() + wait_ns
        while True:
            left_ns = max(ends_ns - time.monotonic_ns(), 1) if wait_ns else 0
            arrival = self._listener.next(self._cancellation.fileno(), left_ns)
            if arrival is None:
                raise PeerError(f"no source came to {self.address} in time")
            if arrival.greeting.index == 0:
                break
            self._turn_away(arrival)
        stack.callback(arrival.connection.close)
        self._doorman = start_thread(self._watch_the_door, "vfiomig doorman")
        return arrival

    def expect(self, session: bytes, token: bytes, count: int) -> None:
        """Let further connections of this session in: those who know the token, each once."""
        self._session, self._token = session, token
        self._missing = set(range(1, count))

    def others(self, stack: ExitStack, count: int) -> Iterator[tuple[Connection, Greeting]]:
        """Yield so many further connections, which are then stack's. Raises PeerError."""
        for _ in range(count):
            try:
                arrival = self._joining.get(timeout=self._options.handshake_ns / 1e9)
            except queue.Empty:
                raise PeerError("the source's further connections did not come in time") from None
            stack.callback(arrival.connection.close)
            yield arrival

    def _watch_the_door(self) -> None:
        assert self._listener is not None
        with suppress(CancelledError):
            while (arrival := self._listener.next(self._end.fileno())) is not None:
                greeting = arrival.greeting
                known = (greeting.session, greeting.token) == (self._session, self._token)
                if known and greeting.index in self._missing:
                    self._missing.discard(greeting.index)
                    self._joining.put(arrival)
                else:
                    self._turning = [thread for thread in self._turning if thread.is_alive()]
                    if len(self._turning) < MAX_HANDSHAKES:
                        job = partial(self._turn_away, arrival)
                        self._turning.append(start_thread(job, "vfiomig refusal"))
                    else:
                        arrival.connection.abandon()

    def _turn_away(self, arrival: Arrival) -> None:
        """Say that another migration is at work, once its hello is read: else it might be lost."""
        connection, session = arrival.connection, arrival.greeting.session
        busy = DeviceBusyError(
            "the receiver is at work on another migration",
            hint="wait until it is over, or start another receiver for other devices",
        )
        try:
            outbox = Outbox(connection, session, self._end, from_source=False)
            inbox = Inbox(
                connection,
                self._end,
                buffer_bytes=wire.MAX_MESSAGE_BYTES,
                silence_ns=self._options.handshake_ns,
                devices=wire.CONTROL,
            )
            inbox.begin(session, from_source=True)
            outbox.greet(Greeting(session, arrival.greeting.index, arrival.greeting.count))
            inbox.message(inbox.header())
            outbox.say(fail_of(busy, "hello"))
            outbox.close()
        except MigrationError as err:
            self._on_stranger(f"{connection.peer} was turned away: {err}")
        else:
            self._on_stranger(f"{connection.peer} was turned away: another migration is at work")
        connection.close()

    def close(self) -> None:
        """Stop listening, and close the connections that nobody took."""
        self._end.cancel()
        if self._doorman is not None:
            self._doorman.join()
        for thread in self._turning:
            thread.join()
        while not self._joining.empty():
            self._joining.get().connection.abandon()
        if self._listener is not None:
            self._listener.close()
        self._end.close()
