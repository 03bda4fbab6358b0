"""The manifest of a native stream: what device the bytes are of. Strict JSON, small, untrusted."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from vfiomig.errors import StreamError
from vfiomig.identity import Identity

# Ours: a manifest of one device is 400 bytes; the limit stands before anything is parsed.
MAX_MANIFEST_BYTES = 64 << 10
MAX_DEPTH = 8
_MAX_INTEGER = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device of a manifest. stop_copy_length: the device's estimate in bytes, None if none."""

    name: str
    identity: Identity
    capabilities: tuple[str, ...] = ()
    stop_copy_length: int | None = None
    protocol: str = "v2"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in the stream. created: UTC, ISO 8601. tool: who wrote it."""

    created: str
    tool: str
    devices: tuple[DeviceEntry, ...]

    def encode(self) -> bytes:
        """Return the manifest as JSON in UTF-8."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, offset: int) -> Manifest:
    """Parse a manifest that begins at byte offset of the stream. Raises StreamError.

    Unknown fields are passed over, so that later versions may add some.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise StreamError(f"a manifest of {len(data)} bytes", offset=offset)
    try:
        plain = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        _check_depth(plain, MAX_DEPTH)
        # Half a surrogate pair is no text: it could not even be printed. UnicodeEncodeError.
        json.dumps(plain, ensure_ascii=False).encode()
        devices = tuple(_entry(entry) for entry in _of(plain, "devices", list))
        return Manifest(_of(plain, "created", str), _of(plain, "tool", str), devices)
    except (ValueError, RecursionError) as err:
        raise StreamError(f"the manifest is not what it should be: {err}", offset=offset) from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _integer(text: str) -> int:
    # Twenty digits hold 2**64; int() of a longer text takes time that grows with its square.
    if len(text) > 20 or not 0 <= int(text) <= _MAX_INTEGER:
        raise ValueError(f"a number of {len(text)} characters is out of range")
    return int(text)


def _no_number(text: str) -> Any:  # noqa: ANN401  the signature json.loads asks for
    raise ValueError(f"{text[:20]} is no whole number")


def _check_depth(value: object, depth: int) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if depth == 0:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        for item in value:
            _check_depth(item, depth - 1)


def _of(plain: object, name: str, kind: type) -> Any:  # noqa: ANN401  JSON, checked right here
    value = plain.get(name) if isinstance(plain, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{name} is missing or is no {kind.__name__}")
    return value


def _entry(plain: object) -> DeviceEntry:
    identity = _of(plain, "identity", dict)
    fields = [str(_of(identity, name, str)) for name in Identity.__slots__]
    length = plain.get("stop_copy_length", "") if isinstance(plain, dict) else ""
    if length is not None and type(length) is not int:  # bool is an int
        raise ValueError("stop_copy_length is neither null nor a whole number")
    names = tuple(_of(plain, "capabilities", list))
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a capability is no text")
    if _of(plain, "protocol", str) != "v2":
        raise ValueError("the protocol is not v2")
    return DeviceEntry(_of(plain, "name", str), Identity(*fields), names, length)
