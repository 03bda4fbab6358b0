"""Say whether the state of SOURCE would fit into DESTINATION. Exit code 0 when it does, 12 if not.

Each is a device, a stream written by `vfiomig save`, or a file with what `vfiomig info DEVICE
--json` printed on another host: an existing regular file is a stream or JSON, all else a device. A
device of this host is not opened, unless --open is given; sysfs need not show its capabilities.

examples:
  vfiomig check 'sim:?profile=mlx5' 'sim:?profile=virtio'
  vfiomig check vf0.vmig 0000:3b:00.2
  vfiomig check unix:/run/vf0.sock there.json --allow-mismatch subsystem_device_id
"""

import argparse
import os
from typing import Any

from vfiomig.backends import open_device, opens_by_name
from vfiomig.cli import arguments
from vfiomig.cli.output import Output, table
from vfiomig.device import Device
from vfiomig.errors import (
    IncompatibleError,
    LocalIOError,
    StreamError,
    StreamMismatchError,
    UsageError,
)
from vfiomig.fit import ALLOWED_FIELDS, doubt, incompatible, misfits
from vfiomig.framing import strict_json
from vfiomig.framing.manifest import DeviceEntry
from vfiomig.identity import Identity
from vfiomig.uapi import Capability

# Ours: what info prints has less than 2000 bytes.
_MAX_JSON_BYTES = 64 << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("source", metavar="SOURCE", help="a device, a stream, or JSON of info")
    parser.add_argument("destination", metavar="DESTINATION", help="likewise")
    parser.add_argument(
        "--allow-mismatch",
        type=arguments.typed(_fields),
        default=frozenset(),
        metavar="FIELD,…",
        help=f"these may differ: {', '.join(sorted(ALLOWED_FIELDS))}",
    )
    parser.add_argument("--open", action="store_true", help="open devices of this host and ask")


def run(args: argparse.Namespace, out: Output) -> int:
    """Check. Returns 0 or 12."""
    source, destination = (
        _entry(name, out, opening=args.open) for name in (args.source, args.destination)
    )
    every = misfits(source, destination)
    wrong = misfits(source, destination, allow=args.allow_mismatch)
    unknown = doubt(source, destination)
    values = {
        "fits": not wrong,
        "source": source.name,
        "destination": destination.name,
        "fields": [one._asdict() | {"allowed": one not in wrong} for one in every],
        "unchecked": unknown,
        "hint": incompatible([(source.name, destination.name, wrong)]).hint,
    }
    verdict = f"{destination.name} fits {source.name}"
    if wrong:
        verdict = f"{destination.name} does not fit {source.name}"
    elif unknown:
        verdict += ", as far as they tell"
    rows = [("field", "source", "destination", "")] * bool(every)
    rows += [(*one, "" if one in wrong else "allowed") for one in every]
    lines = [verdict, table(rows, indent="  "), f"  {unknown}" if unknown else ""]
    if wrong and values["hint"]:
        lines.append(f"  hint: {values['hint']}")
    out.answer(values, "\n".join(filter(None, lines)))
    return IncompatibleError.code if wrong else 0


def _fields(text: str) -> frozenset[str]:
    found = frozenset(name.strip() for name in text.split(","))
    if unknown := found - ALLOWED_FIELDS:
        raise UsageError(f"no such field: {', '.join(sorted(unknown))}")
    return found


def _entry(name: str, out: Output, *, opening: bool) -> DeviceEntry:
    if not name.startswith("sim:") and os.path.isfile(name):
        return _of_file(name)
    if not opens_by_name(name):
        with open_device(name) as device:
            return _of_device(device)
    if opening:
        with arguments.opened(name, out) as device:
            return _of_device(device)
    from vfiomig import sysfs
    from vfiomig.backends import kernel

    host = sysfs.find(name)
    return DeviceEntry(host.name, kernel.identity_of(host), _capabilities(host.features))


def _of_device(device: Device) -> DeviceEntry:
    return DeviceEntry(
        device.name,
        device.identity,
        device.capabilities.names,
        protocol=device.protocol,
        region_bytes=device.region_bytes,
    )


def _of_file(name: str) -> DeviceEntry:
    try:
        with open(name, "rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except OSError as err:
        raise LocalIOError(f"{name}: {err.strerror}", errno=err.errno) from err
    if not data.lstrip().startswith(b"{"):
        return _of_stream(name)
    if len(data) > _MAX_JSON_BYTES:
        raise StreamMismatchError(f"{name}: it is too long for what info prints")
    try:
        return _of_values(_last_document(data), name)
    except ValueError as err:
        raise StreamMismatchError(
            f"{name}: it is not what info prints: {err}", hint="vfiomig info DEVICE --json > FILE"
        ) from err


def _last_document(data: bytes) -> Any:  # noqa: ANN401  JSON: its fields are looked at one by one
    try:
        return strict_json.loads(data)
    except ValueError:
        lines = data.strip().splitlines()
        if len(lines) == 1:
            raise
        return strict_json.loads(lines[-1])  # with --open, a warning stands before it


def _of_values(plain: Any, path: str) -> DeviceEntry:  # noqa: ANN401
    def text(*names: str) -> str:
        found = [plain[name] for name in names if isinstance(plain.get(name), str)]
        return found[0] if found else ""

    name = strict_json.field(plain, "name", str)
    driver = strict_json.field(plain, "driver", str)
    ids = [text(field) for field in Identity.__slots__[2:]]
    # A device of a host that was not opened has features instead, if debugfs could be read there.
    names = _capabilities(text("features"))
    if "capabilities" in plain:
        names = tuple(str(item) for item in strict_json.field(plain, "capabilities", list))
    identity = Identity(driver, text("model", "mdev_type"), *ids)
    protocol = text("protocol") or "v2"
    region_bytes = strict_json.field(plain, "region_bytes", int) if protocol == "v1" else 0
    return DeviceEntry(f"{name} ({path})", identity, names, None, protocol, region_bytes)


def _capabilities(features: str) -> tuple[str, ...]:
    """Return the names of what debugfs lists: "stop-copy p2p pre-copy"."""
    names = features.upper().replace("-", "_").split()
    return tuple(bit.name for bit in Capability if bit.name in names)


def _of_stream(name: str) -> DeviceEntry:
    from vfiomig._fastcopy import StreamReader
    from vfiomig.incoming import open_incoming
    from vfiomig.options import DEFAULT_BUFFER_BYTES, DEFAULT_MAX_STATE_BYTES
    from vfiomig.transport import open_source

    with open_source(name) as stream:
        reader = StreamReader(stream.fileno(), DEFAULT_BUFFER_BYTES)
        try:
            manifest = open_incoming(reader, DEFAULT_MAX_STATE_BYTES).manifest
        except (StreamError, StreamMismatchError) as err:
            err.name_stream(name)
            raise
        except OSError as err:
            raise stream.failed(err) from err
    if manifest is None:
        raise StreamMismatchError(f"{name}: QEMU's sections do not say of what device they are")
    if len(manifest.devices) != 1:
        raise StreamMismatchError(f"{name} holds {len(manifest.devices)} devices, not one")
    entry = manifest.devices[0]
    return DeviceEntry(f"{entry.name} ({name})", entry.identity, entry.capabilities)
