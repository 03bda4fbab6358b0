"""QEMU's sections of one device on their way in. They carry no checksum and no total."""

from vfiomig._fastcopy import Digest, Outcome, StreamReader
from vfiomig.errors import StreamError, StreamMismatchError, UsageError
from vfiomig.framing import qemu
from vfiomig.framing.qemu import Section, SectionKind, Tag
from vfiomig.incoming.checked import Checked, FrameInfo, OnFrame, Tell


class QemuIncoming(Checked):
    """Only the form is checked: a file cut exactly between END and FULL looks whole."""

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
        self._part, self._data = self.section.part_template(), self.section.data_template()
        self.sound_bytes = reader.offset

    @property
    def digest(self) -> int:
        """The running digest of the device."""
        return self._digest.value

    def transfer(
        self, data_fd: int, on_frame: OnFrame | None = None, tell: Tell | None = None
    ) -> None:
        """Read PART sections, END, and FULL if there is one, to the end of the stream."""
        kind = SectionKind.PART
        while kind is SectionKind.PART:
            kind = self._section(data_fd, on_frame, tell)
        if self._reader.peek(1):
            self._full(on_frame)

    def _section(self, data_fd: int, on_frame: OnFrame | None, tell: Tell | None) -> SectionKind:
        kind = None
        if on_frame is None:  # at once: PART sections of one record, as pre-copy has them
            outcome = self._copy_frames(data_fd, self._part, self._digest, 0, tell)
            self._check_whole(outcome)
            kind = SectionKind.PART if outcome is Outcome.OTHER_TAIL else None
        if kind is None:
            kind = self._head(on_frame)
        while (tag := self._records(kind, data_fd, on_frame, tell)) is Tag.DATA:
            self._empty_record(on_frame)
        if tag not in qemu.ENDING:
            raise StreamError(
                f"{tag.name} in a {kind.name} section", offset=self._reader.offset - 8
            )
        self._expect(self.section.footer, "the footer")
        self.sound_bytes = self._reader.offset
        return kind

    def _head(self, on_frame: OnFrame | None) -> SectionKind:
        offset = self._reader.offset
        head = self._exactly(5, "the device's sections, before the END section")
        kinds = {self.section.head(kind): kind for kind in (SectionKind.PART, SectionKind.END)}
        kind = kinds.get(head)
        if kind is None:
            raise StreamError("neither PART nor END of this device begins here", offset=offset)
        self._sound(on_frame, FrameInfo(kind.name, offset, 0))
        return kind

    def _records(
        self, kind: SectionKind, data_fd: int, on_frame: OnFrame | None, tell: Tell | None
    ) -> Tag:
        """Copy DATA records. Returns the tag behind them: DATA for one that copy() refused."""
        outcome = Outcome.LIMIT_REACHED
        while outcome is Outcome.LIMIT_REACHED:
            frames = 1 if on_frame else 0
            outcome = self._copy_frames(data_fd, self._data, self._digest, frames, tell)
            self._check_whole(outcome)
            if outcome is Outcome.LIMIT_REACHED:
                reader = self._reader
                at, length = reader.frame_offset, reader.frame_bytes
                self._sound(on_frame, FrameInfo("DATA", at, length, ends_chunk=True))
        return self._tag(f"a {kind.name} section")

    def _sound(self, on_frame: OnFrame | None, frame: FrameInfo) -> None:
        self.sound_bytes = self._reader.offset
        if on_frame is not None:
            on_frame(frame)

    def _tag(self, where: str) -> Tag:
        offset = self._reader.offset
        return qemu.decode_tag(self._exactly(8, where), offset)

    def _empty_record(self, on_frame: OnFrame | None) -> None:
        offset = self._reader.offset - 8
        length = int.from_bytes(self._exactly(8, "the length of a DATA record"), "big")
        self._check_total(length, offset + 8)
        if length:
            raise StreamError("the stream ends inside a DATA record", offset=self._reader.offset)
        self._reader.sequence += 1
        self._sound(on_frame, FrameInfo("DATA", offset, 0))

    def _full(self, on_frame: OnFrame | None) -> None:
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
        length = len(self.config)
        self._sound(on_frame, FrameInfo(SectionKind.FULL.name, offset, length, detail="CONFIG"))

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
