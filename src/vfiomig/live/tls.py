"""TLS 1.3 between the two ends: both prove who they are, and the copy loop sees plain descriptors.

The session reads and writes one end of a UNIX socket pair; a thread of the relay is at the other
end, and at the TLS socket. One thread, because an SSL object must not be used by two at once.
"""

import os
import select
import socket
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfiomig.errors import AuthenticationError, CancelledError, PeerError
from vfiomig.threads import start_thread

if TYPE_CHECKING:
    import ssl

_BUFFER_BYTES = 256 << 10
# How long the end of a connection may take: the last bytes, and the peer's own end.
LINGER_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A directory with ca-cert.pem, {server,client}-cert.pem and -key.pem: QEMU's names for them.

    peers: the names that a peer's certificate may bear (DNS names, addresses or URIs of its subject
    alternative name, else its common name). Empty: who dials demands the host that was dialed, who
    listens accepts whomever the CA has signed.
    """

    directory: Path
    peers: frozenset[str] = frozenset()

    def context(self, role: str) -> "ssl.SSLContext":
        """Return the context of a "client" (who dials) or a "server". Raises AuthenticationError.

        No session tickets: a server that sends them before a client closes at once makes the
        client's last bytes be lost (measured: 3 MB of 512 MiB).
        """
        import ssl

        purpose = ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER
        context = ssl.SSLContext(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # done here: an allow-list may be longer than one name
        context.verify_mode = ssl.CERT_REQUIRED
        if role == "server":
            context.num_tickets = 0
        key = self._readable(f"{role}-key.pem", private=True)
        certificate = self._readable(f"{role}-cert.pem")
        authority = self._readable("ca-cert.pem")
        try:
            context.load_verify_locations(cafile=authority)
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as err:
            raise AuthenticationError(
                f"the certificates in {self.directory} cannot be used: {_reason(err)}",
                hint="the key must be that of the certificate, without a passphrase, in PEM",
            ) from err
        return context

    def _readable(self, name: str, *, private: bool = False) -> str:
        path = self.directory / name
        try:
            mode = os.stat(path).st_mode
            with open(path, "rb"):
                pass
        except OSError as err:
            raise AuthenticationError(
                f"cannot read {path}: {err.strerror}",
                hint="--tls-dir needs ca-cert.pem, and server- or client-cert.pem and -key.pem",
            ) from err
        if private and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise AuthenticationError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return str(path)


def handshake(
    plain: socket.socket, files: TlsFiles, *, host: str | None, ends_ns: int, wake_fd: int
) -> tuple["ssl.SSLSocket", str]:
    """Become TLS on a connected socket. host: what was dialed; None: we listen.

    Returns the socket, which is the caller's (plain is used up), and the peer's name. Raises
    AuthenticationError, PeerError, CancelledError once wake_fd is readable.
    """
    import ssl

    context = files.context("server" if host is None else "client")
    plain.settimeout(0)
    try:
        secured = context.wrap_socket(
            plain,
            server_side=host is None,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
            server_hostname=host,
        )
    except (OSError, ValueError) as err:
        raise PeerError(f"TLS cannot begin: {_reason(err)}") from err
    try:
        while True:
            try:
                secured.do_handshake()
                break
            except ssl.SSLWantReadError:
                _await(secured, select.POLLIN, ends_ns, wake_fd)
            except ssl.SSLWantWriteError:
                _await(secured, select.POLLOUT, ends_ns, wake_fd)
        return secured, _check_name(secured, files, host)
    except ssl.SSLError as err:
        secured.close()
        raise AuthenticationError(
            f"the TLS handshake failed: {_reason(err)}",
            hint="both ends need TLS 1.3, and certificates of one CA; is TLS on at both?",
        ) from err
    except OSError as err:
        secured.close()
        raise PeerError(f"the TLS handshake broke off: {_reason(err)}", errno=err.errno) from err
    except BaseException:
        secured.close()
        raise


def _await(sock: socket.socket, events: int, ends_ns: int, wake_fd: int) -> None:
    waiter = select.poll()
    waiter.register(sock.fileno(), events)
    if wake_fd >= 0:
        waiter.register(wake_fd, select.POLLIN)
    left_ms = (ends_ns - time.monotonic_ns()) // 1_000_000
    ready = [fd for fd, _ in waiter.poll(left_ms)] if left_ms > 0 else []
    if wake_fd in ready:
        raise CancelledError("cancelled")
    if not ready:
        raise PeerError("the TLS handshake was not over in time")


def _check_name(secured: "ssl.SSLSocket", files: TlsFiles, host: str | None) -> str:
    names = _names(secured.getpeercert() or {})
    allowed = files.peers or ({host} if host is not None else set(names))
    if not any(_fits(name, wanted) for name in names for wanted in allowed):
        raise AuthenticationError(
            f"the peer is {' or '.join(names) or 'nobody'}, and not {' or '.join(sorted(allowed))}",
            hint="--tls-peer names who may be there, as its certificate does",
        )
    return names[0]


def _names(certificate: dict[str, Any]) -> list[str]:
    kinds = ("DNS", "IP Address", "URI")
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in kinds]
    if not names:
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        names = [value for key, value in subject if key == "commonName"]
    return names


def _fits(name: str, wanted: str) -> bool:
    name, wanted = name.lower(), wanted.lower()
    if name.startswith("*."):  # one label, as RFC 6125 has it
        return wanted.partition(".")[2] == name[2:]
    return name == wanted


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _reason(err: BaseException) -> str:
    return str(getattr(err, "verify_message", "") or getattr(err, "reason", "") or err)


class Relay:
    """Owns a TLS socket that has shaken hands, and the thread between it and fileno().

    failure: what ended it, other than the two ends themselves; None before.
    """

    def __init__(self, secured: "ssl.SSLSocket") -> None:
        self._secured = secured
        self._near, self._far = socket.socketpair()
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
        waiter.register(self._far.fileno(), plain)
        waiter.register(self._secured.fileno(), secured)
        waiter.poll()

    def _part(self) -> None:
        """Say that this was all, and wait a little until the peer has taken it."""
        ends_ns = time.monotonic_ns() + LINGER_NS
        with suppress(OSError, ValueError):
            self._secured.unwrap()  # says close_notify; the answer is not waited for
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
    raw = socket.socket(fileno=os.dup(sock.fileno()))
    with raw, suppress(OSError):
        raw.settimeout(0)
        raw.shutdown(socket.SHUT_WR)
        waiter = select.poll()
        waiter.register(raw.fileno(), select.POLLIN)
        while (left_ms := (ends_ns - time.monotonic_ns()) // 1_000_000) > 0:
            if waiter.poll(left_ms) and not raw.recv(_BUFFER_BYTES):
                return
