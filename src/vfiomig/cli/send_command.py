"""Migrate devices, live, to a receiver: they run here, then they run there.

URL: tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N (a connected socket), or - (standard input and
output). Devices with PRE_COPY are read while they run; all are stopped only when the time until
they run there is expected to stay within --downtime-limit. Unless the exit code is 20 or 21, a send
that failed leaves the devices running here, and those there reset.

examples:
  vfiomig send unix:/run/vf0.sock tcp:otherhost:4444 --tls-dir /etc/pki/vfiomig
  vfiomig send unix:/run/vf0.sock unix:/run/vf1.sock tcp:[::1]:4444 --downtime-limit 100ms
  vfiomig send unix:/run/vf0.sock --via ssh:otherhost -- unix:/run/vf0.sock
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from vfiomig.cli import arguments, live_arguments
from vfiomig.cli.live_text import migration_text
from vfiomig.cli.output import Output
from vfiomig.cli.watch import Watch
from vfiomig.device import Device
from vfiomig.live.options import LIVE_PRE_COPY, SendOptions
from vfiomig.live.source import check_devices, send
from vfiomig.options import PreCopyLimits
from vfiomig.quantities import format_size

# With --via: ssh connects first, and may ask for a password.
_SSH_NS = 300_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("devices", metavar="DEVICE", nargs="+")
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "--via",
        type=arguments.typed(live_arguments.parse_via),
        metavar="ssh:HOST",
        help="start the receiver there, through ssh; URL is then the devices there, with commas",
    )
    defaults = SendOptions()
    parser.add_argument(
        "--downtime-limit",
        type=arguments.duration,
        default=defaults.downtime_limit_ns,
        metavar="TIME",
        help="how long the devices may run nowhere, as expected (default: 300ms)",
    )
    parser.add_argument(
        "--on-limit",
        choices=["cancel", "switch"],
        default="cancel",
        help="when that cannot be met: give up, or stop them nevertheless (default: cancel)",
    )
    parser.add_argument(
        "--max-bandwidth",
        type=arguments.rate,
        default=0,
        metavar="RATE",
        help="the most to send: 25Gbit",
    )
    parser.add_argument(
        "--connections",
        type=int,
        metavar="N",
        help="how many to spread the devices over (default: one for each device)",
    )
    parser.add_argument(
        "--after",
        choices=["stop", "reset"],
        default="stop",
        help="what to do to the devices here when they run there (default: stop)",
    )
    parser.add_argument(
        "--without-p2p",
        action="store_true",
        help="send several devices although one has no P2P: they do not talk to each other",
    )
    parser.add_argument(
        "--buffer",
        type=arguments.size,
        default=defaults.buffer_bytes,
        metavar="SIZE",
        help="bytes of one read (default: 1M)",
    )
    parser.add_argument("--keep-zeros", action="store_true", help="send runs of zeros as they are")
    parser.add_argument(
        "--lease",
        type=arguments.duration,
        default=defaults.lease_ns,
        metavar="TIME",
        help="how long the receiver waits for the last word (default: 30s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the devices, change nothing")
    group = parser.add_argument_group("pre-copy (read while the device runs; bounded)")
    group.add_argument("--pre-copy", choices=["auto", "off"], default="auto")
    limits = LIVE_PRE_COPY
    group.add_argument("--pre-copy-rounds", type=int, default=limits.rounds, metavar="N")
    group.add_argument(
        "--pre-copy-time", type=arguments.duration, default=limits.duration_ns, metavar="TIME"
    )
    group.add_argument(
        "--pre-copy-bytes", type=arguments.size, default=limits.device_bytes, metavar="SIZE"
    )
    live_arguments.add_common(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Send. Returns the exit code."""
    options = _options(args)
    options.check()
    words = live_arguments.receiver_words(args.url, args) if args.via is not None else []
    if not words:
        live_arguments.check_address(args.url, out)
    with ExitStack() as stack:
        devices = [stack.enter_context(arguments.opened(name, out)) for name in args.devices]
        check_devices(devices, options)
        if args.dry_run:
            return _dry_run(devices, out)
        url = args.url
        if words:
            from vfiomig.cli.far_end import receiver

            url = stack.enter_context(receiver(args.via, words, out))
            options = replace(options, handshake_ns=_SSH_NS)
        with Watch(out) as watch:
            report = send(devices, url, options, on_event=watch)
            out.settle()
            watch.finished(sum(moved.device_bytes for moved in report.devices))
    if words:
        report = replace(report, peer=f"ssh:{args.via}")
    out.result(report.as_dict(), migration_text(report))
    return 0


def _dry_run(devices: Sequence[Device], out: Output) -> int:
    sizes = [device.stop_copy_length() or 0 for device in devices]
    names = ", ".join(device.name for device in devices)
    out.result(
        {"dry_run": True, "ready": True, "stop_copy_length": sizes},
        f"would send {names}: about {format_size(sum(sizes))}",
    )
    return 0


def _options(args: argparse.Namespace) -> SendOptions:
    limits = PreCopyLimits(args.pre_copy_rounds, args.pre_copy_time, args.pre_copy_bytes)
    return SendOptions(
        pre_copy=None if args.pre_copy == "off" else limits,
        downtime_limit_ns=args.downtime_limit,
        switch_on_limit=args.on_limit == "switch",
        connections=args.connections,
        bytes_per_s=args.max_bandwidth,
        buffer_bytes=args.buffer,
        elide_zeros=not args.keep_zeros,
        max_state_bytes=args.max_state,
        reset_after=args.after == "reset",
        without_p2p=args.without_p2p,
        lease_ns=args.lease,
        silence_ns=args.silence,
        tls=live_arguments.tls_files(args),
        insecure=args.insecure,
        journal=args.journal,
    )
