"""Where a destination listens: every caller shakes hands by itself, and strangers cost nobody."""

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

from vfiomig.errors import CancelledError, MigrationError, PeerError, StreamMismatchError
from vfiomig.fd import OwnedFd
from vfiomig.live.address import Address
from vfiomig.live.connection import Connection, local_failure, peer_of, resolved, tune
from vfiomig.live.relay import is_ready
from vfiomig.live.tls import TlsFiles
from vfiomig.live.wire import GREETING_BYTES, SESSION_BYTES, Greeting, decode_greeting
from vfiomig.threads import start_thread
from vfiomig.worker import Cancellation

# Ours: a port scan must not become as many threads.
MAX_HANDSHAKES = 8
# How long to leave a queue alone that cannot be served: no descriptor is free.
_PAUSE_MS = 100


class Arrival(NamedTuple):
    """Somebody who greeted as a source does. connection: whoever takes it owns it."""

    connection: Connection
    greeting: Greeting


class Listener:
    """Owns a listening socket, and its threads. next() in one thread; close() after it returned.

    on_stranger is told of those who were turned away here: what they did, a sentence; in threads of
    its own. address: as bound, so that a port 0 is known.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: TlsFiles | None,
        insecure: bool,
        handshake_ns: int,
        on_stranger: Callable[[str], None],
    ) -> None:
        """Listen. Raises UsageError, PeerError, AuthenticationError, LocalIOError,
        ResourceLimitError.
        """
        self._tls, self._handshake_ns, self._on_stranger = tls, handshake_ns, on_stranger
        if tls is not None:
            tls.context("server")  # found out now, and not when somebody comes
        self._end, self._busy = Cancellation(), set[threading.Thread]()
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        with ExitStack() as made:
            made.callback(self._end.close)
            self._bell = made.enter_context(_bell())
            ends_ns = time.monotonic_ns() + handshake_ns
            where = resolved(address, ends_ns, tls=tls, insecure=insecure)[0]
            self._socket, self._node = _listen(address, *where)
            self._path = address.path
            self.address = _bound(address, self._socket)
            made.pop_all()
        self._thread = start_thread(self._accept_on, "vfiomig listener")

    def next(self, wake_fd: int, timeout_ns: int = 0) -> Arrival | None:
        """Wait for somebody who greets as a source. None after timeout_ns (0: never).

        Raises CancelledError once wake_fd is readable.
        """
        waiter = select.poll()
        waiter.register(self._bell.fileno(), select.POLLIN)
        waiter.register(wake_fd, select.POLLIN)
        while True:
            with suppress(queue.Empty):
                return self._arrivals.get_nowait()
            ready = [fd for fd, _ in waiter.poll(timeout_ns / 1e6 if timeout_ns else None)]
            if wake_fd in ready:
                raise CancelledError("cancelled")
            if not ready:
                return None
            os.eventfd_read(self._bell.fileno())

    def _accept_on(self) -> None:
        waiter = select.poll()
        waiter.register(self._socket.fileno(), select.POLLIN)
        waiter.register(self._end.fileno(), select.POLLIN)
        while True:
            waiter.poll()
            if self._end.cancelled:
                return
            try:
                caller, _ = self._socket.accept()
            except OSError as err:
                self._on_stranger(f"somebody could not be let in: {err.strerror}")
                pause = select.poll()
                pause.register(self._end.fileno(), select.POLLIN)
                pause.poll(_PAUSE_MS)
                continue
            self._let_in(caller)

    def _let_in(self, caller: socket.socket) -> None:
        self._busy = {thread for thread in self._busy if thread.is_alive()}
        if len(self._busy) >= MAX_HANDSHAKES:
            self._on_stranger(f"{peer_of(caller)}: too many are at the door")
            caller.close()
            return
        try:
            self._busy.add(start_thread(lambda: self._meet(caller), "vfiomig handshake"))
        except RuntimeError as err:  # the limit of threads: the next one may be luckier
            self._on_stranger(f"{peer_of(caller)} could not be let in: {err}")
            caller.close()

    def _meet(self, caller: socket.socket) -> None:
        """Shake hands, and read the greeting: all of it within handshake_ns."""
        who = peer_of(caller)
        connection = Connection(f"{self.address} from {who}", who, caller)
        ends_ns = time.monotonic_ns() + self._handshake_ns
        try:
            tune(caller)
            if self._tls is not None:
                connection.secure(self._tls, None, ends_ns, self._end.fileno())
            greeting = read_greeting(connection, ends_ns, self._end.fileno())
        except CancelledError:
            connection.abandon()
        except StreamMismatchError as err:
            # A greeting of ours lets the other end say the same sentence, of us.
            with suppress(OSError):
                os.write(connection.out_fd, Greeting(bytes(SESSION_BYTES)).encode())
            connection.close()
            self._on_stranger(f"{who} was turned away: {err}")
        except (MigrationError, OSError) as err:
            connection.abandon()
            self._on_stranger(f"{who} was turned away: {err}")
        else:
            self._arrivals.put(Arrival(connection, greeting))
            os.eventfd_write(self._bell.fileno(), 1)

    def close(self) -> None:
        """Stop listening, and close those whom nobody took."""
        self._end.cancel()
        self._thread.join()
        for thread in self._busy:
            thread.join()
        self._socket.close()
        if self._node is not None:
            with suppress(OSError):
                if os.path.samestat(os.lstat(self._path), self._node):
                    os.unlink(self._path)
        while not self._arrivals.empty():
            self._arrivals.get().connection.abandon()
        self._bell.close()
        self._end.close()


def read_greeting(connection: Connection, ends_ns: int, wake_fd: int) -> Greeting:
    """Read the 64 bytes that a connection begins with, and not one more. ends_ns 0: for ever.

    Raises PeerError, CancelledError once wake_fd is readable.
    """
    data = b""
    while len(data) < GREETING_BYTES:
        if not is_ready(connection.in_fd, select.POLLIN, ends_ns, wake_fd):
            raise PeerError(f"{connection.name} did not greet in time")
        try:
            piece = os.read(connection.in_fd, GREETING_BYTES - len(data))
        except OSError as err:
            raise connection.failed(err) from err
        if not piece:
            break
        data += piece
    if not data:
        raise PeerError(f"{connection.name} came, and went without a word")
    return decode_greeting(data, connection.name)


def _bell() -> OwnedFd:
    try:
        return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as err:
        raise local_failure("no eventfd", err) from err


def _listen(
    address: Address, family: socket.AddressFamily, where: object
) -> tuple[socket.socket, os.stat_result | None]:
    """Return the listening socket, and the node that a UNIX socket has made."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as err:
        raise local_failure(f"cannot listen at {address}", err) from err
    try:
        if address.scheme == "unix":
            from vfiomig.lending import bind_privately

            bind_privately(sock, address.path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)  # type: ignore[arg-type]
        sock.listen()
        # A caller who has gone again must not make accept() wait.
        sock.settimeout(0)
        return sock, os.lstat(address.path) if address.scheme == "unix" else None
    except OSError as err:
        sock.close()
        raise local_failure(f"cannot listen at {address}", err) from err
    except BaseException:
        sock.close()
        raise


def _bound(address: Address, sock: socket.socket) -> Address:
    if address.scheme != "tcp":
        return address
    return address._replace(port=sock.getsockname()[1])
