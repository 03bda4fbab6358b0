"""Reset a device (VFIO_DEVICE_RESET): it is RUNNING afterwards, and what it held is lost.

The one way out of ERROR, and the safe way out of a RESUMING that a dead process left.

examples:
  vfiomig reset sim:a.state
"""

import argparse
from contextlib import closing

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.cli.watch import Watch
from vfiomig.worker import Cancellation, run_shielded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE")


def run(args: argparse.Namespace, out: Output) -> int:
    """Reset. Returns the exit code."""
    with arguments.opened(args.device, out) as device, Watch(out) as watch:
        before = device.state_or_none()
        with device.observed(watch), closing(Cancellation()) as cancellation:
            # A signal must not interrupt the reset itself.
            run_shielded(device.reset, cancellation)
        was = before.name if before is not None else None
        out.result(
            {"device": device.name, "before": was, "state": "RUNNING"},
            f"{device.name}: {was or 'unknown'} -> RUNNING by a reset",
        )
    return 0
