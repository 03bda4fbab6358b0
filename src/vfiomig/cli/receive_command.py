"""Take the devices of a sender into these: they run here once everything has arrived.

URL: tcp:HOST:PORT (without HOST: 127.0.0.1), unix:PATH, vsock:CID:PORT, fd:N, or - for standard
input and output, as behind ssh. One migration; the sender's first device goes into the first here.
What the devices held is lost once the sender has begun. Keep a device of this host open with
`vfiomig hold`: the last close of a vfio-pci device resets it.

examples:
  vfiomig receive unix:/run/vf0.sock tcp:0.0.0.0:4444 --tls-dir /etc/pki/vfiomig
  vfiomig receive 'sim:there.state?size=64M' tcp::4444
"""

import argparse
from contextlib import ExitStack

from vfiomig.cli import arguments, live_arguments
from vfiomig.cli.live_text import migration_text
from vfiomig.cli.output import Output
from vfiomig.cli.watch import Watch
from vfiomig.live.destination import receive
from vfiomig.live.options import ReceiveOptions
from vfiomig.options import DEFAULT_BUFFER_BYTES
from vfiomig.uapi import DeviceState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("devices", metavar="DEVICE", nargs="+")
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "--allow-mismatch",
        metavar="FIELD,…",
        default="",
        help="fields in which the devices may differ: driver, model, vendor_id, …, capabilities",
    )
    parser.add_argument(
        "--force-reset", action="store_true", help="reset a device that is not RUNNING first"
    )
    parser.add_argument(
        "--wait",
        type=arguments.duration,
        default=0,
        metavar="TIME",
        help="how long to wait for a sender (default: for ever)",
    )
    parser.add_argument(
        "--buffer",
        type=arguments.size,
        default=DEFAULT_BUFFER_BYTES,
        metavar="SIZE",
        help="bytes of one read of a connection (default: 1M)",
    )
    live_arguments.add_common(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Receive. Returns the exit code."""
    options = _options(args)
    options.check()
    live_arguments.check_address(args.url, out)
    with ExitStack() as stack:
        devices = [stack.enter_context(arguments.opened(name, out)) for name in args.devices]
        for device in devices:
            if args.force_reset and device.state() is not DeviceState.RUNNING:
                out.note(f"{device.name} is in {device.state().name}: resetting it")
                device.reset()
        with Watch(out) as watch:
            report = receive(devices, args.url, options, on_event=watch)
            out.settle()
            watch.finished(sum(moved.device_bytes for moved in report.devices))
        out.result(report.as_dict(), migration_text(report))
    return 0


def _options(args: argparse.Namespace) -> ReceiveOptions:
    return ReceiveOptions(
        allow_mismatch=frozenset(field for field in args.allow_mismatch.split(",") if field),
        buffer_bytes=args.buffer,
        max_state_bytes=args.max_state,
        silence_ns=args.silence,
        wait_ns=args.wait,
        tls=live_arguments.tls_files(args),
        insecure=args.insecure,
        journal=args.journal,
    )
