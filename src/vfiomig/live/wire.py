"""The bytes of a session: docs/session-protocol.md, in code. Sans-I/O.

A frame looks as in a native stream, but for its magic: the copy loop serves both. Each connection
begins with a greeting of 64 bytes each way; then come frames of numbered streams.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from vfiomig._fastcopy import Template, xxh3_64
from vfiomig.errors import PeerError, StreamMismatchError
from vfiomig.framing import native
from vfiomig.framing.native import FrameFlag

MAGIC = b"\x89VMGS\r\n\x1a"
FRAME_MAGIC = b"VMse"
VERSION, OLDEST = 1, 1
GREETING_BYTES = HEADER_BYTES = ALIGN = 64
SESSION_BYTES = 16
# The stream that is no device's. Devices have 0 to 255.
CONTROL = 0xFFFF
MAX_MESSAGE_BYTES = 64 << 10
MAX_CONNECTIONS = 64

_GREETING = struct.Struct("<8sIIHH16s16sIQ")
_HEADER = struct.Struct("<4sBBHQQQ24sQ")
_LENGTH_AT, _SEQUENCE_AT, _CHECKSUM_AT, _CHAIN_AT = 16, 8, 24, 56


class Kind(IntEnum):
    """What a frame of a session carries; DATA and ZEROS as in a native stream."""

    MESSAGE = 1  # JSON
    DATA = 2
    ZEROS = 3
    PROBE = 4  # dropped by the receiver: to measure the link


_MAX_PAYLOAD = {
    Kind.MESSAGE: MAX_MESSAGE_BYTES,
    Kind.DATA: native.MAX_FRAME_BYTES,
    Kind.ZEROS: native.MAX_FRAME_BYTES,
    Kind.PROBE: 1 << 20,
}


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first 64 bytes each way of each connection.

    version, oldest: the newest and the oldest version spoken. index, count: which connection of how
    many. session: 16 random bytes, the source's choice. token: zeros on connection 0; on others
    what the destination gave in its hello, so that no stranger joins a session.
    """

    session: bytes
    index: int = 0
    count: int = 1
    token: bytes = bytes(SESSION_BYTES)
    version: int = VERSION
    oldest: int = OLDEST

    def encode(self) -> bytes:
        """Return the 64 bytes."""
        fields = (self.version, self.oldest, self.index, self.count, self.session, self.token)
        head = _GREETING.pack(MAGIC, *fields, 0, 0)[:-8]
        return head + xxh3_64(head).to_bytes(8, "little")


def decode_greeting(data: bytes, peer: str) -> Greeting:
    """Check a greeting. peer: for messages. Raises PeerError: a stranger, or damage.

    StreamMismatchError: there is no version that both speak.
    """
    if len(data) < GREETING_BYTES or data[: len(MAGIC)] != MAGIC:
        raise PeerError(
            f"{peer} does not speak vfiomig's session protocol",
            hint="is it vfiomig at the other end, and is TLS on or off at both?",
        )
    _, version, oldest, index, count, session, token, reserved, checksum = _GREETING.unpack(data)
    if xxh3_64(data[:-8]) != checksum:
        raise PeerError(f"the greeting of {peer} is damaged")
    if min(version, VERSION) < max(oldest, OLDEST):
        raise StreamMismatchError(
            f"{peer} speaks versions {oldest} to {version} of the session protocol,"
            f" and this vfiomig {OLDEST} to {VERSION}",
            hint="install versions of vfiomig on both hosts that have one in common",
        )
    # What a newer version puts into reserved bytes it must not need from an older one.
    if version == VERSION and reserved:
        raise PeerError(f"the greeting of {peer} has reserved bits set")
    if not 0 <= index < count <= MAX_CONNECTIONS:
        raise PeerError(f"{peer} greets as connection {index} of {count}")
    return Greeting(session, index, count, token, version, oldest)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A frame's header that was checked. stream: CONTROL, or the index of a device."""

    kind: Kind
    flags: FrameFlag
    stream: int
    sequence: int
    length: int
    checksum: int


def stream_of(header: bytes) -> int:
    """Return the stream that a header says it is of, before anything is checked."""
    return int.from_bytes(header[6:8], "little")


def first_chain(session: bytes, stream: int, *, from_source: bool) -> int:
    """Return what the links of a stream begin with: no frame passes for one of another session."""
    return xxh3_64(session, stream << 1 | from_source)


def decode_header(data: bytes, peer: str, sequence: int, chain: int) -> FrameHeader:
    """Check the 64 bytes of a frame header. sequence, chain: what it must carry and follow.

    Raises PeerError.
    """
    magic, kind, flags, stream, number, length, checksum, reserved, link = _HEADER.unpack(data)
    if magic != FRAME_MAGIC or xxh3_64(data[:_CHAIN_AT], chain) != link:
        raise PeerError(
            f"{peer}: the header of frame {sequence} is damaged or not the one that belongs here"
        )
    if number != sequence or kind not in list(Kind) or any(reserved):
        raise PeerError(f"{peer}: frame {number} where {sequence} belongs, of kind {kind}")
    kind = Kind(kind)
    allowed = int(FrameFlag.PRE_COPY | FrameFlag.CONTINUED) if kind in (2, 3) else 0
    if flags & ~allowed or not 0 < length <= _MAX_PAYLOAD[kind]:
        raise PeerError(f"{peer}: a {kind.name} frame of {length} bytes, flags {flags:#x}")
    return FrameHeader(kind, FrameFlag(flags), stream, number, length, checksum)


def next_chain(header: bytes) -> int:
    """Return the chain value that a header leaves behind."""
    return int.from_bytes(header[_CHAIN_AT:HEADER_BYTES], "little")


def template(
    kind: Kind, stream: int, *, flags: FrameFlag | int = 0, elide_zeros: bool = True
) -> Template:
    """Return how frames of this kind look to the copy loop, whether it writes or reads them."""
    elide = elide_zeros and kind is Kind.DATA
    head = _HEADER.pack(FRAME_MAGIC, kind, flags, stream, 0, 0, 0, bytes(24), 0)
    return Template(
        head,
        align=ALIGN,
        length_at=_LENGTH_AT,
        sequence_at=_SEQUENCE_AT,
        checksum_at=_CHECKSUM_AT,
        chain_at=_CHAIN_AT,
        kind_at=4,
        zeros_kind=Kind.ZEROS if elide else -1,
        flags_at=5,
        continued=FrameFlag.CONTINUED if elide else 0,
        largest_bytes=_MAX_PAYLOAD[kind],
    )
