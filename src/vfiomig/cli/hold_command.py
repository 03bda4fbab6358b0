"""Open devices once, keep them open, and lend them to other commands at a Unix socket.

A vfio-pci device is reset at its first open and at its last close: what was loaded into it stays
only as long as somebody keeps it open. Ends with Ctrl-C or SIGTERM. Only the same user and root may
borrow. With -v, or --json, it says so once it lends.

examples:
  vfiomig hold 0000:3b:00.2 --socket /run/vf0.sock &
  vfiomig load vf0.vmig unix:/run/vf0.sock
"""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from vfiomig import sysfs
from vfiomig.backends import kernel, opens_by_name
from vfiomig.cli.output import Output
from vfiomig.errors import UsageError
from vfiomig.lending import Lender


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("devices", metavar="DEVICE", nargs="+")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="where to lend")


def run(args: argparse.Namespace, out: Output) -> int:
    """Hold until a signal ends it. Returns the exit code."""
    for name in args.devices:
        if not opens_by_name(name):
            raise UsageError(
                f"{name} cannot be held",
                hint="hold opens devices of this host; a simulated one keeps its state in its file",
            )
    with ExitStack() as stack:
        lent = []
        for name in args.devices:
            host = sysfs.find(name)
            ops = kernel.open_ops(host)
            stack.callback(ops.close)
            lent.append((host.name, kernel.identity_of(host), ops.fileno()))
        lender = stack.enter_context(Lender(lent, args.socket))
        names = [name for name, _, _ in lent]
        values = {"devices": names, "socket": str(args.socket), "pid": os.getpid()}
        if out.json:
            out.record("holding", values)
        else:
            out.note(f"holding {', '.join(names)} at {args.socket}, process {os.getpid()}")
        lender.serve()
    return 0
