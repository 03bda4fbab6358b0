"""What send and receive share: options, their URL, and what the one tells the other through ssh."""

import argparse
import sys
from pathlib import Path

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.errors import UsageError
from vfiomig.live.address import parse_address
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
        "--insecure",
        action="store_true",
        help="TCP beyond this host without TLS: anybody may read (to be typed: VFIOMIG_INSECURE is"
        " passed over)",
    )


def tls_files(args: argparse.Namespace) -> TlsFiles | None:
    """Return what --tls-dir and --tls-peer say. Raises UsageError."""
    peers = frozenset(name for name in args.tls_peer.split(",") if name)
    if args.tls_dir is None:
        if peers:
            raise UsageError("--tls-peer needs --tls-dir")
        return None
    return TlsFiles(args.tls_dir, peers)


def check_address(url: str, out: Output) -> None:
    """Check the URL of a session. Where it is standard output, words go elsewhere.

    Raises UsageError.
    """
    if parse_address(url).scheme == "stdio":
        if sys.stdout.isatty() or sys.stdin.isatty():
            raise UsageError("standard input and output are a terminal", hint="connect them")
        out.results = sys.stderr


def parse_via(text: str) -> str:
    """Return the host of ssh:HOST. Raises UsageError."""
    scheme, _, host = text.partition(":")
    if scheme != "ssh" or not host or host.startswith("-"):
        raise UsageError(f"{text!r} is not ssh:HOST")
    return host


def receiver_words(devices: str, args: argparse.Namespace) -> list[str]:
    """Return what `vfiomig receive` is to be told at the other end. devices: with commas.

    Its journal and certificates are its own. Raises UsageError.
    """
    names = devices.split(",")
    if not all(names):
        raise UsageError(
            f"{devices!r} does not name the devices there",
            hint="with --via, URL is DEVICE,DEVICE,…: as many as here; %2C for a comma in a name",
        )
    if args.tls_dir is not None:
        raise UsageError("--tls-dir and --via exclude each other: ssh has its own keys")
    limits = ["--silence", f"{args.silence}ns", "--max-state", str(args.max_state)]
    return ["--json", *limits, "--buffer", str(args.buffer), "--", *names, "-"]
