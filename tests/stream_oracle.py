"""A second reader and writer of the native stream, from docs/stream-format.md and nothing else.

It imports no vfiomig and uses another xxHash, so a mistake in one of the two shows as a difference.
"""

import json
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

MAGIC = bytes.fromhex("89564d49470d0a1a")
MANIFEST, DATA, ZEROS, CONFIG, TRAILER = 1, 2, 3, 4, 5
PRE_COPY, CONTINUED = 1, 2
MAX_LENGTH = {
    MANIFEST: 64 << 10,
    DATA: 128 << 20,
    ZEROS: 128 << 20,
    CONFIG: 64 << 10,
    TRAILER: 4112,
}
MAX_CONFIG, MAX_DEVICES, MAX_DEPTH = 16 << 20, 256, 8
_PROLOGUE = struct.Struct("<8sIIQ32s")
_HEADER = struct.Struct("<4sBBHQQQ24s")
_U64 = struct.Struct("<Q")
_PCI_IDS = ("vendor_id", "device_id", "subsystem_vendor_id", "subsystem_device_id")
_IDENTITY = ("driver", "model", *_PCI_IDS)


class Refused(Exception):
    """What the page does not allow."""


@dataclass(frozen=True)
class Frame:
    """One frame. The fields that are None get the value the page asks for when it is written."""

    kind: int
    payload: bytes = b""
    flags: int = 0
    device: int = 0
    length: int | None = None
    sequence: int | None = None
    checksum: int | None = None
    reserved: bytes = bytes(24)
    padding: bytes | None = None


@dataclass(frozen=True)
class Stream:
    """What a sound stream says. frames: all of them, manifest and trailer included."""

    align: int
    manifest: dict[str, Any]
    states: list[bytes]
    config: bytes
    frames: list[Frame] = field(repr=False)


def data(payload: bytes, flags: int = 0, device: int = 0) -> Frame:
    return Frame(DATA, payload, flags, device)


def zeros(length: int, flags: int = 0, device: int = 0) -> Frame:
    return Frame(ZEROS, b"", flags, device, length)


def config(payload: bytes) -> Frame:
    return Frame(CONFIG, payload)


def manifest(devices: int = 1) -> dict[str, Any]:
    return {
        "created": "2026-11-23T05:30:00Z",
        "tool": "oracle",
        "devices": [
            {
                "name": f"device{index}",
                "protocol": "v2",
                "capabilities": ["STOP_COPY"],
                "stop_copy_length": None,
                "identity": dict.fromkeys(_IDENTITY, ""),
            }
            for index in range(devices)
        ],
    }


def _xxh3(content: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(content, seed)


def _padded(content: bytes, align: int) -> bytes:
    return content + bytes(-len(content) % align)


def prologue(
    align: int = 64, version: int = 1, flags: int = 0, reserved: bytes = bytes(32)
) -> bytes:
    head = _PROLOGUE.pack(MAGIC, version, align, flags, reserved)
    return _padded(head + _U64.pack(_xxh3(head)), align)


def write(
    frames: list[Frame],
    described: bytes | dict[str, Any] | None = None,
    *,
    align: int = 64,
    start: bytes | None = None,
    whole: bool = True,
) -> bytes:
    """Write any frames with valid links; with whole, the manifest and the trailer around them.

    What a frame sets itself is written as it says, however wrong, and the link covers it.
    """
    out = bytearray(prologue(align) if start is None else start)
    writer = _FrameWriter(align, int.from_bytes(out[56:64], "little"))
    if whole:
        text = described if isinstance(described, bytes) else json.dumps(described or manifest())
        out += writer.frame(Frame(MANIFEST, text if isinstance(text, bytes) else text.encode()))
        try:
            count = len(json.loads(text)["devices"])
        except (ValueError, TypeError, LookupError, RecursionError):
            count = 1
    for frame in frames:
        out += writer.frame(frame)
    if whole:
        out += writer.frame(Frame(TRAILER, writer.totals(count)))
    return bytes(out)


class _FrameWriter:
    def __init__(self, align: int, link: int) -> None:
        self._align, self._link, self._sequence = align, link, 0
        self._digests: dict[int, Any] = {}
        self._bytes: dict[int, int] = {}

    def totals(self, devices: int) -> bytes:
        totals = struct.pack("<QQ", self._sequence, devices)
        for index in range(devices):
            digest = self._digests.get(index)
            totals += struct.pack(
                "<QQ",
                self._bytes.get(index, 0),
                _xxh3(b"") if digest is None else digest.intdigest(),
            )
        return totals

    def frame(self, frame: Frame) -> bytes:
        length = len(frame.payload) if frame.length is None else frame.length
        right = self._checksum(frame, length)
        checksum = right if frame.checksum is None else frame.checksum
        sequence = self._sequence if frame.sequence is None else frame.sequence
        numbers = (frame.device, sequence, length, checksum)
        head = _HEADER.pack(b"VMfr", frame.kind, frame.flags, *numbers, frame.reserved)
        self._sequence += 1
        self._link = _xxh3(head, self._link)
        header = _padded(head + _U64.pack(self._link), self._align)
        if frame.padding is None:
            return header + _padded(frame.payload, self._align)
        return header + frame.payload + frame.padding

    def _checksum(self, frame: Frame, length: int) -> int:
        if frame.kind not in {DATA, ZEROS}:
            return _xxh3(frame.payload)
        digest = self._digests.setdefault(frame.device, xxhash.xxh3_64())
        state = bytes(min(length, MAX_LENGTH[ZEROS])) if frame.kind == ZEROS else frame.payload
        digest.update(state)
        self._bytes[frame.device] = self._bytes.get(frame.device, 0) + len(state)
        return int(digest.intdigest())


class _Cursor:
    """The bytes of the stream, taken from the front."""

    def __init__(self, content: bytes, align: int) -> None:
        self._content, self._align, self.at = content, align, 0

    def take(self, size: int) -> bytes:
        piece = self._content[self.at : self.at + size]
        _must(len(piece) == size, "the stream ends too early")
        self.at += size
        return piece

    def padding(self) -> None:
        _must(not any(self.take(-self.at % self._align)), "padding is not zero")


def _must(claim: bool, otherwise: str) -> None:  # noqa: FBT001
    if not claim:
        raise Refused(otherwise)


def read(content: bytes) -> Stream:
    """Read a whole stream. Raises Refused on anything the page does not allow."""
    _must(content[:8] == MAGIC, "magic")
    _must(len(content) >= 64, "the stream ends too early")
    _, version, align, flags, reserved = _PROLOGUE.unpack(content[:56])
    (link,) = _U64.unpack(content[56:64])
    _must(_xxh3(content[:56]) == link and version == 1, "checksum of the prologue, or version")
    _must(align in {64, 128, 256, 512, 1024, 2048, 4096}, "align")
    _must(flags == 0 and not any(reserved), "reserved bits of the prologue")
    cursor = _Cursor(content, align)
    cursor.take(64)
    cursor.padding()
    frames: list[Frame] = []
    described: dict[str, Any] = {}
    states: list[bytearray] = []
    digests: list[Any] = []
    blob = bytearray()
    while not frames or frames[-1].kind != TRAILER:
        frame, link = _frame(cursor, link, len(frames))
        _must((frame.kind == MANIFEST) == (not frames), "the manifest is frame 0, and only frame 0")
        if frame.kind == MANIFEST:
            described = _manifest(frame.payload)
            states = [bytearray() for _ in described["devices"]]
            digests = [xxhash.xxh3_64() for _ in states]
        elif frame.kind in {DATA, ZEROS}:
            _must(frame.device < len(states), "device")
            piece = bytes(frame.length or 0) if frame.kind == ZEROS else frame.payload
            states[frame.device] += piece
            digests[frame.device].update(piece)
            _must(digests[frame.device].intdigest() == frame.checksum, "running digest")
        elif frame.kind == CONFIG:
            blob += frame.payload
            _must(len(blob) <= MAX_CONFIG, "too much config")
        else:
            totals = struct.pack("<QQ", len(frames), len(states))
            for state, digest in zip(states, digests, strict=True):
                totals += struct.pack("<QQ", len(state), digest.intdigest())
            _must(frame.payload == totals, "totals")
        frames.append(frame)
    _must(cursor.at == len(content), "bytes behind the trailer")
    return Stream(align, described, [bytes(state) for state in states], bytes(blob), frames)


def _frame(cursor: _Cursor, link: int, index: int) -> tuple[Frame, int]:
    header = cursor.take(64)
    magic, kind, flags, device, sequence, length, checksum, reserved = _HEADER.unpack(header[:56])
    _must(magic == b"VMfr", "magic of a frame")
    (found,) = _U64.unpack(header[56:])
    _must(found == _xxh3(header[:56], link), "link")
    _must(kind in MAX_LENGTH, "kind")
    of_device = kind in {DATA, ZEROS}
    _must(flags & ~(PRE_COPY | CONTINUED if of_device else 0) == 0, "flags")
    _must(of_device or device == 0, "device of a frame that has none")
    _must(sequence == index, "sequence")
    _must(0 < length <= MAX_LENGTH[kind], "length")
    _must(not any(reserved), "reserved bits")
    cursor.padding()
    frame = Frame(kind, b"", flags, device, length, sequence, checksum)
    if kind != ZEROS:
        frame = replace(frame, payload=cursor.take(length))
        cursor.padding()
    if not of_device:
        _must(_xxh3(frame.payload) == checksum, "checksum of a payload")
    return frame, found


def _manifest(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _must(len({name for name, _ in pairs}) == len(pairs), "a name twice")
        return dict(pairs)

    def whole(literal: str) -> int:
        _must(len(literal) <= 20 and 0 <= int(literal) < 2**64, "number")
        return int(literal)

    def never(literal: str) -> None:
        raise Refused(f"number {literal}")

    no_others: dict[str, Any] = {"parse_float": never, "parse_constant": never}
    try:
        described: dict[str, Any] = json.loads(
            text.decode(), object_pairs_hook=once, parse_int=whole, **no_others
        )
        json.dumps(described, ensure_ascii=False).encode()  # no half surrogate pairs
    except (ValueError, RecursionError) as err:
        raise Refused(f"manifest: {err}") from err
    _must(isinstance(described, dict) and _depth(described) <= MAX_DEPTH, "manifest")
    try:
        _must(isinstance(described["created"], str) and isinstance(described["tool"], str), "text")
        _must(1 <= len(described["devices"]) <= MAX_DEVICES, "number of devices")
        for device in described["devices"]:
            _must(isinstance(device["name"], str), "name")
            _must(device["protocol"] in ("v1", "v2"), "protocol")
            v1 = device["protocol"] == "v1"
            _must(not v1 or type(device["region_bytes"]) is int, "region_bytes")
            names = device["capabilities"]
            _must(type(names) is list and all(type(name) is str for name in names), "capabilities")
            length = device["stop_copy_length"]
            _must(length is None or type(length) is int, "stop_copy_length")
            _must(all(isinstance(device["identity"][name], str) for name in _IDENTITY), "identity")
    except (LookupError, TypeError) as err:
        raise Refused(f"manifest: {err!r}") from err
    return described


def _depth(value: Any) -> int:  # noqa: ANN401
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
