"""The frames of one device on their way out, in either framing, around one FrameWriter."""

from typing import Protocol

from vfiomig._fastcopy import Digest, FrameWriter, Template
from vfiomig.errors import UsageError
from vfiomig.framing import native, qemu
from vfiomig.framing.manifest import Manifest
from vfiomig.framing.native import FrameFlag, FrameKind


class Outgoing(Protocol):
    """What save() tells a framing, in this order; its templates frame what lies between."""

    pre_copy: Template
    stop_copy: Template

    def begin(self) -> None:
        """Write what stands before the first byte of the device."""
        ...

    def drained(self) -> None:
        """Say that a read in PRE_COPY found nothing."""
        ...

    def begin_stop_copy(self) -> None:
        """Say that the bytes from here on were read in STOP_COPY."""
        ...

    def end(self, config: bytes, digest: Digest | None) -> None:
        """Write the config blob and what makes the stream whole."""
        ...


class NativeOutgoing:
    """docs/stream-format.md. Digest is not optional here."""

    def __init__(
        self, writer: FrameWriter, manifest: Manifest, align: int, *, elide_zeros: bool
    ) -> None:
        self._writer, self._manifest, self._align = writer, manifest, align
        templates = [
            native.template(FrameKind.DATA, align, flags=flags, elide_zeros=elide_zeros)
            for flags in (FrameFlag.PRE_COPY, FrameFlag(0))
        ]
        self.pre_copy, self.stop_copy = templates

    def begin(self) -> None:
        """Write the prologue and the manifest."""
        manifest = self._manifest.encode()
        if len(manifest) > self._writer.buffer_bytes:
            raise UsageError(
                f"a manifest of {len(manifest)} bytes does not fit into a buffer of"
                f" {self._writer.buffer_bytes}"
            )
        prologue, self._writer.chain = native.encode_prologue(self._align)
        self._writer.put(prologue)
        self._put(FrameKind.MANIFEST, manifest)

    def drained(self) -> None:
        """Write nothing."""

    def begin_stop_copy(self) -> None:
        """Write nothing: each frame says in which state it was read."""

    def end(self, config: bytes, digest: Digest | None) -> None:
        """Write the config blob, in as many frames as it takes, and the trailer."""
        step = min(native.CONFIG_FRAME_BYTES, self._writer.buffer_bytes)
        for at in range(0, len(config), step):
            self._put(FrameKind.CONFIG, config[at : at + step])
        totals = ((self._writer.device_bytes, digest.value),) if digest else ()
        self._put(FrameKind.TRAILER, native.Trailer(self._writer.sequence, totals).encode())

    def _put(self, kind: FrameKind, payload: bytes) -> None:
        self._writer.put_frame(native.template(kind, self._align), payload)


class QemuOutgoing:
    """QEMU's sections of one device: START, PART…, END, and FULL when there is a config blob."""

    def __init__(self, writer: FrameWriter, section: qemu.Section) -> None:
        self._writer, self._section = writer, section
        self.pre_copy, self.stop_copy = section.part_template(), section.data_template()

    def begin(self) -> None:
        """Write the START section."""
        self._writer.put(self._section.start())

    def drained(self) -> None:
        """Write an empty PART, as QEMU does for a read that found nothing."""
        self._writer.put(self._section.empty_part())

    def begin_stop_copy(self) -> None:
        """Open the END section: its DATA records follow."""
        self._writer.put(self._section.head(qemu.SectionKind.END))

    def end(self, config: bytes, digest: Digest | None) -> None:
        """Close the END section; write FULL when there is a config blob."""
        self._writer.put(self._section.end())
        if config:
            self._writer.put(self._section.full(config))
