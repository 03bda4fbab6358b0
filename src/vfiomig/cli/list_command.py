"""List the devices of this host that are bound to a VFIO driver. Reads sysfs, opens nothing.

With --all also those that could be: virtual functions, and devices whose variant driver is
installed, with the reason why they cannot migrate as they are.

examples:
  vfiomig list
  vfiomig list --all --json | jq '.devices[].name'
"""

import argparse

from vfiomig import sysfs
from vfiomig.cli.host_values import host_values
from vfiomig.cli.output import Output, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("--all", action="store_true", help="also those that could migrate")


def run(args: argparse.Namespace, out: Output) -> int:
    """List. Returns the exit code; no device is no error."""
    devices = sysfs.list_devices(include_all=args.all)
    rows = [("DEVICE", "CDEV", "GROUP", "DRIVER", "MIGRATABLE", "WHY")]
    for device in devices:
        model = f"{device.driver} {device.mdev_type}".strip() or "-"
        ids = (device.name, device.cdev or "-", device.iommu_group or "-")
        rows.append((*ids, model, device.migratable.value, device.reason))
    text = table(rows)
    if not devices:
        more = "" if args.all else "; --all also shows those that could be"
        text = f"no device of this host is bound to a VFIO driver{more}"
    out.answer({"devices": [host_values(device) for device in devices]}, text)
    return 0
