"""The native stream, version 1: docs/stream-format.md, in code. Sans-I/O."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from vfiomig._fastcopy import Template, xxh3_64
from vfiomig.errors import StreamError, StreamMismatchError

# The first byte is not ASCII and the line ends differ, so that a text transfer shows (as PNG does).
MAGIC = b"\x89VMIG\r\n\x1a"
VERSION = 1
FRAME_MAGIC = b"VMfr"
HEADER_BYTES = 64
# Ours: the largest read buffer, 128 MiB, makes the largest frame.
MAX_FRAME_BYTES = 128 << 20
# Ours: QEMU's config blob of a PCI device is 4181 bytes; limits stand before any allocation.
MAX_CONFIG_BYTES = 16 << 20
CONFIG_FRAME_BYTES = 64 << 10
MAX_DEVICES = 256
FILE_ALIGN, PIPE_ALIGN = 4096, 64

_PROLOGUE = struct.Struct("<8sIIQ32sQ")  # magic, version, align, flags, reserved, checksum
_HEADER = struct.Struct("<4sBBHQQQ24sQ")
_TOTALS = struct.Struct("<QQ")  # trailer: frames, devices; then for each device: bytes, digest
_KIND_AT, _FLAGS_AT, _SEQUENCE_AT, _LENGTH_AT, _CHECKSUM_AT, _CHAIN_AT = 4, 5, 8, 16, 24, 56


class FrameKind(IntEnum):
    """What a frame carries."""

    MANIFEST = 1
    DATA = 2
    ZEROS = 3
    CONFIG = 4
    TRAILER = 5


class FrameFlag(IntFlag):
    """Flags of a DATA or ZEROS frame."""

    PRE_COPY = 1 << 0  # read while the device was in PRE_COPY or PRE_COPY_P2P
    CONTINUED = 1 << 1  # the device's chunk goes on in its next frame


DEVICE_KINDS = frozenset({FrameKind.DATA, FrameKind.ZEROS})
_MAX_PAYLOAD = {
    FrameKind.MANIFEST: 64 << 10,
    FrameKind.DATA: MAX_FRAME_BYTES,
    FrameKind.ZEROS: MAX_FRAME_BYTES,
    FrameKind.CONFIG: CONFIG_FRAME_BYTES,
    FrameKind.TRAILER: _TOTALS.size * (1 + MAX_DEVICES),
}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A header that was checked. length: payload bytes, or zero bytes that stand for a payload."""

    kind: FrameKind
    flags: FrameFlag
    device: int
    sequence: int
    length: int
    checksum: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow in the stream, padding not counted."""
        return 0 if self.kind is FrameKind.ZEROS else self.length


@dataclass(frozen=True, slots=True)
class Trailer:
    """The totals. frames: all frames before the trailer. devices: bytes and digest of each."""

    frames: int
    devices: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        """Return the trailer's payload."""
        totals = (_TOTALS.pack(*device) for device in self.devices)
        return _TOTALS.pack(self.frames, len(self.devices)) + b"".join(totals)


def decode_trailer(data: bytes, offset: int) -> Trailer:
    """Parse the payload of a TRAILER frame that begins at offset. Raises StreamError."""
    pairs = [_TOTALS.unpack_from(data, at) for at in range(0, len(data) - 15, _TOTALS.size)]
    if not pairs or len(data) != _TOTALS.size * (1 + pairs[0][1]):
        raise StreamError(f"a trailer of {len(data)} bytes is not whole", offset=offset)
    return Trailer(pairs[0][0], tuple((size, digest) for size, digest in pairs[1:]))


def encode_prologue(align: int) -> tuple[bytes, int]:
    """Return the first align bytes of a stream, and the chain value that they begin."""
    head = _PROLOGUE.pack(MAGIC, VERSION, align, 0, bytes(32), 0)[:-8]
    chain = xxh3_64(head)
    return (head + chain.to_bytes(8, "little")).ljust(align, b"\0"), chain


def decode_prologue(data: bytes) -> tuple[int, int]:
    """Check the first 64 bytes of a stream. Returns align and the beginning of the chain.

    Raises StreamMismatchError when this is no such stream or a newer one, else StreamError.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise StreamMismatchError("this is not a vfiomig stream")
    if len(data) < _PROLOGUE.size:
        raise StreamError("the stream ends inside its first header", offset=len(data))
    _, version, align, flags, reserved, checksum = _PROLOGUE.unpack(data)
    if xxh3_64(data[:-8]) != checksum:
        raise StreamError("the first header is damaged", offset=0)
    if version != VERSION:
        raise StreamMismatchError(
            f"the stream has version {version}, and this vfiomig reads version {VERSION}",
            hint="load it with the version of vfiomig that wrote it, or a later one",
        )
    if flags or any(reserved):
        raise StreamError("reserved bits of the first header are set", offset=16)
    if align < HEADER_BYTES or align > FILE_ALIGN or align & (align - 1):
        raise StreamError(f"an alignment of {align}", offset=12)
    return align, checksum


def decode_header(data: bytes, offset: int, sequence: int, chain: int) -> FrameHeader:
    """Check the 64 bytes of a frame header that begins at offset.

    sequence, chain: what it must carry and follow. Raises StreamError.
    """
    magic, kind, flags, device, number, length, checksum, reserved, link = _HEADER.unpack(data)
    if magic != FRAME_MAGIC:
        raise StreamError("no frame begins here", offset=offset)
    if xxh3_64(data[:_CHAIN_AT], chain) != link:
        raise StreamError(
            f"the header of frame {sequence} is damaged or not the one that belongs here",
            offset=offset,
        )
    if number != sequence:
        raise StreamError(f"frame {number} where frame {sequence} belongs", offset=offset + 8)
    if kind not in list(FrameKind):
        raise StreamError(f"unknown kind of frame {kind}", offset=offset + 4)
    kind = FrameKind(kind)
    # A plain integer: ~ of an IntFlag knows only the bits that have names.
    allowed = int(FrameFlag.PRE_COPY | FrameFlag.CONTINUED) if kind in DEVICE_KINDS else 0
    if flags & ~allowed or any(reserved):
        raise StreamError("reserved bits are set", offset=offset + 5)
    if device and kind not in DEVICE_KINDS:
        raise StreamError(f"a {kind.name} frame of device {device}", offset=offset + 6)
    if length > _MAX_PAYLOAD[kind] or length == 0:
        raise StreamError(f"a {kind.name} frame of {length} bytes", offset=offset + 16)
    return FrameHeader(kind, FrameFlag(flags), device, number, length, checksum)


def next_chain(header: bytes) -> int:
    """Return the chain value that a header leaves behind."""
    return int.from_bytes(header[_CHAIN_AT:], "little")


def template(
    kind: FrameKind,
    align: int,
    *,
    flags: FrameFlag | int = 0,
    device: int = 0,
    elide_zeros: bool = True,
) -> Template:
    """Return how frames of this kind look to the copy loop, whether it writes or reads them.

    elide_zeros: DATA also stands for ZEROS, and a chunk with runs of zeros becomes several frames.
    """
    head = _HEADER.pack(FRAME_MAGIC, kind, flags, device, 0, 0, 0, bytes(24), 0)
    elide = elide_zeros and kind in DEVICE_KINDS
    return Template(
        head,
        align=align,
        length_at=_LENGTH_AT,
        sequence_at=_SEQUENCE_AT,
        checksum_at=_CHECKSUM_AT,
        chain_at=_CHAIN_AT,
        kind_at=_KIND_AT,
        zeros_kind=FrameKind.ZEROS if elide else -1,
        flags_at=_FLAGS_AT,
        continued=FrameFlag.CONTINUED if kind in DEVICE_KINDS else 0,
        largest_bytes=_MAX_PAYLOAD[kind],
    )
