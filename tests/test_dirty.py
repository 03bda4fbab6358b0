"""DMA logging by the library: what it refuses, what it reports, and that it always ends."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from vfiomig import dirty, errors, ioctl, uapi
from vfiomig.backends import open_device
from vfiomig.backends.kernel import KernelOps
from vfiomig.device import Device
from vfiomig.dirty import DirtyLog
from vfiomig.dirty_report import DirtyPages, DirtyPiece, DirtyReport, Tally
from vfiomig.fd import OwnedFd
from vfiomig.identity import Identity
from vfiomig.simulator.device import SimulatedOps

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
RANGES = [(16 * MIB, MIB), (64 * MIB, MIB)]


@pytest.fixture
def ops() -> SimulatedOps:
    return SimulatedOps.open("sim:?size=1")


@pytest.fixture
def device(ops: SimulatedOps) -> Iterator[Device]:
    with owning(ops) as opened:
        yield opened


def owning(ops: SimulatedOps) -> Device:
    return Device("dev0", Identity("sim:generic"), ops)


def simulated(query: str) -> Device:
    return open_device(f"sim:?size=1&{query}")


# What may be logged.


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([(PAGE, PAGE)], [(PAGE, PAGE)]),
        ([(2 * PAGE, PAGE), (0, PAGE)], [(0, PAGE), (2 * PAGE, PAGE)]),
        ([(PAGE, PAGE), (0, PAGE), (2 * PAGE, PAGE)], [(0, 3 * PAGE)]),
        ([(0, 2**64 - PAGE)], [(0, 2**64 - PAGE)]),
        ([(n * PAGE, PAGE) for n in range(1000)], [(0, 1000 * PAGE)]),
    ],
)
def test_ranges_are_sorted_and_those_that_touch_are_one(
    ranges: list[tuple[int, int]], merged: list[tuple[int, int]]
) -> None:
    assert dirty.checked_ranges(ranges, PAGE) == tuple(merged)


@pytest.mark.parametrize(
    ("ranges", "page_size", "text"),
    [
        ([], PAGE, "0 ranges"),
        ([(n * 2 * PAGE, PAGE) for n in range(dirty.MOST_RANGES + 1)], PAGE, "257 ranges"),
        ([(0, 0)], PAGE, "is empty"),
        ([(-PAGE, PAGE)], PAGE, "below 0"),
        ([(0, PAGE), (PAGE, 0)], PAGE, "is empty"),
        ([(2**64 - PAGE, PAGE)], PAGE, "behind the last address"),
        ([(2**65, PAGE)], PAGE, "behind the last address"),
        ([(1, PAGE)], PAGE, "not aligned"),
        ([(0, PAGE + 1)], PAGE, "not aligned"),
        ([(PAGE, MIB)], 2 * PAGE, "not aligned"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], PAGE, "0x1000:0x1000 overlaps"),
        ([(0, PAGE), (0, PAGE)], PAGE, "overlaps"),
        ([(0, PAGE)], 0, "a page size of 0"),
        ([(0, PAGE)], 2048, "4096 or more"),
        ([(0, 3 * PAGE)], 3 * PAGE, "power of two"),
    ],
)
def test_what_cannot_be_logged_is_refused_before_the_device_is_asked(
    ranges: list[tuple[int, int]], page_size: int, text: str
) -> None:
    unasked = pytest.raises(errors.UsageError, match=text)
    with simulated("fault=log-start:EIO") as device, unasked:
        DirtyLog(device, ranges, page_size)


# Reports.


def test_a_report_has_the_pages_that_were_written(device: Device, ops: SimulatedOps) -> None:
    with DirtyLog(device, RANGES) as log:
        ops.write_memory(16 * MIB + 5000, 1)
        ops.write_memory(16 * MIB + 8192, 8192)
        ops.write_memory(17 * MIB - 1, 100)  # one byte of these is in the range
        ops.write_memory(64 * MIB - 1, 2)
        report = log.report()
    assert report.ranges == (
        (16 * MIB + PAGE, 3 * PAGE),
        (17 * MIB - PAGE, PAGE),
        (64 * MIB, PAGE),
    )
    assert (report.range_count, report.dirty_pages, report.dirty_bytes) == (3, 5, 5 * PAGE)
    assert (report.page_size, report.is_everything, report.reason) == (PAGE, False, "")


def test_what_was_reported_is_forgotten(device: Device, ops: SimulatedOps) -> None:
    with DirtyLog(device, RANGES) as log:
        ops.write_memory(16 * MIB, 1)
        assert [log.report().dirty_pages for _ in range(3)] == [1, 0, 0]


def test_nothing_is_logged_before_start_nor_kept_after_stop(
    device: Device, ops: SimulatedOps
) -> None:
    for _ in range(2):
        ops.write_memory(16 * MIB, 1)
        with DirtyLog(device, RANGES) as log:
            assert log.report().dirty_pages == 0
            ops.write_memory(16 * MIB, 1)


def test_a_report_keeps_as_many_ranges_as_it_is_told(device: Device, ops: SimulatedOps) -> None:
    with DirtyLog(device, RANGES) as log:
        for most, kept in ((0, 0), (2, 2), (9, 4), (None, 4)):
            for number in range(4):
                ops.write_memory(16 * MIB + 2 * number * PAGE, 1)
            report = log.report(most_ranges=most)
            assert (len(report.ranges), report.range_count, report.dirty_pages) == (kept, 4, 4)


def test_a_large_range_is_reported_in_pieces_whose_edges_nobody_sees(
    device: Device, ops: SimulatedOps
) -> None:
    start, piece_bytes = 3 * PAGE, 256 * GIB
    with DirtyLog(device, [(start, 4 * piece_bytes)]) as log:
        ops.write_memory(start + piece_bytes - PAGE, 2 * PAGE)
        ops.write_memory(start + 2 * piece_bytes, 2 * piece_bytes)
        report = log.report()
        lengths = {len(piece.bits) for piece in log.pieces()}
    assert report.ranges == (
        (start + piece_bytes - PAGE, 2 * PAGE),
        (start + 2 * piece_bytes, 2 * piece_bytes),
    )
    assert report.range_count == 2
    assert lengths == {8 << 20}


def test_pieces_begin_at_a_multiple_of_64_pages_of_their_range(device: Device) -> None:
    with DirtyLog(device, [(PAGE, 600 * GIB), (700 * GIB, PAGE)]) as log:
        pieces = [(piece.iova, piece.length) for piece in log.pieces()]
    assert all((iova - PAGE) % (64 * PAGE) == 0 for iova, _ in pieces[:-1])
    assert [iova for iova, _ in pieces] == [PAGE, PAGE + 256 * GIB, PAGE + 512 * GIB, 700 * GIB]
    assert sum(length for _, length in pieces) == 600 * GIB + PAGE


class Stray(SimulatedOps):
    """Sets every bit of what it is given, also those behind the range."""

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        bitmap[:] = b"\xff" * len(bitmap)


def test_bits_behind_a_range_are_not_believed() -> None:
    ranges = [(0, 3 * PAGE), (MIB, 65 * PAGE)]
    with owning(Stray.open("sim:?size=1")) as device, DirtyLog(device, ranges) as log:
        report = log.report()
    assert report.ranges == ((0, 3 * PAGE), (MIB, 65 * PAGE))
    assert report.dirty_pages == 68


def test_a_device_that_is_never_dirty_reports_nothing() -> None:
    with open_device("sim:?profile=mtty") as device, DirtyLog(device, RANGES) as log:
        assert (log.report().ranges, log.report().dirty_pages) == ((), 0)


@pytest.mark.parametrize(
    ("asked", "unit", "chosen", "used"),
    [
        (PAGE, MIB, PAGE, PAGE),
        (4 * MIB, 8 * MIB, 2 * MIB, 2 * MIB),  # the most of this driver
    ],
)
def test_reports_are_in_the_pages_that_the_device_chose(
    asked: int, unit: int, chosen: int, used: int
) -> None:
    with simulated("profile=mlx5") as device, DirtyLog(device, [(unit, unit)], asked) as log:
        assert (log.device_page_size, log.page_size) == (chosen, used)
        assert log.pages == unit // used


class Coarse(SimulatedOps):
    """Chooses 64 KiB, whatever it is asked for, or what the test has put there."""

    chooses = 1 << 16

    def start_dma_logging(self, page_size_bytes: int, ranges: object) -> int:
        return self.chooses

    def stop_dma_logging(self) -> None:
        pass


@pytest.mark.parametrize(
    ("start", "chosen", "used"),
    [
        (MIB, 1 << 16, 1 << 16),
        (PAGE, 1 << 16, PAGE),  # no whole pages of the device's
        (MIB, 0, PAGE),
        (MIB, 512, PAGE),
        (MIB, 3 * PAGE, PAGE),
    ],
)
def test_pages_that_reports_cannot_have_are_not_used(start: int, chosen: int, used: int) -> None:
    ops = Coarse.open("sim:?size=1")
    ops.chooses = chosen
    with owning(ops) as device, DirtyLog(device, [(start, MIB)]) as log:
        assert (log.device_page_size, log.page_size) == (chosen, used)


def test_pages_of_several_reports_add_up(device: Device, ops: SimulatedOps) -> None:
    seen = DirtyPages()
    with DirtyLog(device, RANGES) as log:
        for address in (16 * MIB, 16 * MIB + PAGE, 16 * MIB, 64 * MIB):
            ops.write_memory(address, 1)
            log.report(seen=seen)
    assert seen.count() == (3, 2, ((16 * MIB, 2 * PAGE), (64 * MIB, PAGE)))
    assert seen.count(1) == (3, 2, ((16 * MIB, 2 * PAGE),))


@pytest.mark.parametrize("most", [0, 1, 2, None])
def test_a_range_over_three_pieces_is_one_also_where_it_is_the_last_to_keep(
    most: int | None,
) -> None:
    tally = Tally(most)
    for number in range(3):
        tally.add(DirtyPiece(number * 64 * PAGE, 64 * PAGE, PAGE, bytearray(b"\xff" * 8)))
    tally.add(DirtyPiece(3 * 64 * PAGE, 64 * PAGE, PAGE, bytearray(b"\2" + bytes(7))))
    assert tally.ranges == [(0, 192 * PAGE), (193 * PAGE, PAGE)][:most]
    assert (tally.pages, tally.range_count) == (193, 2)


def test_a_rate_is_of_the_time_between_two_reports() -> None:
    report = DirtyReport(PAGE, 100, (), 1, took_ns=5, interval_ns=500_000_000)
    assert report.bytes_per_s == 200 * PAGE


# When the device cannot say.


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EIO, errno.EINVAL, errno.ENOTCONN])
def test_everything_is_dirty_when_a_report_fails(code: int) -> None:
    query = f"fault=log-report:{errno.errorcode[code]}"
    with simulated(query) as device, DirtyLog(device, RANGES) as log:
        report = log.report()
    assert (report.is_everything, report.errno) == (True, code)
    assert report.ranges == tuple(RANGES)
    assert (report.dirty_bytes, report.range_count) == (2 * MIB, 2)
    assert os.strerror(code) in report.reason
    assert ("IOMMUFD_DRIVER" in report.reason) == (code == errno.EOPNOTSUPP)


class HalfDead(SimulatedOps):
    """Reports the first of RANGES only."""

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        if iova == RANGES[1][0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_pieces_that_were_read_before_a_failure_count_for_nothing() -> None:
    with owning(HalfDead.open("sim:?size=1")) as device, DirtyLog(device, RANGES) as log:
        assert log.report().ranges == tuple(RANGES)
        with pytest.raises(errors.DeviceIOError, match="cannot be read: Input/output"):
            list(log.pieces())


def test_a_report_after_a_failed_one_is_asked_for_again() -> None:
    with simulated("fault=log-report:EIO*1") as device, DirtyLog(device, RANGES) as log:
        assert [log.report().is_everything for _ in range(2)] == [True, False]


# START and STOP.


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOTTY, errors.NotMigratableError, "the device has no DMA logging"),
        (errno.EINVAL, errors.DeviceBusyError, "on already"),
        (errno.EEXIST, errors.DeviceBusyError, "on already"),
        (errno.EOPNOTSUPP, errors.NotMigratableError, "cannot log these ranges"),
        (errno.E2BIG, errors.NotMigratableError, "cannot log these ranges"),
        (errno.ENOMEM, errors.ResourceLimitError, "Cannot allocate memory"),
        (errno.ENOTCONN, errors.DeviceIOError, "not connected"),
    ],
)
def test_why_a_log_cannot_be_started(
    code: int, kind: type[errors.MigrationError], text: str
) -> None:
    refused = pytest.raises(kind, match=text)
    query = f"fault=log-start:{errno.errorcode[code]}"
    with simulated(query) as device, refused as caught, DirtyLog(device, RANGES):
        pass
    assert type(caught.value) is kind
    assert (caught.value.errno, caught.value.device) == (code, device.name)


def test_a_log_of_somebody_else_is_left_on(device: Device, ops: SimulatedOps) -> None:
    with DirtyLog(device, RANGES) as log:
        ops.write_memory(16 * MIB, 1)
        with pytest.raises(errors.DeviceBusyError), DirtyLog(device, RANGES):
            pass
        other = DirtyLog(device, RANGES)
        with pytest.raises(errors.DeviceBusyError):
            other.start()
        other.stop()
        assert log.report().dirty_pages == 1
        dirty.stop_logging(device)  # unless it is asked for
        assert log.report().is_everything


def is_logging(ops: SimulatedOps) -> bool:
    try:
        ops.report_dma_logging(RANGES[0][0], MIB, PAGE, bytearray(32))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt, errors.CancelledError("x"), ZeroDivisionError]
)
def test_the_log_is_stopped_whatever_happens(
    device: Device, ops: SimulatedOps, failure: BaseException | type[BaseException]
) -> None:
    with suppress(BaseException), DirtyLog(device, RANGES):
        assert is_logging(ops)
        raise failure
    assert not is_logging(ops)


class Interrupted(SimulatedOps):
    """START is done when a signal handler raises."""

    def start_dma_logging(self, page_size_bytes: int, ranges: object) -> int:
        super().start_dma_logging(page_size_bytes, RANGES)
        raise KeyboardInterrupt


def test_a_start_that_a_signal_interrupts_is_undone() -> None:
    ops = Interrupted.open("sim:?size=1")
    with owning(ops) as device:
        with pytest.raises(KeyboardInterrupt), DirtyLog(device, RANGES):
            pass
        assert not is_logging(ops)


def test_a_stop_that_fails_is_told() -> None:
    told = pytest.raises(errors.DeviceIOError, match="cannot stop its DMA logging: Input")
    with simulated("fault=log-stop:EIO*1") as device, told, DirtyLog(device, RANGES):
        pass


@pytest.mark.parametrize("first", [errors.CancelledError("cancelled"), ZeroDivisionError()])
def test_a_stop_that_fails_does_not_hide_what_failed_first(first: Exception) -> None:
    told = pytest.raises(type(first))
    with simulated("fault=log-stop:EIO") as device, told as caught, DirtyLog(device, RANGES):
        raise first
    notes = [*getattr(caught.value, "__notes__", []), getattr(caught.value, "aftermath", "")]
    assert "cannot stop its DMA logging" in notes[0]


def test_a_log_that_is_not_on_cannot_be_read(device: Device) -> None:
    log = DirtyLog(device, RANGES)
    log.stop()
    with pytest.raises(errors.UsageError, match="not on"):
        log.report()


def test_a_device_that_was_closed_has_no_log_left_to_stop() -> None:
    with simulated("dma_writes=1") as device, DirtyLog(device, RANGES) as log:
        device.close()
        report = log.report()
    assert (report.is_everything, report.errno) == (True, errno.EBADF)


def test_a_device_of_protocol_v1_logs_like_any_other() -> None:
    with simulated("protocol=v1&dma_writes=3") as device, DirtyLog(device, RANGES) as log:
        assert log.report().dirty_pages == 3


# The kernel's side: what is asked of a device_fd.


class Asked:
    """Takes the place of fcntl.ioctl(), and does with the memory what the kernel would do."""

    def __init__(self) -> None:
        self.log: list[tuple[int, tuple[object, ...]]] = []

    def __call__(self, device_fd: int, number: int, arg: bytearray) -> int:
        argsz, flags = uapi.FEATURE.unpack_from(arg)
        assert (number, argsz) == (uapi.VFIO_DEVICE_FEATURE, len(arg))
        self.log.append((flags, getattr(self, f"_{uapi.Feature(flags & 0xFFFF).name}")(arg)))
        return 0

    def _DMA_LOGGING_START(self, arg: bytearray) -> tuple[object, ...]:
        page_size, count, reserved, address = uapi.FEATURE_DMA_LOGGING_CONTROL.unpack_from(arg, 8)
        pairs = struct.iter_unpack("=QQ", ctypes.string_at(address, 16 * count))
        struct.pack_into("=Q", arg, 8, 2 * page_size)
        return page_size, reserved, list(pairs)

    def _DMA_LOGGING_STOP(self, arg: bytearray) -> tuple[object, ...]:
        return (len(arg),)

    def _DMA_LOGGING_REPORT(self, arg: bytearray) -> tuple[object, ...]:
        *numbers, address = uapi.FEATURE_DMA_LOGGING_REPORT.unpack_from(arg, 8)
        ctypes.memset(address + 1, 0x81, 1)
        return tuple(numbers)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    fake = Asked()
    monkeypatch.setattr(ioctl, "ioctl", fake)
    return fake


def test_the_ioctls_are_those_of_the_header(asked: Asked) -> None:
    bits = bytearray(16)
    assert ioctl.start_dma_logging(7, PAGE, RANGES) == 2 * PAGE
    ioctl.report_dma_logging(7, MIB, 100 * PAGE, PAGE, bits)
    ioctl.stop_dma_logging(7)
    assert asked.log == [
        (uapi.Feature.SET | uapi.Feature.DMA_LOGGING_START, (PAGE, 0, RANGES)),
        (uapi.Feature.GET | uapi.Feature.DMA_LOGGING_REPORT, (MIB, 100 * PAGE, PAGE)),
        (uapi.Feature.SET | uapi.Feature.DMA_LOGGING_STOP, (8,)),
    ]
    assert bits == b"\0\x81" + bytes(14)


def test_a_bitmap_that_cannot_be_written_is_refused(asked: Asked) -> None:
    with pytest.raises(TypeError, match="not writable"):
        ioctl.report_dma_logging(7, 0, PAGE, PAGE, bytes(8))  # type: ignore[arg-type]
    assert asked.log == []


def kernel_ops() -> KernelOps:
    opened = ExitStack()
    return KernelOps("dev0", opened.enter_context(OwnedFd(os.memfd_create("device"))), opened)


def test_closing_a_kernel_device_stops_the_log_that_it_has_started(asked: Asked) -> None:
    # Another process may have it open as well: then the last close is yet to come.
    with closing(kernel_ops()) as ops:
        ops.start_dma_logging(PAGE, RANGES)
    ops.stop_dma_logging()
    assert [flags & 0xFFFF for flags, _ in asked.log] == [6, 7]


def test_closing_a_kernel_device_leaves_the_log_of_somebody_else(asked: Asked) -> None:
    with closing(kernel_ops()) as ops:
        ops.start_dma_logging(PAGE, RANGES)
        ops.stop_dma_logging()
    kernel_ops().close()
    assert [flags & 0xFFFF for flags, _ in asked.log] == [6, 7]
