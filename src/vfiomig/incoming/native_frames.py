"""A native stream on its way in: docs/stream-format.md."""

from vfiomig._fastcopy import Digest, Outcome, StreamReader, Template, xxh3_64
from vfiomig.errors import StreamError
from vfiomig.framing import manifest, native
from vfiomig.framing.native import FrameFlag, FrameHeader, FrameKind
from vfiomig.incoming.checked import Checked, FrameInfo, OnFrame, Tell


class NativeIncoming(Checked):
    """Headers are checked here one by one, but for runs of frames that look alike: in copy()."""

    framing = "native"
    section = None

    def __init__(self, reader: StreamReader, max_state_bytes: int) -> None:
        super().__init__(reader, max_state_bytes)
        data = reader.take(native.HEADER_BYTES)
        self._align, reader.chain = native.decode_prologue(data)
        self._expect(bytes(self._align - native.HEADER_BYTES), "the padding")
        offset = reader.offset
        header = self._next_header()
        if header.kind is not FrameKind.MANIFEST:
            raise StreamError(f"{header.kind.name} where the manifest belongs", offset=offset)
        self._take_header()
        self.manifest = manifest.decode(self._payload(header), reader.offset)
        count = len(self.manifest.devices)
        if not 0 < count <= native.MAX_DEVICES:
            raise StreamError(f"the manifest names {count} devices", offset=offset)
        self._digests = [Digest() for _ in range(count)]
        self._bytes = [0] * count
        self._templates: dict[tuple[int, FrameFlag], Template] = {}
        self.sound_bytes = reader.offset

    @property
    def digest(self) -> int:
        """The running digest of the first device."""
        return self._digests[0].value

    def transfer(
        self, data_fd: int, on_frame: OnFrame | None = None, tell: Tell | None = None
    ) -> None:
        """Read frames to the trailer, and the end behind it."""
        kind = FrameKind.MANIFEST
        while kind is not FrameKind.TRAILER:
            offset, header = self._reader.offset, self._next_header()
            kind = header.kind
            if kind in native.DEVICE_KINDS:
                self._device_frames(data_fd, header, offset, 1 if on_frame else 0, tell)
            else:
                self._take_header()
                self._own_frame(header, offset)
            self.sound_bytes = self._reader.offset
            if on_frame is not None:
                flags = ",".join(flag.name or "" for flag in FrameFlag if flag in header.flags)
                ends = kind in native.DEVICE_KINDS and FrameFlag.CONTINUED not in header.flags
                on_frame(FrameInfo(kind.name, offset, header.length, header.device, flags, ends))
        self._end()

    def _next_header(self) -> FrameHeader:
        """Check the next header, and its padding; it stays to be taken."""
        reader, offset = self._reader, self._reader.offset
        data = reader.peek(self._align)
        if len(data) < native.HEADER_BYTES:
            where = f"inside the header of frame {self.frames}" if data else "between two frames"
            raise StreamError(
                f"the stream ends {where}, before its trailer", offset=offset + len(data)
            )
        head, padding = data[: native.HEADER_BYTES], data[native.HEADER_BYTES :]
        header = native.decode_header(head, offset, reader.sequence, reader.chain)
        if any(padding):
            raise StreamError("the padding is damaged", offset=offset + native.HEADER_BYTES)
        if len(data) < self._align:
            raise StreamError("the stream ends inside the padding", offset=offset + len(data))
        return header

    def _take_header(self) -> None:
        head = self._reader.take(self._align)[: native.HEADER_BYTES]
        self._reader.chain = native.next_chain(head)
        self._reader.sequence += 1

    def _own_frame(self, header: FrameHeader, offset: int) -> None:
        if header.kind is FrameKind.CONFIG:
            if len(self.config) + header.length > native.MAX_CONFIG_BYTES:
                raise StreamError("the config blob is too large", offset=offset)
            self.config += self._payload(header)
        elif header.kind is FrameKind.TRAILER:
            self._trailer(header)
        else:
            raise StreamError(f"a second {header.kind.name}", offset=offset)

    def _payload(self, header: FrameHeader) -> bytes:
        offset = self._reader.offset
        data = self._exactly(header.length, f"a {header.kind.name} frame")
        if xxh3_64(data) != header.checksum:
            raise StreamError(f"the {header.kind.name} frame is damaged", offset=offset)
        self._expect(bytes(-header.length % self._align), "the padding")
        return data

    def _device_frames(
        self, data_fd: int, header: FrameHeader, offset: int, frames: int, tell: Tell | None
    ) -> None:
        """Copy the frame of this header, and those like it behind it: at most frames, if not 0."""
        if header.device >= len(self._digests):
            raise StreamError(f"device {header.device} is not in the manifest", offset=offset + 6)
        self._check_total(header.length, offset + 16)
        flags, before, reader = header.flags & FrameFlag.PRE_COPY, self.device_bytes, self._reader
        template, digest = self._template(header.device, flags), self._digests[header.device]
        unsound_bytes = 0
        try:
            self._check(self._copy_frames(data_fd, template, digest, frames, tell))
        except OSError as err:
            if self.refused_at is not None:
                self._check_refused(template, digest, err)
            raise
        except StreamError:
            unsound_bytes = reader.frame_bytes - reader.left_bytes
            raise
        finally:
            sound_bytes = self.device_bytes - before - unsound_bytes
            self._bytes[header.device] += sound_bytes
            self.pre_copy_bytes += sound_bytes if flags else 0

    def _template(self, device: int, flags: FrameFlag) -> Template:
        if (device, flags) not in self._templates:
            template = native.template(FrameKind.DATA, self._align, flags=flags, device=device)
            self._templates[device, flags] = template
        return self._templates[device, flags]

    def _check(self, outcome: Outcome) -> None:
        reader = self._reader
        self._check_whole(outcome)
        if outcome is Outcome.DAMAGED:
            raise StreamError(
                f"the state in frame {reader.sequence - 1} is damaged,"
                f" {reader.frame_bytes} bytes of it",
                offset=reader.frame_offset + self._align,
            )
        if outcome is Outcome.PADDING_DAMAGED:
            raise StreamError("the padding is damaged", offset=reader.offset)

    def _check_refused(self, template: Template, digest: Digest, refusal: OSError) -> None:
        """Raise StreamError when what the device refused was damaged on the way to it."""
        try:
            self._check(self._copy_frames(-1, template, digest, 1, None))
        except StreamError as damage:
            raise damage from refusal

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
