"""The sections that QEMU writes for one VFIO device: tags, section headers, footers. Sans-I/O.

Sources: migration/savevm.c (sections) and hw/vfio/migration.c (tags) of QEMU 10.0; the layout was
compared with tests/data/qemu-10.0-mtty-2.sections.bin, which QEMU wrote. All integers big-endian.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from vfiomig._fastcopy import Template
from vfiomig.errors import StreamError, UsageError

STREAM_MAGIC = b"QEVM"  # a whole migration stream; QEMU_VM_FILE_MAGIC
FOOTER = 0x7E  # QEMU_VM_SECTION_FOOTER
_TAG_PREFIX = 0xFFFFFFFFEF10 << 16
INSTANCE_ID, VERSION_ID = 0, 1
# QEMU's own buffer, hw/vfio/migration.c; the record for each read is at most this long.
MAX_RECORD_BYTES = 1 << 20
# Ours: with the reported size alone as the buffer, a driver that reports 1000 bytes for a state of
# gigabytes makes QEMU read 1000 bytes at a time.
MIN_RECORD_BYTES = 64 << 10
# Ours. QEMU's config blob of a PCI device is 276 to 37 KiB; limits stand before any allocation.
MAX_CONFIG_BYTES = 1 << 20


class SectionKind(IntEnum):
    """QEMU_VM_SECTION_*."""

    START = 1
    PART = 2
    END = 3
    FULL = 4


class Tag(IntEnum):
    """VFIO_MIG_FLAG_*: the 64-bit words that begin each element of a payload."""

    END = _TAG_PREFIX | 1
    CONFIG = _TAG_PREFIX | 2
    SETUP = _TAG_PREFIX | 3
    DATA = _TAG_PREFIX | 4
    INIT_DATA_SENT = _TAG_PREFIX | 5
    CONFIG_LOAD_READY = _TAG_PREFIX | 6

    @property
    def encoded(self) -> bytes:
        """The tag as it travels: 8 bytes."""
        return self.to_bytes(8, "big")


# These stand where END would: they end the section's payload as well (hw/vfio/migration.c).
ENDING = frozenset({Tag.END, Tag.INIT_DATA_SENT, Tag.CONFIG_LOAD_READY})


def record_bytes(stop_copy_length: int | None) -> int:
    """Return how much one read asks for: QEMU's min(1 MiB, stop_copy_length), but sane."""
    if stop_copy_length is None:
        return MAX_RECORD_BYTES
    return min(MAX_RECORD_BYTES, max(MIN_RECORD_BYTES, stop_copy_length))


@dataclass(frozen=True, slots=True)
class Section:
    """The section of one device: all its parts carry the same id. idstr: the guest's address."""

    section_id: int
    idstr: str

    def __post_init__(self) -> None:
        if not 0 <= self.section_id < 1 << 32:
            raise UsageError(f"a section id of {self.section_id} does not fit into 32 bits")
        if not 0 < len(self.idstr.encode()) <= 255:
            raise UsageError(f"an idstr has 1 to 255 bytes, not {len(self.idstr.encode())}")

    def head(self, kind: SectionKind) -> bytes:
        """Return the section header: START and FULL name the device, PART and END do not."""
        short = struct.pack(">BI", kind, self.section_id)
        if kind in (SectionKind.PART, SectionKind.END):
            return short
        name = self.idstr.encode()
        return short + bytes([len(name)]) + name + struct.pack(">II", INSTANCE_ID, VERSION_ID)

    @property
    def footer(self) -> bytes:
        """The footer that QEMU puts behind every section."""
        return struct.pack(">BI", FOOTER, self.section_id)

    def start(self) -> bytes:
        """Return the whole START section: SETUP, END."""
        return self.head(SectionKind.START) + Tag.SETUP.encoded + self.end()

    def end(self) -> bytes:
        """Return what closes a section: the END tag and the footer."""
        return Tag.END.encoded + self.footer

    def empty_part(self) -> bytes:
        """Return the PART of a read that found nothing (vfio_save_iterate)."""
        return self.head(SectionKind.PART) + self.end()

    def full(self, config: bytes) -> bytes:
        """Return the FULL section with the config blob, which has no length of its own."""
        return self.head(SectionKind.FULL) + Tag.CONFIG.encoded + config + self.end()

    def part_template(self) -> Template:
        """Return how a chunk of PRE_COPY travels: a PART section with one DATA record."""
        head = self.head(SectionKind.PART) + Tag.DATA.encoded
        return Template(head + bytes(8), self.end(), length_at=len(head), big_endian=True)

    def data_template(self) -> Template:
        """Return how a chunk of STOP_COPY travels: a DATA record inside the END section."""
        return Template(Tag.DATA.encoded + bytes(8), length_at=8, big_endian=True)


def decode_tag(data: bytes, offset: int) -> Tag:
    """Return the tag that stands at offset. Raises StreamError."""
    number = int.from_bytes(data, "big")
    if len(data) < 8 or number not in list(Tag):
        raise StreamError(f"unknown tag {data.hex()}", offset=offset)
    return Tag(number)
