"""Show what a device is and can do, and why not. Reads sysfs only, unless --open is given.

With --open the device itself is asked, for capabilities, state and size; the first open and the
last close of a vfio-pci device reset it. A simulated or borrowed device is always asked.

examples:
  vfiomig info 0000:3b:00.2
  vfiomig info unix:/run/vf0.sock --json
  vfiomig info 'sim:?profile=mlx5'
"""

import argparse
from dataclasses import asdict

from vfiomig.backends import open_device, opens_by_name
from vfiomig.cli import arguments
from vfiomig.cli.output import Output, table
from vfiomig.device import Device
from vfiomig.quantities import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument("--open", action="store_true", help="open the device and ask it")
    parser.add_argument("--explain", action="store_true", help="more words on why and what to do")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show. Returns the exit code: 3 when the device cannot migrate as it is."""
    values: dict[str, object] = {}
    rows: list[tuple[str, str]] = []
    code = 0
    if opens_by_name(args.device):
        from vfiomig import sysfs
        from vfiomig.cli.host_values import host_rows, host_values

        host = sysfs.find(args.device)
        values |= host_values(host)
        rows += host_rows(host, explain=args.explain)
        code = 3 if host.migratable is sysfs.Verdict.NO else 0
        if args.open:
            with arguments.opened(args.device, out) as device:
                code = _ask(device, values, rows)
    else:
        with open_device(args.device) as device:
            rows += [("device", device.name), ("driver", _model(device))]
            values |= {"name": device.name, **asdict(device.identity)}
            code = _ask(device, values, rows)
    out.answer(values, table(rows))
    return code


def _model(device: Device) -> str:
    return f"{device.identity.driver} {device.identity.model}".strip() or "unknown"


def _ask(device: Device, values: dict[str, object], rows: list[tuple[str, str]]) -> int:
    state, length = device.state(), device.stop_copy_length()
    told = "it does not tell" if length is None else f"about {format_size(length)} ({length} bytes)"
    if length is None and device.protocol == "v1":
        told = "it tells only while it is saved"
    values |= {"protocol": device.protocol, "capabilities": device.capabilities.names}
    values |= {"state": state.name, "stop_copy_length": length}
    rows += [
        ("protocol", device.protocol),
        ("capabilities", device.capability_names),
        ("state", state.name),
        ("size", told),
    ]
    if device.protocol == "v1":
        values |= {"region_bytes": device.region_bytes}
        rows.append(("migration region", f"{device.region_bytes} bytes"))
    return 0
