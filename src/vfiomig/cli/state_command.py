"""Show the state a device is in, or bring it to another one by legal steps.

RESUMING -> STOP is the commit of a load: it is refused here unless --commit says that it is meant.
A data session that a state opens ends with this command.

examples:
  vfiomig state sim:a.state
  vfiomig state sim:a.state --set STOP
"""

import argparse
from contextlib import closing

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.cli.watch import Watch
from vfiomig.errors import IllegalArcError, UsageError
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded


def _state(text: str) -> DeviceState:
    name = text.upper().replace("-", "_")
    known = [state.name for state in DeviceState]
    if name not in known:
        raise UsageError(f"no state {text!r}; there are {', '.join(known)}")
    return DeviceState[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument("--set", type=arguments.typed(_state), metavar="STATE", help="go there")
    parser.add_argument(
        "--commit", action="store_true", help="allow RESUMING to be left, which commits its load"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Show or set the state. Returns the exit code."""
    with arguments.opened(args.device, out) as device, Watch(out) as watch:
        state = device.state()
        if args.set is not None:
            leaves = state is DeviceState.RESUMING and args.set is not DeviceState.RESUMING
            if leaves and not args.commit:
                raise IllegalArcError(
                    f"{device.name} is in RESUMING: leaving it commits whatever was written",
                    device=device.name,
                    wanted=args.set,
                    actual=state,
                    hint="vfiomig reset drops it; --commit if the load is known to be whole",
                )
            with device.observed(watch), closing(Cancellation()) as cancellation:
                # A signal must not interrupt the state change itself.
                run_shielded(lambda: device.set_state(args.set), cancellation)
            state = device.state()
        out.answer({"device": device.name, "state": state.name}, state.name)
    return 0
