"""What the state of a simulated device consists of: made from its seed, the same every time.

The seed stands for one mebibyte of random bytes, which is repeated; each run begins with a stamp,
so that no two are alike. The first bytes are never those of an update stream (updates.py).
"""

import errno
import os
import random
from collections.abc import Iterator

from vfiomig.simulator.profiles import Profile
from vfiomig.simulator.url import Parameters

BLOCK_BYTES = 1 << 20
RUN_BYTES = 64 << 10
_STAMP_BYTES = 8
# Stamps of a new state count from 1, those of later changes from here.
_FIRST_CHANGE = 1 << 48
# How far the random bytes of one change are from those of the next. Prime, so that they all differ.
_CHANGE_STRIDE = 4099


def begin(fd: int, profile: Profile, size_bytes: int) -> None:
    """Make an empty file a blank state: what the profile begins with, and zeros. Raises OSError."""
    os.ftruncate(fd, size_bytes)
    if profile.blank:
        _write(fd, b"", memoryview(profile.blank), 0)


def fill(fd: int, parameters: Parameters) -> None:
    """Make an empty file a device's first state. Raises OSError."""
    profile = parameters.profile
    block = memoryview(_random_block(parameters.seed))
    begin(fd, profile, parameters.size)
    if profile.seeded:
        for offset in profile.seeded:
            os.pwrite(fd, block[offset : offset + 1], offset)
        return
    for start, end in _runs(parameters.size, parameters.zeros):
        first = max(start, profile.header_bytes)
        _write_run(fd, block, 1 + start // RUN_BYTES, first, end)


class Dirtier:
    """Changes a state while its device runs, range after range, and remembers which.

    What is dirty is one range that may run over the end to the beginning: the device goes round.
    """

    def __init__(self, fd: int, first: int, size_bytes: int, seed: int) -> None:
        """Borrow fd, whose bytes from first to size_bytes may change."""
        self._fd, self._first, self._span = fd, first, max(size_bytes - first, 0)
        self._block = memoryview(_random_block(seed))
        self._changes = 0
        self._start = 0
        self.dirty_bytes = 0

    def change(self, length: int) -> None:
        """Change the next bytes; more than all of them is all of them. Raises OSError."""
        length = min(length, self._span)
        while length > 0:
            at = (self._start + self.dirty_bytes) % self._span
            piece = min(length, RUN_BYTES - at % RUN_BYTES, self._span - at)
            self._write_change(self._first + at, piece)
            self.dirty_bytes += piece
            length -= piece
        self.dirty_bytes = min(self.dirty_bytes, self._span)

    def ranges(self) -> list[tuple[int, int]]:
        """Return the dirty ranges as offset and length."""
        straight = min(self.dirty_bytes, self._span - self._start)
        ranges = [(self._start, straight), (0, self.dirty_bytes - straight)]
        return [(self._first + offset, length) for offset, length in ranges if length]

    def take(self) -> list[tuple[int, int]]:
        """Return the dirty ranges, and forget them."""
        found = self.ranges()
        if self._span:
            self._start = (self._start + self.dirty_bytes) % self._span
        self.dirty_bytes = 0
        return found

    def _write_change(self, start: int, length: int) -> None:
        self._changes += 1
        skip = self._changes * _CHANGE_STRIDE % (BLOCK_BYTES - RUN_BYTES)
        piece = self._block[skip : skip + RUN_BYTES]
        _write_run(self._fd, piece, _FIRST_CHANGE + self._changes, start, start + length)


def _random_block(seed: int) -> bytes:
    # As text: Random() takes -1 and 1 for the same seed.
    return random.Random(str(seed)).randbytes(BLOCK_BYTES)


def _runs(size: int, zero_percent: int) -> Iterator[tuple[int, int]]:
    """Yield what is not zero, a block at a time, or a run at a time where some are."""
    if zero_percent == 100:
        return
    step = RUN_BYTES if zero_percent else BLOCK_BYTES
    for start in range(0, size, step):
        index = start // RUN_BYTES
        if not zero_percent or (index + 1) * zero_percent // 100 == index * zero_percent // 100:
            yield start, min(start + step, size)


def _write_run(fd: int, block: memoryview, stamp: int, start: int, end: int) -> None:
    head = stamp.to_bytes(_STAMP_BYTES, "little")[: max(end - start, 0)]
    _write(fd, head, block[len(head) : max(end - start, 0)], start)


def _write(fd: int, head: bytes, body: memoryview, offset: int) -> None:
    # A file takes all of a write, or is out of space.
    if os.pwritev(fd, [head, body], offset) != len(head) + len(body):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
