"""A stream on its way in: every header, length, order, checksum and total is checked here.

Payload goes from the reader's buffer straight to the device (or nowhere). What is wrong raises
StreamError with its offset; nothing is allocated by a number that a stream says.
"""

from typing import Protocol

from vfiomig._fastcopy import StreamReader
from vfiomig.errors import StreamError, StreamMismatchError
from vfiomig.framing import manifest, native, qemu
from vfiomig.framing.qemu import Section, SectionKind
from vfiomig.incoming.checked import OnFrame, Tell
from vfiomig.incoming.native_frames import NativeIncoming
from vfiomig.incoming.qemu_sections import QemuIncoming


class Incoming(Protocol):
    """A stream whose beginning was read: it says of what device it is, and then gives the bytes.

    sound_bytes: how far into the stream all is right. pre_copy_bytes: of device_bytes.
    refused_at: the byte of state that a device refused, None while it has not.
    """

    framing: str
    config: bytes
    sound_bytes: int
    pre_copy_bytes: int
    refused_at: int | None

    @property
    def manifest(self) -> manifest.Manifest | None:
        """What a native stream says of itself."""
        ...

    @property
    def section(self) -> Section | None:
        """The section id and the idstr of QEMU's sections."""
        ...

    @property
    def frames(self) -> int:
        """Frames (native) or DATA records (qemu) so far."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes of the devices' state so far."""
        ...

    @property
    def zero_bytes(self) -> int:
        """Of device_bytes, those that travelled as runs of zeros."""
        ...

    @property
    def digest(self) -> int:
        """XXH3-64 of the device's bytes so far."""
        ...

    def transfer(
        self, data_fd: int, on_frame: OnFrame | None = None, tell: Tell | None = None
    ) -> None:
        """Write the device's bytes to data_fd (-1: nowhere) and check the stream to its very end.

        on_frame is called for each frame once it is sound; tell now and then. What they raise ends
        the transfer. Raises StreamError, OSError.
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
