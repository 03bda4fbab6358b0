"""TLS 1.3 between the two ends: the handshake, in which both prove who they are."""

import ipaddress
import os
import select
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfiomig.errors import AuthenticationError, PeerError
from vfiomig.live.relay import is_ready

if TYPE_CHECKING:
    import ssl


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
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as err:
        secured.close()
        raise PeerError(
            "the other end went away during the TLS handshake", hint="is TLS on at both ends?"
        ) from err
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
    if not is_ready(sock.fileno(), events, ends_ns, wake_fd):
        raise PeerError("the TLS handshake was not over in time")


def _check_name(secured: "ssl.SSLSocket", files: TlsFiles, host: str | None) -> str:
    names = _names(secured.getpeercert() or {})
    allowed = files.peers or ({host} if host is not None else set(names))
    for name in names:
        if any(_fits(name, wanted) for wanted in allowed):
            return name
    raise AuthenticationError(
        f"the peer is {' or '.join(names) or 'nobody'}, and not {' or '.join(sorted(allowed))}",
        hint="--tls-peer names who may be there, as its certificate does",
    )


def _names(certificate: dict[str, Any]) -> list[str]:
    kinds = ("DNS", "IP Address", "URI")
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in kinds]
    if not names:
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        names = [value for key, value in subject if key == "commonName"]
    return names


def _fits(name: str, wanted: str) -> bool:
    name, wanted = _canonical(name), _canonical(wanted)
    if name.startswith("*."):  # one label, as RFC 6125 has it
        return wanted.partition(".")[2] == name[2:]
    return name == wanted


def _canonical(name: str) -> str:
    """Return a name as it can be compared: OpenSSL writes ::1 as 0:0:0:0:0:0:0:1."""
    try:
        return str(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
        return name.lower()


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _reason(err: BaseException) -> str:
    return str(getattr(err, "verify_message", "") or getattr(err, "reason", "") or err)
