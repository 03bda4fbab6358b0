"""One connection between two ends: dialed, taken from a listener, or given as descriptors.

What a session reads and writes are plain descriptors, whatever carries them.
"""

import errno
import ipaddress
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from vfiomig.errors import (
    AuthenticationError,
    LocalIOError,
    MigrationError,
    PeerError,
    ResourceLimitError,
    UsageError,
)
from vfiomig.fd import OwnedFd
from vfiomig.live.address import Address
from vfiomig.live.relay import LINGER_NS, Relay, is_ready, linger
from vfiomig.live.tls import TlsFiles, handshake
from vfiomig.threads import start_thread
from vfiomig.transport import UNIX_BYTES, FdStream

_UCRED = struct.Struct("=iII")  # struct ucred of include/linux/socket.h: pid, uid, gid
# Ours, as the silence of a session: what was sent and not acknowledged for so long has no reader.
_USER_TIMEOUT_MS = 10_000

# Alerts of RFC 8446, 6.2, that say something of a certificate; others are of damage.
_REFUSALS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")

T = TypeVar("T")
Where = tuple[socket.AddressFamily, object]


class Connection:
    """Owns its descriptors. in_fd, out_fd: what to read and write, the same for a socket.

    name: for messages. peer: who is there, as far as anything tells.
    """

    def __init__(self, name: str, peer: str, sock: socket.socket | None) -> None:
        """Take over sock; None: of the descriptors 0 and 1."""
        self.name, self.peer, self._socket = name, peer, sock
        self._relay: Relay | None = None
        self._in = self._out = OwnedFd(-1)
        self._sink: FdStream | None = None

    @property
    def in_fd(self) -> int:
        """The descriptor to read, -1 once closed."""
        return self._socket.fileno() if self._socket is not None else self._in.fileno()

    @property
    def out_fd(self) -> int:
        """The descriptor to write, -1 once closed."""
        if self._socket is not None:
            return self._socket.fileno()
        return self._sink.fileno() if self._sink is not None else -1

    def take_pipes(self) -> None:
        """Become standard input and output. Raises UsageError for a terminal, OSError."""
        if os.isatty(0) or os.isatty(1):
            raise UsageError("standard input and output are a terminal", hint="connect them")
        self._in = OwnedFd(os.dup(0))
        self._out = OwnedFd(os.dup(1))
        self._sink = FdStream(self._out.fileno(), "standard output", writing=True)

    def secure(self, files: TlsFiles, host: str | None, ends_ns: int, wake_fd: int) -> None:
        """Speak TLS from here on. host: what was dialed, None where it came to us.

        Raises AuthenticationError, PeerError, CancelledError; close() it then.
        """
        assert self._socket is not None
        plain, self._socket = self._socket, None
        secured, self.peer = handshake(plain, files, host=host, ends_ns=ends_ns, wake_fd=wake_fd)
        self._relay = Relay(secured)
        self._socket = self._relay.detach()

    def failed(self, err: OSError) -> MigrationError:
        """Return what an OSError of a descriptor of this connection means."""
        if self._relay is not None and self._relay.failure is not None:
            reason = f"TLS broke off: {self._relay.failure}"
            told = getattr(self._relay.failure, "reason", "") or ""
            if "ALERT" in told and any(word in told for word in _REFUSALS):
                # In TLS 1.3 who dialed hears only now that its certificate was refused.
                hint = "the other end does not trust this one's certificate, or there is none"
                return AuthenticationError(f"{self.name}: {reason}", hint=hint)
        elif err.errno == errno.ETIMEDOUT:
            reason = "it says nothing any more"
        elif err.errno in (errno.ECONNRESET, errno.EPIPE):
            reason = "the other end has gone, or the connection was cut"
        else:
            reason = err.strerror or str(err)
        return PeerError(f"{self.name}: {reason}", errno=err.errno)

    def abandon(self) -> None:
        """Close it at once: there is nothing that the other end should still get."""
        if self._relay is not None:
            self._relay.abort()
        elif self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """End the connection so that the peer gets all that was sent; waits for that, 2 s at most.

        Does nothing when it is closed. Of a descriptor that was given, the connection ends as well.
        """
        sock, self._socket = self._socket, None
        if sock is not None:
            with sock, suppress(OSError):
                if self._relay is None:
                    linger(sock, time.monotonic_ns() + LINGER_NS)
                else:
                    sock.shutdown(socket.SHUT_WR)
                    self._relay.join()
        if self._sink is not None:
            self._sink.close()
        self._in.close()
        self._out.close()


def dial(
    address: Address,
    *,
    tls: TlsFiles | None,
    insecure: bool,
    timeout_ns: int,
    wake_fd: int = -1,
) -> Connection:
    """Connect to a listener, with TLS where files are given. Blocks for timeout_ns at most.

    Raises PeerError, AuthenticationError, UsageError (TCP beyond this host without TLS, unless
    insecure), CancelledError once wake_fd is readable, and for this host LocalIOError,
    ResourceLimitError.
    """
    ends_ns = time.monotonic_ns() + timeout_ns
    if tls is not None:
        tls.context("client")  # files that cannot be used are found before anybody is bothered
    found = resolved(address, ends_ns, wake_fd, tls=tls, insecure=insecure)
    try:
        sock = reach(found, str(address), ends_ns, wake_fd)
        connection = Connection(str(address), peer_of(sock), sock)
        if tls is not None:
            _secure(connection, tls, address, ends_ns, wake_fd)
    except OSError as err:
        raise local_failure(str(address), err) from err
    return connection


def _secure(
    connection: Connection, tls: TlsFiles, address: Address, ends_ns: int, wake_fd: int
) -> None:
    try:
        connection.secure(tls, address.host or "localhost", ends_ns, wake_fd)
    except MigrationError as err:
        connection.close()
        err.args = (f"{address}: {err}",)
        raise


def reach(found: Sequence[Where], name: str, ends_ns: int, wake_fd: int) -> socket.socket:
    """Connect to the first address that answers. Each has its share of the time that is left."""
    for left in range(len(found), 0, -1):
        family, where = found[-left]
        now_ns = time.monotonic_ns()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            _connect(sock, where, name, now_ns + (ends_ns - now_ns) // left, wake_fd)
            tune(sock)
            return sock
        except PeerError:
            sock.close()
            if left == 1:
                raise
        except BaseException:
            sock.close()
            raise
    raise PeerError(f"{name}: there is no address to dial")


def _connect(sock: socket.socket, where: object, name: str, ends_ns: int, wake_fd: int) -> None:
    sock.settimeout(0)
    number = sock.connect_ex(where)  # type: ignore[arg-type]
    if number == errno.EINPROGRESS:
        if not is_ready(sock.fileno(), select.POLLOUT, ends_ns, wake_fd):
            raise PeerError(f"{name}: nobody answered in time", errno=errno.ETIMEDOUT)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        hint = "is a receiver listening there?"
        raise PeerError(f"{name}: {os.strerror(number)}", errno=number, hint=hint)
    sock.settimeout(None)


def resolved(
    address: Address, ends_ns: int, wake_fd: int = -1, *, tls: TlsFiles | None, insecure: bool
) -> list[Where]:
    """Return the families and socket addresses of an address, the best first, at least one.

    Raises PeerError, UsageError, ResourceLimitError, CancelledError once wake_fd is readable.
    """
    if address.scheme == "unix":
        return [(socket.AF_UNIX, address.path)]
    if address.scheme == "vsock":
        return [(socket.AF_VSOCK, (int(address.host), address.port))]
    found = _looked_up(address, ends_ns, wake_fd)
    hosts = [ipaddress.ip_address(str(where[0]).partition("%")[0]) for _, where in found]
    if not (all(host.is_loopback for host in hosts) or insecure or tls is not None):
        raise UsageError(
            f"{address} is not this host, and there is no TLS: whoever is on the way could read the"
            " state, and write another",
            hint="--tls-dir DIR; --insecure only where nobody else is on that network",
        )
    return [*found]


def _looked_up(
    address: Address, ends_ns: int, wake_fd: int
) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    ask = partial(socket.getaddrinfo, address.host, address.port, type=socket.SOCK_STREAM)
    try:
        with suppress(socket.gaierror):  # numbers need no resolver
            return [(entry[0], entry[4]) for entry in ask(flags=socket.AI_NUMERICHOST)]
        return [(entry[0], entry[4]) for entry in _asked(ask, str(address), ends_ns, wake_fd)]
    except (socket.gaierror, UnicodeError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise PeerError(
            f"{address}: {address.host} does not resolve: {reason}", hint="check the host's name"
        ) from err
    except OSError as err:
        raise local_failure(str(address), err) from err


def _asked(ask: Callable[[], T], name: str, ends_ns: int, wake_fd: int) -> T:
    """Ask the resolver, for a while. It cannot be called off: its thread is left to itself then."""
    answers: list[T] = []
    failures: list[OSError | UnicodeError] = []
    done_fd, write_fd = os.pipe()

    def work() -> None:
        try:
            answers.append(ask())
        except (OSError, UnicodeError) as err:
            failures.append(err)
        finally:
            os.close(write_fd)

    with OwnedFd(done_fd):
        thread = start_thread(work, "vfiomig resolver")
        if not is_ready(done_fd, select.POLLIN, ends_ns, wake_fd):
            raise PeerError(f"{name}: the host's name was not resolved in time")
        thread.join()
    if failures:
        raise failures[0]
    return answers[0]


def local_failure(what: str, err: OSError) -> LocalIOError | ResourceLimitError:
    """Return the error for a socket that this host does not give."""
    few = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    kind = ResourceLimitError if err.errno in few else LocalIOError
    return kind(f"{what}: {err.strerror or err}", errno=err.errno)


def tune(sock: socket.socket) -> None:
    """Set what a session wants of a stream socket."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    elif sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BYTES)


def peer_of(sock: socket.socket) -> str:
    """Return who is at the other end, as far as the socket tells."""
    if sock.family == socket.AF_UNIX:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(data)
        return f"process {pid}, user {uid}"
    with suppress(OSError):
        name = sock.getpeername()
        host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
        return f"{host}:{name[1]}"
    return "a peer that has gone"


def from_descriptors(address: Address, tls: TlsFiles | None = None) -> Connection:
    """Return a connection of fd:N, a connected stream socket, or of standard input and output.

    The descriptors stay the caller's, but the connection is over when this one is closed. Raises
    UsageError, also where TLS was asked for: it is not spoken there.
    """
    if tls is not None:
        raise UsageError(
            f"{address} is connected already: there is no TLS over it",
            hint="TLS is for tcp:, unix: and vsock:",
        )
    if address.scheme == "stdio":
        connection = Connection("standard input and output", "whoever started this", None)
        try:
            connection.take_pipes()
        except OSError as err:
            connection.close()
            raise UsageError(f"standard input and output: {err.strerror}") from err
        except BaseException:
            connection.close()
            raise
        return connection
    try:
        if not stat.S_ISSOCK(os.fstat(address.fd).st_mode):
            raise UsageError(f"{address} is no socket", hint="a connected stream socket, or -")
        sock = socket.socket(fileno=os.dup(address.fd))
    except OSError as err:
        raise UsageError(f"{address}: {err.strerror}") from err
    try:
        if sock.type != socket.SOCK_STREAM:
            raise UsageError(f"{address} is no stream socket")
        sock.getpeername()  # ENOTCONN: there is nobody
        tune(sock)
        return Connection(str(address), peer_of(sock), sock)
    except OSError as err:
        sock.close()
        raise UsageError(f"{address}: {err.strerror}") from err
    except BaseException:
        sock.close()
        raise
