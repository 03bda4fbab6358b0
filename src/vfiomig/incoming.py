"""A stream on its way in: every header, length, order, checksum and total is checked here.

Payload goes from the reader's buffer straight to the device (or nowhere). What is wrong raises
StreamError with its offset; nothing is allocated by a number that a stream says.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from vfiomig._fastcopy import Digest, StreamReader, xxh3_64
from vfiomig.errors import StreamError, StreamMismatchError, UsageError
from vfiomig.framing import manifest, native, qemu
from vfiomig.framing.native import FrameFlag, FrameHeader, FrameKind
from vfiomig.framing.qemu import Section, SectionKind, Tag

# One record of QEMU's has no upper limit: between two such slices progress is told.
_SLICE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """One frame, section or record as it stands in the stream. offset: of its header.

    whole: False while its payload is still on its way, and not yet known to be sound.
    """

    kind: str
    offset: int
    length_bytes: int
    device: int = 0
    detail: str = ""
    whole: bool = True


OnFrame = Callable[[FrameInfo], None]


class Incoming(Protocol):
    """A stream whose beginning was read: it says of what device it is, and then gives the bytes."""

    framing: str
    frames: int
    device_bytes: int
    config: bytes

    @property
    def manifest(self) -> manifest.Manifest | None:
        """What a native stream says of itself."""
        ...

    @property
    def section(self) -> Section | None:
        """The section id and the idstr of QEMU's sections."""
        ...

    @property
    def digest(self) -> int:
        """XXH3-64 of the device's bytes so far."""
        ...

    def transfer(self, data_fd: int, on_frame: OnFrame | None = None) -> None:
        """Write the device's bytes to data_fd (-1: nowhere) and check the stream to its very end.

        on_frame is called for each frame once it is sound, and between slices of long ones.
        """
        ...


def open_incoming(reader: StreamReader, max_state_bytes: int) -> Incoming:
    """Find out the framing, and read what stands before the first byte of a device.

    Raises StreamError, StreamMismatchError, OSError.
    """
    first = reader.peek(native.HEADER_BYTES)
    if not first:
        raise StreamError("the stream is empty", offset=0)
    if first.startswith(native.MAGIC) or native.MAGIC.startswith(first):
        return NativeIncoming(reader, max_state_bytes)
    if first.startswith(qemu.STREAM_MAGIC):
        raise StreamMismatchError(
            "this is the migration stream of a whole QEMU machine",
            hint="vfiomig reads the sections of one VFIO device, cut out of such a stream",
        )
    if first[0] == SectionKind.START:
        return QemuIncoming(reader, max_state_bytes)
    raise StreamMismatchError("this is neither a vfiomig stream nor a QEMU section")


class _Checked:
    """What both framings need: exact reads, and a limit on the state."""

    def __init__(self, reader: StreamReader, max_state_bytes: int) -> None:
        self._reader, self._max_state_bytes = reader, max_state_bytes
        self.frames, self.device_bytes, self.config = 0, 0, b""

    def _exactly(self, count: int, what: str) -> bytes:
        data = b""
        while piece := self._reader.take(min(count - len(data), self._reader.buffer_bytes)):
            data += piece
        if len(data) < count:
            raise StreamError(f"the stream ends inside {what}", offset=self._reader.offset)
        return data

    def _expect(self, expected: bytes, what: str) -> None:
        offset = self._reader.offset
        if self._exactly(len(expected), what) != expected:
            raise StreamError(f"{what} is damaged", offset=offset)

    def _forward(self, data_fd: int, length: int, digest: Digest, tell: Callable[[], None]) -> None:
        left = length
        while left:
            count = min(left, _SLICE_BYTES)
            moved = self._reader.forward(data_fd, count, digest)
            self.device_bytes += moved
            if moved < count:
                raise StreamError(
                    f"the stream ends inside {length} bytes of state", offset=self._reader.offset
                )
            left -= moved
            if left:
                tell()

    def _check_total(self, length: int, offset: int) -> None:
        if self.device_bytes + length > self._max_state_bytes:
            raise StreamError(
                f"a length of {length} bytes makes more than the {self._max_state_bytes} that"
                " a state may have here",
                offset=offset,
                hint="raise the limit with --max-state if the device's state is really as large",
            )

    def _end(self) -> None:
        offset = self._reader.offset
        if self._reader.peek(1):
            raise StreamError("there are bytes after the end of the stream", offset=offset)


class NativeIncoming(_Checked):
    """A native stream: docs/stream-format.md."""

    framing = "native"
    section = None

    def __init__(self, reader: StreamReader, max_state_bytes: int) -> None:
        super().__init__(reader, max_state_bytes)
        data = reader.take(native.HEADER_BYTES)
        self._align, self._chain = native.decode_prologue(data)
        self._zeros(self._align - native.HEADER_BYTES)
        offset = reader.offset
        header = self._header()
        if header.kind is not FrameKind.MANIFEST:
            raise StreamError(f"{header.kind.name} where the manifest belongs", offset=offset)
        self.manifest = manifest.decode(self._payload(header), reader.offset)
        count = len(self.manifest.devices)
        if not 0 < count <= native.MAX_DEVICES:
            raise StreamError(f"the manifest names {count} devices", offset=offset)
        self._digests = [Digest() for _ in range(count)]
        self._bytes = [0] * count

    @property
    def digest(self) -> int:
        """The running digest of the first device."""
        return self._digests[0].value

    def transfer(self, data_fd: int, on_frame: OnFrame | None = None) -> None:
        """Read frames to the trailer, and the end behind it."""
        while True:
            offset = self._reader.offset
            header = self._header()
            info = FrameInfo(
                header.kind.name, offset, header.length, header.device, _flag_names(header.flags)
            )
            tell = on_frame or _nothing
            if header.kind in native.DEVICE_KINDS:
                on_its_way = partial(tell, replace(info, whole=False))
                self._device_frame(data_fd, header, offset, on_its_way)
            elif header.kind is FrameKind.CONFIG:
                self._config_frame(header, offset)
            elif header.kind is FrameKind.TRAILER:
                self._trailer(header)
                tell(info)
                return self._end()
            else:
                raise StreamError(f"a second {header.kind.name}", offset=offset)
            tell(info)

    def _header(self) -> FrameHeader:
        offset = self._reader.offset
        data = self._reader.take(native.HEADER_BYTES)
        if len(data) < native.HEADER_BYTES:
            where = (
                "between two frames" if not data else f"inside the header of frame {self.frames}"
            )
            raise StreamError(
                f"the stream ends {where}, before its trailer", offset=self._reader.offset
            )
        header = native.decode_header(data, offset, self.frames, self._chain)
        self._chain = native.next_chain(data)
        self._zeros(self._align - native.HEADER_BYTES)
        self.frames += 1
        return header

    def _zeros(self, count: int) -> None:
        self._expect(bytes(count), "the padding")

    def _payload(self, header: FrameHeader) -> bytes:
        offset = self._reader.offset
        data = self._exactly(header.length, f"a {header.kind.name} frame")
        if xxh3_64(data) != header.checksum:
            raise StreamError(f"the {header.kind.name} frame is damaged", offset=offset)
        self._pad(header.length)
        return data

    def _pad(self, length: int) -> None:
        self._zeros(-length % self._align)

    def _device_frame(
        self, data_fd: int, header: FrameHeader, offset: int, tell: Callable[[], None]
    ) -> None:
        if header.device >= len(self._digests):
            raise StreamError(f"device {header.device} is not in the manifest", offset=offset + 6)
        self._check_total(header.length, offset + 16)
        digest = self._digests[header.device]
        if header.kind is FrameKind.ZEROS:
            self._reader.zeros(data_fd, header.length, digest)
            self.device_bytes += header.length
        else:
            try:
                self._forward(data_fd, header.length, digest, tell)
            except OSError as err:
                if self._reader.failed_fd != data_fd:
                    raise
                self._check_refused(header, offset, digest, err)
                raise
        self._bytes[header.device] += header.length
        self._check_digest(header, offset, digest)
        self._pad(header.payload_bytes)

    def _check_digest(self, header: FrameHeader, offset: int, digest: Digest) -> None:
        if digest.value != header.checksum:
            raise StreamError(
                f"the state in frame {header.sequence} is damaged, {header.length} bytes of it",
                offset=offset + self._align,
            )

    def _check_refused(
        self, header: FrameHeader, offset: int, digest: Digest, refusal: OSError
    ) -> None:
        """Raise StreamError when what the device refused was damaged on the way to it."""
        left = offset + self._align + header.length - self._reader.offset
        try:
            if self._reader.forward(-1, left, digest) < left:
                raise StreamError("the stream ends inside a frame", offset=self._reader.offset)
            self._check_digest(header, offset, digest)
        except StreamError as damage:
            raise damage from refusal

    def _config_frame(self, header: FrameHeader, offset: int) -> None:
        if len(self.config) + header.length > native.MAX_CONFIG_BYTES:
            raise StreamError("the config blob is too large", offset=offset)
        self.config += self._payload(header)

    def _trailer(self, header: FrameHeader) -> None:
        offset = self._reader.offset
        trailer = native.decode_trailer(self._payload(header), offset)
        counted = tuple(
            (size, digest.value) for size, digest in zip(self._bytes, self._digests, strict=True)
        )
        if trailer.frames != self.frames - 1 or trailer.devices != counted:
            raise StreamError(
                "the totals in the trailer are not those of the stream", offset=offset
            )


class QemuIncoming(_Checked):
    """QEMU's sections of one device. They carry no checksum and no total: only the form is checked.

    A file that was cut exactly between END and FULL looks whole, without its config blob.
    """

    framing = "qemu"
    manifest = None

    def __init__(self, reader: StreamReader, max_state_bytes: int) -> None:
        super().__init__(reader, max_state_bytes)
        self._digest = Digest()
        head = self._exactly(6, "a section header")
        name = self._exactly(head[5], "a section header")
        try:
            self.section = Section(int.from_bytes(head[1:5], "big"), name.decode())
        except (UnicodeDecodeError, UsageError) as err:
            raise StreamMismatchError("this is no section of a VFIO device") from err
        if self.section.idstr != "vfio" and not self.section.idstr.endswith("/vfio"):
            raise StreamMismatchError(
                f"this section is of {self.section.idstr!r}, and that is no VFIO device"
            )
        rest = self.section.start()[6 + len(name) :]
        self._expect(rest, "the START section")

    @property
    def digest(self) -> int:
        """The running digest of the device."""
        return self._digest.value

    def transfer(self, data_fd: int, on_frame: OnFrame | None = None) -> None:
        """Read PART sections, END, and FULL if there is one, to the end of the stream."""
        tell = on_frame or _nothing
        kind = SectionKind.PART
        while kind is SectionKind.PART:
            kind = self._section(data_fd, tell)
        if self._reader.peek(1):
            self._full(tell)

    def _section(self, data_fd: int, tell: OnFrame) -> SectionKind:
        offset = self._reader.offset
        head = self._exactly(5, "the device's sections, before the END section")
        kinds = {self.section.head(kind): kind for kind in (SectionKind.PART, SectionKind.END)}
        kind = kinds.get(head)
        if kind is None:
            raise StreamError("neither PART nor END of this device begins here", offset=offset)
        tell(FrameInfo(kind.name, offset, 0))
        while (tag := self._tag(f"a {kind.name} section")) is Tag.DATA:
            self._record(data_fd, tell)
        if tag not in qemu.ENDING:
            raise StreamError(
                f"{tag.name} in a {kind.name} section", offset=self._reader.offset - 8
            )
        self._expect(self.section.footer, "the footer")
        return kind

    def _tag(self, where: str) -> Tag:
        offset = self._reader.offset
        return qemu.decode_tag(self._exactly(8, where), offset)

    def _record(self, data_fd: int, tell: OnFrame) -> None:
        offset = self._reader.offset - 8
        length = int.from_bytes(self._exactly(8, "the length of a DATA record"), "big")
        self._check_total(length, offset + 8)
        info = FrameInfo("DATA", offset, length)
        on_its_way = partial(tell, replace(info, whole=False))
        self._forward(data_fd, length, self._digest, on_its_way)
        self.frames += 1
        tell(info)

    def _full(self, tell: OnFrame) -> None:
        offset = self._reader.offset
        head = self.section.head(SectionKind.FULL)
        if self._exactly(len(head), "what follows the END section") != head:
            raise StreamError("bytes after the END section are no FULL section", offset=offset)
        tag = self._tag("the FULL section")
        if tag is Tag.CONFIG:
            self.config = self._config(offset)
        elif tag in qemu.ENDING:
            self._expect(self.section.footer, "the footer")
        else:
            raise StreamError(f"{tag.name} in a FULL section", offset=self._reader.offset - 8)
        self._end()
        tell(FrameInfo(SectionKind.FULL.name, offset, len(self.config), detail="CONFIG"))

    def _config(self, offset: int) -> bytes:
        # The blob has no length: it ends where the section does, and the section is the last one.
        closing = self.section.end()
        data = b""
        while piece := self._reader.take(min(64 << 10, self._reader.buffer_bytes)):
            data += piece
            if len(data) > qemu.MAX_CONFIG_BYTES + len(closing):
                raise StreamError("the config blob is too large", offset=offset)
        if not data.endswith(closing):
            raise StreamError(
                "the FULL section does not end where the stream does", offset=self._reader.offset
            )
        return data.removesuffix(closing)


def _flag_names(flags: FrameFlag) -> str:
    return ",".join(flag.name or "" for flag in FrameFlag if flag in flags)


def _nothing(_: FrameInfo) -> None:
    return None
