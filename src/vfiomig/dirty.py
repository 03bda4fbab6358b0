"""Which pages of memory a device has written: its DMA log, from START to STOP.

    with DirtyLog(device, [(0x100000, 1 << 30)]) as log:
        ...
        report = log.report()

Only the device's own writes are logged: what the CPU writes is for who runs it to know. Source:
VFIO_DEVICE_FEATURE_DMA_LOGGING_* in include/uapi/linux/vfio.h, drivers/vfio/vfio_main.c of 6.12.
"""

import errno
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vfiomig import bitmap
from vfiomig.dirty_report import DirtyPages, DirtyPiece, DirtyReport, Tally
from vfiomig.errors import (
    DeviceBusyError,
    DeviceIOError,
    MigrationError,
    NotMigratableError,
    ResourceLimitError,
    UsageError,
)

if TYPE_CHECKING:
    from vfiomig.device import Device

# REPORT takes no smaller pages: SZ_4K in vfio_ioctl_device_feature_logging_report().
SMALLEST_PAGE_BYTES = 4096
# LOG_MAX_RANGES of vfio_main.c.
MOST_RANGES = mmap.PAGESIZE // 16
# START and REPORT refuse (EOVERFLOW) a range whose end is no 64-bit number: the last page too.
_ADDRESSES = 2**64
# Ours: a range is reported in pieces of so large a bitmap, 256 GiB of pages of 4 KiB. A multiple of
# 64 pages each, because pds takes no other beginning (pds_vfio_dirty_sync()).
_PIECE_BYTES = 8 << 20
# A log is on already (mlx5 and pds; the same with its firmware).
_BUSY = frozenset({errno.EINVAL, errno.EEXIST, errno.EBUSY})
_WITHOUT_BITMAPS = (
    "a kernel without IOMMUFD_DRIVER starts logging, and cannot report: drivers that log select it"
)


class DirtyLog:
    """The log of a device's writes into ranges of (iova, length); on within a with block.

    Borrows the device; STOP is asked for at the end whatever happened, and by closing the device.
    One thread at a time. ranges: sorted, what touches is one. page_size: asked for, and from START
    on what reports are in. device_page_size: what the device chose, 0 before START.
    """

    def __init__(
        self,
        device: "Device",
        ranges: Iterable[tuple[int, int]],
        page_size: int = SMALLEST_PAGE_BYTES,
    ) -> None:
        """Check, and ask the device nothing. Raises UsageError."""
        self._device = device
        self.ranges, self.page_size = checked_ranges(ranges, page_size), page_size
        self.device_page_size = 0
        self._since_ns = 0
        self._is_on = False

    @property
    def pages(self) -> int:
        """How many pages are logged."""
        return sum(length for _, length in self.ranges) // self.page_size

    def start(self) -> None:
        """START. Raises NotMigratableError, DeviceBusyError, ResourceLimitError, DeviceIOError.

        DeviceBusyError: a log is on already, of whoever has the device open; stop_logging() ends
        one that nobody wants any more.
        """
        self._is_on = True
        try:
            chosen = self._device.ops.start_dma_logging(self.page_size, self.ranges)
        except OSError as err:
            self._is_on = False  # what is on is another's, and not to be stopped
            raise _start_failed(self._device.name, err) from err
        except BaseException as err:
            self._stop_after(err)  # of a signal handler: START may have been done
            raise
        self._since_ns = time.monotonic_ns()
        self.device_page_size = chosen
        if _is_page(chosen) and not any((a | b) % chosen for a, b in self.ranges):
            self.page_size = chosen

    def stop(self) -> None:
        """STOP; nothing where it is not on. Raises DeviceIOError: then it may still be on."""
        if not self._is_on:
            return
        self._is_on = False
        stop_logging(self._device)

    def pieces(self) -> Iterator[DirtyPiece]:
        """Yield what was written since it was last asked, in order, in pieces of bounded size.

        What is reported is forgotten by the device. Raises DeviceIOError: then every page of all
        ranges counts as written, those of pieces before as well.
        """
        if not self._is_on:
            raise UsageError(f"{self._device.name}: its DMA logging is not on")
        piece_bytes = _PIECE_BYTES * 8 * self.page_size
        for start, length in self.ranges:
            for at in range(0, length, piece_bytes):
                yield self._piece(start + at, min(piece_bytes, length - at))

    def _piece(self, iova: int, length: int) -> DirtyPiece:
        pages = length // self.page_size
        # New, because bits are only ever set; and writable, or they would be lost without a word.
        bits = bytearray(bitmap.size_of(pages))
        try:
            self._device.ops.report_dma_logging(iova, length, self.page_size, bits)
        except OSError as err:
            raise _report_failed(self._device.name, err) from err
        bitmap.cut(bits, pages)
        return DirtyPiece(iova, length, self.page_size, bits)

    def report(
        self, *, most_ranges: int | None = None, seen: DirtyPages | None = None
    ) -> DirtyReport:
        """Return what was written since the last report; everything when the device cannot say.

        most_ranges: keep the first so many ranges only; without it a report takes as much memory as
        there are. seen: takes the pages in. Blocks as long as the driver does.
        """
        begun_ns = time.monotonic_ns()
        tally, failure = Tally(most_ranges), None
        try:
            for piece in self.pieces():
                tally.add(piece)
                if seen is not None:
                    seen.add(piece)
        except DeviceIOError as err:
            failure = err
        interval_ns, self._since_ns = begun_ns - self._since_ns, begun_ns
        took_ns = time.monotonic_ns() - begun_ns
        if failure is not None:
            return self._everything(failure, most_ranges, took_ns, interval_ns)
        ranges = tuple(tally.ranges)
        return DirtyReport(
            self.page_size, tally.pages, ranges, tally.range_count, took_ns, interval_ns
        )

    def _everything(
        self, why: DeviceIOError, most: int | None, took_ns: int, interval_ns: int
    ) -> DirtyReport:
        ranges, count = tuple(self.ranges[:most]), len(self.ranges)
        reason = f"{why}; {why.hint}" if why.hint else str(why)
        numbers = (self.page_size, self.pages, ranges, count, took_ns, interval_ns)
        return DirtyReport(*numbers, is_everything=True, reason=reason, errno=why.errno)

    def _stop_after(self, err: BaseException) -> None:
        """STOP, after something else went wrong, which stays what is reported."""
        try:
            self.stop()
        except MigrationError as failed:
            if isinstance(err, MigrationError):
                err.aftermath = "; ".join(filter(None, [err.aftermath, str(failed)]))
            else:
                err.add_note(str(failed))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, err: BaseException | None, __: TracebackType | None
    ) -> None:
        if err is None:
            self.stop()
        else:
            self._stop_after(err)


def checked_ranges(
    ranges: Iterable[tuple[int, int]], page_size: int
) -> tuple[tuple[int, int], ...]:
    """Return ranges of (iova, length) as START wants them: sorted, and what touches is one.

    Checks what the kernel would refuse, and what it would not notice. Raises UsageError.
    """
    if not _is_page(page_size):
        least = SMALLEST_PAGE_BYTES
        raise UsageError(f"a page size of {page_size}: it must be a power of two, {least} or more")
    found: list[tuple[int, int]] = []
    for iova, length in sorted(ranges):
        _check_range(iova, length, page_size)
        end = sum(found[-1]) if found else -1
        if iova < end:
            raise UsageError(f"the range {iova:#x}:{length:#x} overlaps the one before it")
        if iova == end:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((iova, length))
    if not 0 < len(found) <= MOST_RANGES:
        raise UsageError(f"{len(found)} ranges to log: there may be 1 to {MOST_RANGES}")
    return tuple(found)


def _check_range(iova: int, length: int, page_size: int) -> None:
    name = f"the range {iova:#x}:{length:#x}"
    if iova < 0 or length <= 0:
        raise UsageError(f"{name} is empty, or begins below 0")
    if iova + length >= _ADDRESSES:
        raise UsageError(f"{name} ends behind the last address that can be logged")
    if iova % page_size or length % page_size:
        raise UsageError(f"{name} is not aligned to pages of {page_size} bytes")


def stop_logging(device: "Device") -> None:
    """End the DMA logging of a device, whoever began it; nothing where none is on.

    Raises NotMigratableError or DeviceIOError.
    """
    try:
        device.ops.stop_dma_logging()
    except OSError as err:
        if err.errno == errno.ENOTTY:
            raise _no_logging(device.name, err) from err
        what = f"{device.name}: cannot stop its DMA logging: {_reason(err)}"
        raise DeviceIOError(what, device=device.name, errno=err.errno, phase="dirty") from err


def _is_page(size: int) -> bool:
    return size >= SMALLEST_PAGE_BYTES and not size & (size - 1)


def _no_logging(name: str, err: OSError) -> MigrationError:
    return NotMigratableError(
        f"{name}: the device has no DMA logging",
        device=name,
        errno=err.errno,
        phase="dirty",
        hint="the drivers mlx5 and pds have it; where they do not, an IOMMU may track instead",
    )


def _start_failed(name: str, err: OSError) -> MigrationError:
    if err.errno == errno.ENOTTY:
        return _no_logging(name, err)
    kind: type[MigrationError] = DeviceIOError
    what, hint = "cannot start its DMA logging", ""
    if err.errno in _BUSY:
        kind, what = DeviceBusyError, f"{what}, most likely because it is on already"
        hint = "of a process that has died: vfiomig dirty --restart ends it, and starts anew"
    elif err.errno in (errno.EOPNOTSUPP, errno.E2BIG):
        kind, what = NotMigratableError, "it cannot log these ranges"
        hint = "fewer of them, or closer together"
    elif err.errno == errno.ENOMEM:
        kind = ResourceLimitError
    message = f"{name}: {what}: {_reason(err)}"
    return kind(message, device=name, errno=err.errno, phase="dirty", hint=hint)


def _report_failed(name: str, err: OSError) -> DeviceIOError:
    hint = _WITHOUT_BITMAPS if err.errno == errno.EOPNOTSUPP else ""
    message = f"{name}: its DMA log cannot be read: {_reason(err)}"
    return DeviceIOError(message, device=name, errno=err.errno, phase="dirty", hint=hint)


def _reason(err: OSError) -> str:
    return os.strerror(err.errno) if err.errno else str(err)
