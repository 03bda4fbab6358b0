"""The manifest of a native stream: what device the bytes are of. Strict JSON, small, untrusted."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from vfiomig.errors import StreamError
from vfiomig.framing.strict_json import field, loads
from vfiomig.identity import Identity

# Ours: a manifest of one device is 400 bytes; the limit stands before anything is parsed.
MAX_MANIFEST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device of a manifest. stop_copy_length: the device's estimate in bytes, None if none.

    region_bytes: of protocol v1, the size of its migration region; else 0.
    """

    name: str
    identity: Identity
    capabilities: tuple[str, ...] = ()
    stop_copy_length: int | None = None
    protocol: str = "v2"
    region_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in the stream. created: UTC, ISO 8601. tool: who wrote it."""

    created: str
    tool: str
    devices: tuple[DeviceEntry, ...]

    def encode(self) -> bytes:
        """Return the manifest as JSON in UTF-8."""
        values = {
            "created": self.created,
            "tool": self.tool,
            "devices": [entry_values(entry) for entry in self.devices],
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, offset: int) -> Manifest:
    """Parse a manifest that begins at byte offset of the stream. Raises StreamError.

    Unknown fields are passed over, so that later versions may add some.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise StreamError(f"a manifest of {len(data)} bytes", offset=offset)
    try:
        plain = loads(data)
        devices = tuple(decode_entry(entry) for entry in field(plain, "devices", list))
        return Manifest(field(plain, "created", str), field(plain, "tool", str), devices)
    except ValueError as err:
        raise StreamError(f"the manifest is not what it should be: {err}", offset=offset) from err


def entry_values(entry: DeviceEntry) -> dict[str, Any]:
    """Return one device as plain values for JSON; decode_entry() reads them."""
    values = asdict(entry)
    if entry.protocol == "v2":
        del values["region_bytes"]
    return values


def decode_entry(plain: object) -> DeviceEntry:
    """Make one device of plain values that strict_json.loads gave. Raises ValueError."""
    identity = field(plain, "identity", dict)
    fields = [str(field(identity, name, str)) for name in Identity.__slots__]
    length = plain.get("stop_copy_length", "") if isinstance(plain, dict) else ""
    if length is not None and type(length) is not int:  # bool is an int
        raise ValueError("stop_copy_length is neither null nor a whole number")
    names = tuple(field(plain, "capabilities", list))
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a capability is no text")
    protocol = field(plain, "protocol", str)
    if protocol not in ("v1", "v2"):
        raise ValueError("the protocol is neither v1 nor v2")
    region_bytes = field(plain, "region_bytes", int) if protocol == "v1" else 0
    name = field(plain, "name", str)
    return DeviceEntry(name, Identity(*fields), names, length, protocol, region_bytes)
