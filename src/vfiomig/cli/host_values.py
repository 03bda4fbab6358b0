"""A device of this host as plain values, for JSON."""

from dataclasses import asdict

from vfiomig.sysfs import HostDevice


def host_values(device: HostDevice) -> dict[str, object]:
    """Return the fields of a device, its path and verdict as text."""
    values = asdict(device)
    return values | {"path": str(device.path), "migratable": device.migratable.value}
