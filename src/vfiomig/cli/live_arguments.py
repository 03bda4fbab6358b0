"""Options that send and receive share, and starting the other end through ssh."""

import argparse
import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfiomig.cli import arguments
from vfiomig.errors import UsageError
from vfiomig.live.options import DEFAULT_SILENCE_NS
from vfiomig.live.tls import TlsFiles
from vfiomig.options import DEFAULT_MAX_STATE_BYTES


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what both ends have."""
    parser.add_argument(
        "--max-state",
        type=arguments.size,
        default=DEFAULT_MAX_STATE_BYTES,
        metavar="SIZE",
        help="the largest state of a device to accept (default: 1T)",
    )
    parser.add_argument(
        "--silence",
        type=arguments.duration,
        default=DEFAULT_SILENCE_NS,
        metavar="TIME",
        help="the other end has gone when it says nothing for so long (default: 10s)",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="where to record what `vfiomig resolve` needs (default: /var/lib/vfiomig for root,"
        " else ~/.local/state/vfiomig)",
    )
    group = parser.add_argument_group("security")
    group.add_argument(
        "--tls-dir",
        type=Path,
        metavar="DIR",
        help="TLS 1.3, with ca-cert.pem, {server,client}-cert.pem and -key.pem, as QEMU names them",
    )
    group.add_argument(
        "--tls-peer",
        default="",
        metavar="NAME,…",
        help="names the other end's certificate may bear (default: the host sent to; any sender)",
    )
    group.add_argument(
        "--insecure", action="store_true", help="TCP beyond this host without TLS: anybody may read"
    )


def tls_files(args: argparse.Namespace) -> TlsFiles | None:
    """Return what --tls-dir and --tls-peer say. Raises UsageError."""
    peers = frozenset(name for name in args.tls_peer.split(",") if name)
    if args.tls_dir is None:
        if peers:
            raise UsageError("--tls-peer needs --tls-dir")
        return None
    return TlsFiles(args.tls_dir, peers)


def parse_via(text: str) -> str:
    """Return the host of ssh:HOST. Raises UsageError."""
    scheme, _, host = text.partition(":")
    if scheme != "ssh" or not host or host.startswith("-"):
        raise UsageError(f"{text!r} is not ssh:HOST")
    return host


@contextmanager
def other_end(host: str, devices: str, args: argparse.Namespace) -> Iterator[str]:
    """Start `vfiomig receive` for devices (with commas) on a host. Yields the URL to send to.

    VFIOMIG_SSH is the command to use instead of ssh, with its options.
    """
    words = ["vfiomig", "receive", *devices.split(","), "-", "--quiet"]
    ssh = shlex.split(os.environ.get("VFIOMIG_SSH", "ssh"))
    near, far = socket.socketpair()
    with near, far:
        try:
            process = subprocess.Popen(
                [*ssh, host, shlex.join(words)], stdin=far.fileno(), stdout=far.fileno()
            )
        except OSError as err:
            raise UsageError(f"cannot run {ssh[0]}: {err.strerror}") from err
        far.close()
        with process:
            try:
                yield f"fd:{near.fileno()}"
            finally:
                near.close()
