"""Where the other end of a session is: tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N, or -."""

import re
from typing import NamedTuple

from vfiomig.errors import UsageError

_HINT = "tcp:HOST:PORT, tcp:[::1]:PORT, unix:PATH, vsock:CID:PORT, fd:N, or - for stdin and stdout"
_TCP = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\[\]:]*)):([0-9]{1,5})")
LOOPBACK = "127.0.0.1"
# sockaddr_un.sun_path holds 108 bytes, the last of them zero (linux/un.h).
_MAX_PATH_BYTES = 107


class Address(NamedTuple):
    """scheme: "tcp", "unix", "vsock", "fd" or "stdio". host: of vsock the CID, as text."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        match self.scheme:
            case "tcp":
                host = f"[{self.host}]" if ":" in self.host else self.host
                return f"tcp:{host}:{self.port}"
            case "unix":
                return f"unix:{self.path}"
            case "vsock":
                return f"vsock:{self.host}:{self.port}"
            case "fd":
                return f"fd:{self.fd}"
        return "-"

    @property
    def is_open(self) -> bool:
        """Whether there is nobody to dial or to listen for: descriptors that are connected."""
        return self.scheme in ("fd", "stdio")


def parse_address(text: str) -> Address:
    """Take an address apart. tcp::PORT is on 127.0.0.1. Raises UsageError."""
    if text == "-":
        return Address("stdio")
    scheme, _, rest = text.partition(":")
    parse = {"tcp": _tcp, "unix": _unix, "vsock": _vsock, "fd": _fd}.get(scheme)
    found = parse(rest) if parse is not None else None
    if found is None:
        raise UsageError(f"{text!r} is no address of a session", hint=_HINT)
    return found


def _tcp(rest: str) -> Address | None:
    match = _TCP.fullmatch(rest)
    if match is None or int(match[3]) > 65535:
        return None
    return Address("tcp", match[1] or match[2] or LOOPBACK, int(match[3]))


def _unix(rest: str) -> Address | None:
    if not rest or "\0" in rest:
        return None
    if len(rest.encode(errors="surrogateescape")) > _MAX_PATH_BYTES:
        raise UsageError(f"unix:{rest}: a socket's path has at most {_MAX_PATH_BYTES} bytes")
    return Address("unix", path=rest)


def _vsock(rest: str) -> Address | None:
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", rest)
    if match is None or max(int(match[1]), int(match[2])) >= 1 << 32:
        return None
    return Address("vsock", match[1], int(match[2]))


def _fd(rest: str) -> Address | None:
    return Address("fd", fd=int(rest)) if re.fullmatch(r"[0-9]{1,9}", rest) else None
