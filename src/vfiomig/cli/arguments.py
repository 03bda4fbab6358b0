"""Types of arguments, and options that several commands share."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vfiomig import quantities
from vfiomig.backends import open_device, opens_by_name
from vfiomig.cli.output import Output
from vfiomig.device import Device
from vfiomig.errors import UsageError
from vfiomig.uapi import DeviceState

T = TypeVar("T")


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return parse as argparse wants it: its UsageError as the text of the usage error."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UsageError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return convert


size = typed(quantities.parse_size)
rate = typed(quantities.parse_rate)
duration = typed(quantities.parse_duration)


def parse_buffer(text: str) -> int | None:
    """Return the bytes of a buffer, None for auto. Raises UsageError."""
    return None if text == "auto" else quantities.parse_size(text)


def _after(text: str) -> DeviceState:
    states = {"run": DeviceState.RUNNING, "stop": DeviceState.STOP}
    if text not in states:
        raise UsageError(f"{text!r} is neither run nor stop")
    return states[text]


def add_transfer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what save and load have in common."""
    from vfiomig.options import DEFAULT_MAX_STATE_BYTES

    parser.add_argument(
        "--after",
        type=typed(_after),
        default=DeviceState.RUNNING,
        metavar="run|stop",
        help="what to leave the device in (default: run)",
    )
    parser.add_argument(
        "--max-state",
        type=size,
        default=DEFAULT_MAX_STATE_BYTES,
        metavar="SIZE",
        help="the largest state to accept (default: 1T)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, change no state, write nothing"
    )


@contextmanager
def opened(name: str, out: Output) -> Iterator[Device]:
    """Open the device, and say so when that may reset it."""
    if opens_by_name(name):
        out.note(
            f"opening {name} by name: the first open and the last close of a vfio-pci device reset"
            " it; borrow it (fd:, pid:, unix:) from the process that runs it to keep its state"
        )
    with open_device(name) as device:
        yield device
