"""The legacy protocol v1: a device driven through its migration region, and as DeviceOps.

Source: struct vfio_device_migration_info and the comment above it, include/uapi/linux/vfio.h of
Linux 5.8 to 5.17; the header still has it, as VFIO_REGION_TYPE_MIGRATION_DEPRECATED. No driver of
the kernel ever spoke it: it lives in modules of vendors.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from vfiomig.channel import Chunks, DataChannel, PrecopyInfo
from vfiomig.errors import StaleChannelError
from vfiomig.fd import OwnedFd
from vfiomig.uapi import MIGRATION_INFO, Capability, DeviceState, MigrationInfoAt

if TYPE_CHECKING:
    from vfiomig.device import DeviceOps

# VFIO_DEVICE_STATE_V1_RUNNING, _SAVING and _RESUMING are bits 0 to 2; the others are kept as they
# are. Both SAVING and RESUMING is an error that only a reset leaves; 101 and 111 are invalid.
STATE_BITS = 0b111
BITS = {
    DeviceState.STOP: 0b000,
    DeviceState.RUNNING: 0b001,
    DeviceState.STOP_COPY: 0b010,
    DeviceState.PRE_COPY: 0b011,
    DeviceState.RESUMING: 0b100,
}
# Every v1 driver had to have both, though pre-copy may give nothing.
CAPABILITIES = Capability.STOP_COPY | Capability.PRE_COPY
_STATES = {bits: state for state, bits in BITS.items()}
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_SAVING = (DeviceState.PRE_COPY, DeviceState.STOP_COPY)


class MigrationRegion(Protocol):
    """The region of type 3, subtype 1. Offsets are from its beginning. Every call may block."""

    size_bytes: int

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read as pread() does: the number of bytes. Raises OSError."""
        ...

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write as pwrite() does: the number of bytes. Raises OSError."""
        ...

    def close(self) -> None:
        """Give up what was opened for it. The device is closed apart from that."""
        ...


class RegionOps:
    """DeviceOps by protocol v1. Owns lower, the device itself: it is reset and closed by that.

    A v1 device has STOP_COPY and PRE_COPY, which its drivers had to have, and no data_fd.
    """

    protocol = "v1"

    def __init__(self, name: str, region: MigrationRegion, lower: "DeviceOps") -> None:
        self._name, self._region, self.lower = name, region, lower
        self.region_bytes = region.size_bytes
        self._channel: RegionChannel | None = None

    def get_migration_flags(self) -> int:
        """Return what every v1 driver can do."""
        return CAPABILITIES

    def get_device_state(self) -> DeviceState:
        """Read device_state; what no state has (101, 110, 111) is ERROR."""
        return _STATES.get(self._read_state() & STATE_BITS, DeviceState.ERROR)

    def set_device_state(self, state: DeviceState) -> DataChannel | None:
        """Write device_state, its reserved bits as they were; a channel when a session starts."""
        if state not in BITS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        before = self.get_device_state()
        raw = self._read_state() & ~STATE_BITS | BITS[state]
        self._write(MigrationInfoAt.DEVICE_STATE, _U32.pack(raw))
        goes_on = before in _SAVING and state in _SAVING
        if self._channel is not None and not goes_on:
            self._channel.end()
            self._channel = None
        if goes_on or state not in (*_SAVING, DeviceState.RESUMING):
            return None
        self._channel = RegionChannel(self._name, self._region)
        return self._channel

    def get_data_size(self) -> int:
        """Return pending_bytes. Raises ENODATA unless the device is saving: it means nothing."""
        if self.get_device_state() not in _SAVING:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return read_number(self._region, MigrationInfoAt.PENDING_BYTES)

    def set_precopy_info_v2(self) -> bool:
        """Return False: v1 has no such thing."""
        return False

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_START: of the device itself, and of no protocol."""
        return self.lower.start_dma_logging(page_size_bytes, ranges)

    def stop_dma_logging(self) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP."""
        self.lower.stop_dma_logging()

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT."""
        self.lower.report_dma_logging(iova, length_bytes, page_size_bytes, bitmap)

    def reset_device(self) -> None:
        """VFIO_DEVICE_RESET."""
        self.lower.reset_device()
        if self._channel is not None:
            self._channel.end()
            self._channel = None

    def close(self) -> None:
        """Close the device."""
        self._region.close()
        self.lower.close()

    def _read_state(self) -> int:
        raw = bytearray(_U32.size)
        _check_all(self._region.read_into(raw, MigrationInfoAt.DEVICE_STATE), len(raw))
        state: int = _U32.unpack(raw)[0]
        return state

    def _write(self, offset: int, data: bytes) -> None:
        _check_all(self._region.write(data, offset), len(data))


class RegionChannel:
    """One session through the region: chunk after chunk, in a buffer as large as the region.

    Saving: read() gives the next chunk. Loading: what is written to fileno() gathers there, and
    submit() gives it to the device as one chunk. The buffer is a memfd, of which only what is used
    takes memory.
    """

    def __init__(self, device: str, region: MigrationRegion) -> None:
        self._device, self._region = device, region
        self._ended, self.pending_bytes = False, 0
        self._fd = OwnedFd(os.memfd_create("vfiomig-chunk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(self._fd.fileno(), region.size_bytes)
        # A chunk that does not fit is refused by write() itself (EPERM).
        fcntl.fcntl(self._fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self._map = mmap.mmap(self._fd.fileno(), region.size_bytes)
        self._chunk = memoryview(b"")
        self.chunks: Chunks | None = self

    def fileno(self) -> int:
        """Return where a chunk to load is gathered, still owned here."""
        if (fd := self._fd.fileno()) == -1:
            raise StaleChannelError(f"{self._device}: this data session has ended")
        return fd

    def read(self) -> memoryview:
        """Return the next chunk of a save, valid until the next call; empty: nothing now.

        Reading pending_bytes tells the device that the chunk before was taken; read again before
        data_offset, it tells nothing. Blocks until data is ready. Raises OSError: EPROTO when the
        numbers in the region cannot be.
        """
        self._check()
        self._chunk.release()
        self._chunk = memoryview(b"")
        self.pending_bytes = read_number(self._region, MigrationInfoAt.PENDING_BYTES)
        if not self.pending_bytes:
            return self._chunk
        offset = read_number(self._region, MigrationInfoAt.DATA_OFFSET)
        size = read_number(self._region, MigrationInfoAt.DATA_SIZE)
        self._check_place(offset, size)
        with memoryview(self._map) as whole:
            self._chunk = whole[:size]
        self._move(self._region.read_into, self._chunk, offset)
        return self._chunk

    def submit(self) -> None:
        """Give the device the chunk that was written to fileno(). Blocks. Raises OSError."""
        self._check()
        size = os.lseek(self.fileno(), 0, os.SEEK_CUR)
        os.lseek(self.fileno(), 0, os.SEEK_SET)
        offset = read_number(self._region, MigrationInfoAt.DATA_OFFSET)
        if size > self._region.size_bytes - offset:
            raise too_large(self._region.size_bytes - offset)
        self._check_place(offset, size)
        with memoryview(self._map) as whole, whole[:size] as chunk:
            self._move(self._region.write, chunk, offset)
        data = _U64.pack(size)
        _check_all(self._region.write(data, MigrationInfoAt.DATA_SIZE), len(data))

    def precopy_info(self) -> PrecopyInfo:
        """Return pending_bytes as what is left to be moved; v1 does not tell old from new."""
        self._check()
        return PrecopyInfo(read_number(self._region, MigrationInfoAt.PENDING_BYTES), 0)

    def failure(self) -> OSError | None:
        """Return why nothing more goes: the session has ended, or a chunk was left unfinished."""
        if self._ended:
            return OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if gathered := os.lseek(self.fileno(), 0, os.SEEK_CUR):
            return OSError(
                errno.EPROTO, f"the stream ends inside a chunk, {gathered} bytes into it"
            )
        return None

    @property
    def region_bytes(self) -> int:
        """The size of the region, which no chunk reaches."""
        return self._region.size_bytes

    def end(self) -> None:
        """End the session, as a state change or a reset does."""
        self._ended = True

    def close(self) -> None:
        """Free the buffer. The device's state stays."""
        self._chunk.release()
        self._map.close()
        self._fd.close()

    def _check(self) -> None:
        if self._ended:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def _move(self, move: Callable[[memoryview, int], int], chunk: memoryview, offset: int) -> None:
        at = 0
        while at < len(chunk):
            with chunk[at:] as left:
                moved = move(left, offset + at)
            _check_all(min(moved, 1), 1)
            at += moved

    def _check_place(self, offset: int, size: int) -> None:
        if not MIGRATION_INFO.size <= offset <= offset + size <= self.region_bytes or not size:
            raise OSError(
                errno.EPROTO,
                f"data_offset {offset} and data_size {size} do not lie in its migration region of"
                f" {self.region_bytes} bytes",
            )


def too_large(most_bytes: int) -> OSError:
    """Return the error for a chunk of more than most_bytes."""
    return OSError(
        errno.EMSGSIZE, f"a chunk is larger than the {most_bytes} bytes its region takes"
    )


def read_number(region: MigrationRegion, offset: int) -> int:
    """Return one 64-bit register of the region. Raises OSError; EIO for a short read."""
    raw = bytearray(_U64.size)
    _check_all(region.read_into(raw, offset), len(raw))
    value: int = _U64.unpack(raw)[0]
    return value


def _check_all(moved: int, wanted: int) -> None:
    # A register is read and written whole or not at all: a short count is an error of the device.
    if moved != wanted:
        raise OSError(errno.EIO, f"{moved} of {wanted} bytes at its migration region")
