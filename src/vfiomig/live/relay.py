"""What keeps a TLS socket out of the copy loop: a thread between it and a plain descriptor.

The session reads and writes one end of a UNIX socket pair; the thread is at the other end, and at
the TLS socket. One thread, because an SSL object must not be used by two at once.
"""

import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vfiomig.errors import CancelledError
from vfiomig.threads import start_thread

if TYPE_CHECKING:
    import ssl

_BUFFER_BYTES = 256 << 10
# How long the end of a connection may take: the last bytes, and the peer's own end.
LINGER_NS = 2_000_000_000


def is_ready(fd: int, events: int, ends_ns: int, wake_fd: int = -1) -> bool:
    """Wait for one of events (poll(2)). False once ends_ns has come; 0: never.

    Raises CancelledError once wake_fd is readable.
    """
    waiter = select.poll()
    waiter.register(fd, events)
    if wake_fd >= 0:
        waiter.register(wake_fd, select.POLLIN)
    left_ms = (ends_ns - time.monotonic_ns()) / 1e6 if ends_ns else None
    # Nothing is ready too late: a peer that sends on and on would never be given up.
    ready = [fd for fd, _ in waiter.poll(left_ms)] if left_ms is None or left_ms > 0 else []
    if wake_fd in ready:
        raise CancelledError("cancelled")
    return bool(ready)


class Relay:
    """Owns a TLS socket that has shaken hands, and the thread between it and fileno().

    failure: what ended it, other than the two ends themselves; None before.
    """

    def __init__(self, secured: "ssl.SSLSocket") -> None:
        """Take over secured, also where this fails. Raises OSError."""
        self._secured = secured
        try:
            self._near, self._far = socket.socketpair()
        except OSError:
            secured.close()
            raise
        self._far.settimeout(0)
        self.failure: Exception | None = None
        self._thread: threading.Thread = start_thread(self._run, "vfiomig tls")

    def detach(self) -> socket.socket:
        """Return the plain end, which is then the caller's."""
        return self._near

    def join(self) -> None:
        """Wait until the last bytes have left, once the plain end was shut down; 2 s at most."""
        self._thread.join(LINGER_NS / 1e9)
        if self._thread.is_alive():  # the peer does not read: what is left is lost
            self.abort()
            self._thread.join()

    def abort(self) -> None:
        """End the connection at once, whatever is still to be sent."""
        with suppress(OSError):
            socket.socket.shutdown(self._secured, socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._relay()
        except OSError as err:  # ssl.SSLError is one
            self.failure = err
        finally:
            self._secured.close()
            self._far.close()

    def _relay(self) -> None:
        outward, inward = _Pipe(), _Pipe()
        while not (outward.has_ended and not outward.left):
            self._wait(outward, inward)
            inward.fill(self._secured.recv_into)
            inward.drain(self._far.send)
            if inward.has_ended and not inward.left and not inward.is_passed_on:
                inward.is_passed_on = True
                with suppress(OSError):
                    self._far.shutdown(socket.SHUT_WR)
            outward.fill(self._far.recv_into)
            outward.drain(self._secured.send)
        self._part()

    def _wait(self, outward: "_Pipe", inward: "_Pipe") -> None:
        if inward.wants_more and self._secured.pending():
            return
        waiter = select.poll()
        plain = select.POLLIN * outward.wants_more | select.POLLOUT * bool(inward.left)
        secured = select.POLLIN * inward.wants_more | select.POLLOUT * bool(outward.left)
        for sock, events in ((self._far, plain), (self._secured, secured)):
            # poll(2) tells that an end has gone even if nobody asks, again and again.
            if events:
                waiter.register(sock.fileno(), events)
        waiter.poll()

    def _part(self) -> None:
        """Say that this was all, and wait a little until the peer has taken it."""
        import ssl

        ends_ns, is_said = time.monotonic_ns() + LINGER_NS, False
        with suppress(OSError, ValueError):
            while not is_said:
                try:
                    self._secured.unwrap()  # says close_notify; the answer is not waited for
                    is_said = True
                except ssl.SSLWantWriteError:
                    is_said = not is_ready(self._secured.fileno(), select.POLLOUT, ends_ns)
        linger(self._secured, ends_ns)


class _Pipe:
    """One direction of a relay: at most one buffer of bytes that were read and not yet written."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self.has_ended = self.is_passed_on = False

    @property
    def left(self) -> int:
        """Bytes that are still to be written."""
        return self._end - self._start

    @property
    def wants_more(self) -> bool:
        """Whether it has room, and more may come."""
        return not self.left and not self.has_ended

    def fill(self, receive: Any) -> None:  # noqa: ANN401  recv_into of either socket
        """Read what is there, while there is room: TLS gives at most 16 KiB a call."""
        if not self.wants_more:
            return
        self._start = self._end = 0
        while self._end < _BUFFER_BYTES and not self.has_ended:
            got = _if_ready(lambda: receive(self._memory[self._end :]))
            if got is None:
                return
            self.has_ended = got == 0
            self._end += got

    def drain(self, send: Any) -> None:  # noqa: ANN401  send of either socket
        """Write once, if there is something to write and room for it."""
        if self.left:
            self._start += _if_ready(lambda: send(self._memory[self._start : self._end])) or 0


def _if_ready(call: Any) -> int | None:  # noqa: ANN401
    import ssl

    try:
        return int(call())
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None


def linger(sock: socket.socket, ends_ns: int) -> None:
    """End a connection so that the peer gets all that was sent: read on until it ends as well.

    A close with bytes unread would be a reset, which takes what was sent from the peer (tcp(7)).
    """
    raw = socket.socket  # below TLS, whose end was said already
    with suppress(OSError):
        sock.settimeout(0)
        raw.shutdown(sock, socket.SHUT_WR)
        while is_ready(sock.fileno(), select.POLLIN, ends_ns):
            if not raw.recv(sock, _BUFFER_BYTES):
                return
