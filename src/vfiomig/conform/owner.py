"""A program that opens a device, brings it to a state, and waits to be killed.

python -m vfiomig.conform.owner DEVICE STATE; says "ready" on stdout. It ends with its stdin.
"""

import sys

from vfiomig.backends import open_device
from vfiomig.uapi import DeviceState


def main(name: str, state: str) -> None:
    """Open, enter, wait."""
    target = DeviceState[state]
    with open_device(name) as device:
        if device.state() is not DeviceState.RUNNING:
            device.reset()
        device.start_session(target)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.read()
        device.recover(DeviceState.RUNNING)  # nobody killed it: whoever began it has gone


if __name__ == "__main__":
    main(*sys.argv[1:])
