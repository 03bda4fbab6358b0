"""A simulated device of protocol v1: its migration region, a real file, over a device of v2.

What the region's registers say and do is the contract of linux/vfio.h before 5.18; the state, its
faults and its pace are those of the device underneath.
"""

import errno
import os
import struct
from collections import deque
from contextlib import suppress

from vfiomig import states
from vfiomig.device import DeviceOps
from vfiomig.fd import OwnedFd
from vfiomig.region import BITS, CAPABILITIES, STATE_BITS
from vfiomig.simulator.session import Session, os_error
from vfiomig.uapi import MIGRATION_INFO, DeviceState, MigrationInfoAt

# Where the data section begins: a page, so that it could be mapped.
DATA_AT = 4096
# Ours: more chunks than any test moves.
_KEPT_CHUNKS = 1024
_ERROR_BITS = 0b110
_WIDTHS = {MigrationInfoAt.DEVICE_STATE: 4, 4: 4} | dict.fromkeys(
    (MigrationInfoAt.PENDING_BYTES, MigrationInfoAt.DATA_OFFSET, MigrationInfoAt.DATA_SIZE), 8
)
_NUMBERS = {4: struct.Struct("=I"), 8: struct.Struct("=Q")}


class SimulatedRegion:
    """The region of a device that is open. Borrows the device, owns the file.

    chunk_sizes: of the chunks it gave or took since it was opened, the last 1024.
    """

    def __init__(self, device: DeviceOps, data_bytes: int, path: str) -> None:
        """Make the file at path, or in memory when that is "". Raises OSError."""
        self._device, self._path = device, path
        self.size_bytes = DATA_AT + data_bytes
        if path:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = OwnedFd(os.open(path, flags, 0o600))
        else:
            self._file = OwnedFd(os.memfd_create("vfiomig-sim-region", os.MFD_CLOEXEC))
        os.ftruncate(self._file.fileno(), self.size_bytes)
        self._reserved_bits = self._staged_bytes = 0
        self._is_taken = False
        self._session: Session | None = None
        self.chunk_sizes: deque[int] = deque(maxlen=_KEPT_CHUNKS)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read a register, whole, or data. Raises OSError."""
        if offset < MIGRATION_INFO.size:
            number = self._number(self._check_register(offset, len(buffer)))
            os.pwrite(self._file.fileno(), _NUMBERS[len(buffer)].pack(number), offset)
        return os.preadv(self._file.fileno(), [buffer], offset)

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write a register, whole, or data. Raises OSError."""
        if offset >= DATA_AT:
            return os.pwrite(self._file.fileno(), data[: self.size_bytes - offset], offset)
        self._check_register(offset, len(data))
        number = int(_NUMBERS[len(data)].unpack(data)[0])
        if offset == MigrationInfoAt.DEVICE_STATE:
            self._set_state(number)
        elif offset == MigrationInfoAt.DATA_SIZE:
            self._take(number)
        else:
            raise os_error(errno.EINVAL)  # the other registers are read only
        return len(data)

    def close(self) -> None:
        """Close the file, and remove it where it has a name."""
        self._end_session()
        self._file.close()
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    def _check_register(self, offset: int, length: int) -> int:
        if _WIDTHS.get(offset) != length:
            raise os_error(errno.EINVAL)
        return offset

    def _number(self, offset: int) -> int:
        match offset:
            case MigrationInfoAt.DEVICE_STATE:
                bits = BITS.get(self._device.get_device_state(), _ERROR_BITS)
                return self._reserved_bits | bits
            case MigrationInfoAt.PENDING_BYTES:
                return self._pending_bytes()
            case MigrationInfoAt.DATA_OFFSET:
                self._is_taken = True  # the next look at pending_bytes says that it was read
                return DATA_AT
            case MigrationInfoAt.DATA_SIZE:
                return self._staged_bytes
        return 0

    def _set_state(self, number: int) -> None:
        before = self._device.get_device_state()
        targets = [state for state, bits in BITS.items() if bits == number & STATE_BITS]
        steps = states.path(CAPABILITIES, before, targets[0], "v1") if targets else None
        if steps is None or len(steps) > 1:
            raise os_error(errno.EINVAL)
        channel = self._device.set_device_state(targets[0])
        self._reserved_bits = number & ~STATE_BITS
        os.pwrite(self._file.fileno(), _NUMBERS[4].pack(number), MigrationInfoAt.DEVICE_STATE)
        if isinstance(channel, Session):
            self._end_session()
            self._session = channel
        elif targets[0] not in states.SAVING:
            self._end_session()

    def _end_session(self) -> None:
        self._staged_bytes = 0
        if self._session is not None:
            self._session.close()
            self._session = None

    def _pending_bytes(self) -> int:
        """Make the next chunk ready, unless the last one has not been asked for yet."""
        session, state = self._session, self._device.get_device_state()
        if session is None or state not in states.SAVING:
            return 0
        if self._staged_bytes and not self._is_taken:
            return self._staged_bytes + session.unread_bytes()
        self._staged_bytes, self._is_taken = 0, False
        if state is DeviceState.PRE_COPY and not sum(session.precopy_info()[:2]):
            return 0
        most, at = self.size_bytes - DATA_AT, 0
        while at < most and (piece := os.read(session.fileno(), most - at)):
            os.pwrite(self._file.fileno(), piece, DATA_AT + at)
            at += len(piece)
        if at < most and (cause := session.failure()) and cause.errno != errno.ENOMSG:
            raise cause
        self._staged_bytes = at
        if at:
            self.chunk_sizes.append(at)
        return at + session.unread_bytes()

    def _take(self, size: int) -> None:
        session = self._session
        if session is None or self._device.get_device_state() is not DeviceState.RESUMING:
            raise os_error(errno.EINVAL)
        if not 0 < size <= self.size_bytes - DATA_AT:
            raise os_error(errno.EINVAL)
        left = memoryview(os.pread(self._file.fileno(), size, DATA_AT))
        try:
            while left:
                left = left[os.write(session.fileno(), left) :]
        except OSError as err:
            raise session.failure() or err from err
        if cause := session.failure():
            raise cause
        self.chunk_sizes.append(size)
