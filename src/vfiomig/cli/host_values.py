"""A device of this host as plain values for JSON, and as rows for people."""

from dataclasses import asdict

from vfiomig import sysfs
from vfiomig.sysfs import HostDevice


def host_values(device: HostDevice) -> dict[str, object]:
    """Return the fields of a device, its path and verdict as text."""
    values = asdict(device)
    return values | {"path": str(device.path), "migratable": device.migratable.value}


def host_rows(host: HostDevice, *, explain: bool) -> list[tuple[str, str]]:
    """Return what a person wants to know of a device. explain: more words on why."""
    ids = ":".join(part for part in (host.vendor_id, host.device_id) if part)
    rows = [
        ("device", " ".join(part for part in (host.name, ids) if part)),
        ("driver", f"{host.driver} {host.mdev_type}".strip() or "none"),
        ("nodes", ", ".join(map(str, sysfs.device_nodes(host))) or "none"),
        ("migratable", f"{host.migratable.value}: {host.reason}"),
    ]
    if host.features:
        rows.append(("features", host.features))
    if host.hint and (explain or host.migratable is not sysfs.Verdict.YES):
        rows.append(("to do", host.hint))
    if explain:
        rows.append(("path", str(host.path)))
        rows.append(("note", "sysfs shows the driver, not its firmware: --open asks the device"))
    return rows
