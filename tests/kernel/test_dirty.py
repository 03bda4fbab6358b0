"""DMA logging of devices of the kernel: of mtty, which is never dirty, and of the test device.

A kernel without IOMMUFD_DRIVER starts a log and cannot report it: all counts as dirty there.
"""

import errno
import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import pytest

from kernel.command import run, start
from kernel.migtest import MigTest
from kernel.mtty import Mtty
from vfiomig import ioctl
from vfiomig.bitmap import runs, size_of
from vfiomig.device import DeviceOps
from vfiomig.dirty import DirtyLog, stop_logging
from vfiomig.dirty_report import DirtyReport
from vfiomig.errors import DeviceBusyError, DeviceIOError
from vfiomig.simulator.device import SimulatedOps

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
RANGES = [(16 * MIB, MIB), (64 * MIB, MIB)]
WORDS = ["--range", "16M:1M", "--range", "64M:1M", "--interval", "20ms"]


@pytest.fixture
def reports(source: Mtty) -> bool:
    """Whether this kernel can report at all."""
    with source.opened() as mtty:
        code = error_of(lambda: mtty.device.ops.report_dma_logging(0, PAGE, PAGE, bytearray(8)))
    assert code in (None, errno.EOPNOTSUPP)
    # The kernel of make test-cdev has all that it takes.
    assert code is None or os.environ.get("VFIOMIG_REQUIRE_CDEV") != "1"
    return code is None


@pytest.fixture
def seen(driver: None, *, reports: bool) -> None:
    """What a test device writes can be seen."""
    if not reports:
        pytest.skip("this kernel has no IOMMUFD_DRIVER: no device can report a DMA log")


@pytest.fixture
def device(seen: None) -> Iterator[MigTest]:
    """A test device of which that is true."""
    with MigTest.created(state_bytes=4096) as made:
        yield made


def error_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as err:
        return err.errno
    return None


# What the core of the kernel checks, before any driver; and that the simulator does as it does.

STARTS = {
    "none": ([], PAGE, errno.EINVAL),
    "most": ([(n * 2 * PAGE, PAGE) for n in range(256)], PAGE, None),
    "too many": ([(n * 2 * PAGE, PAGE) for n in range(257)], PAGE, errno.E2BIG),
    "iova": ([(1, PAGE)], PAGE, errno.EINVAL),
    "length": ([(0, PAGE + 512)], PAGE, errno.EINVAL),
    "end": ([(2**64 - PAGE, PAGE)], PAGE, errno.EOVERFLOW),
    "before the end": ([(2**64 - 2 * PAGE, PAGE)], PAGE, None),
    "overlap": ([(0, 2 * PAGE), (PAGE, PAGE)], PAGE, errno.EINVAL),
    "twice": ([(0, PAGE)] * 2, PAGE, errno.EINVAL),
    "touch": ([(0, PAGE), (PAGE, PAGE)], PAGE, None),
    "no page": ([(0, PAGE)], 0, errno.EINVAL),
    "small page": ([(0, 512)], 512, None),
    "nothing": ([(0, 0)], PAGE, None),
}
REPORTS = {
    "small page": (0, PAGE, 2048, errno.EINVAL),
    "odd page": (0, 3 * PAGE, 3 * PAGE, errno.EINVAL),
    "end": (2**64 - PAGE, PAGE, PAGE, errno.EOVERFLOW),
    "before the end": (2**64 - 2 * PAGE, PAGE, PAGE, None),
    "large page": (0, MIB, MIB, None),
}


@pytest.mark.parametrize(("ranges", "page_size", "code"), STARTS.values(), ids=STARTS)
def test_start_is_checked_as_the_simulator_does(
    source: Mtty, ranges: Sequence[tuple[int, int]], page_size: int, code: int | None
) -> None:
    def started(ops: DeviceOps) -> int | None:
        return error_of(lambda: ops.start_dma_logging(page_size, ranges))

    with source.opened() as mtty, closing(SimulatedOps.open("sim:?profile=mtty")) as simulated:
        assert (started(mtty.device.ops), started(simulated)) == (code, code)


@pytest.mark.parametrize(("iova", "length", "page_size", "code"), REPORTS.values(), ids=REPORTS)
def test_a_report_is_checked_as_the_simulator_does(
    source: Mtty, iova: int, length: int, page_size: int, code: int | None, *, reports: bool
) -> None:
    def reported(ops: DeviceOps) -> int | None:
        bits = bytearray(size_of(length // page_size))
        return error_of(lambda: ops.report_dma_logging(iova, length, page_size, bits))

    with source.opened() as mtty, closing(SimulatedOps.open("sim:?profile=mtty")) as simulated:
        assert reported(simulated) == code
        assert reported(mtty.device.ops) == (code if reports else code or errno.EOPNOTSUPP)


# mtty.


def test_mtty_is_never_dirty_or_always_where_nothing_can_be_reported(
    source: Mtty, *, reports: bool
) -> None:
    with source.opened() as mtty, DirtyLog(mtty.device, RANGES) as log:
        found = [log.report() for _ in range(2)]
    for report in found:
        assert report.is_everything == (not reports)
        assert report.ranges == (() if reports else tuple(RANGES))
        assert report.errno == (None if reports else errno.EOPNOTSUPP)
        assert ("IOMMUFD_DRIVER" in report.reason) == (not reports)


def test_the_command_says_so(source: Mtty, *, reports: bool) -> None:
    done = run("dirty", source.uuid, *WORDS, "--count", "2", "--json")
    assert done.code == 0
    result = done.records[-1]
    assert (result["reports"], result["is_everything"]) == (2, not reports)
    assert result["distinct_pages"] == (0 if reports else None)
    assert any("IOMMUFD_DRIVER" in told["text"] for told in done.of_type("warning")) != reports


# The test device.


def addresses(report: DirtyReport) -> list[tuple[int, int]]:
    assert (report.is_everything, report.reason) == (False, "")
    return list(report.ranges)


@contextmanager
def logged(
    device: MigTest, ranges: Sequence[tuple[int, int]] = RANGES, page_size: int = PAGE
) -> Iterator[DirtyLog]:
    with device.opened() as opened, DirtyLog(opened.device, ranges, page_size) as log:
        yield log


def write(device: MigTest, iova: int, length: int) -> None:
    device.set("dirty", f"{iova:#x} {length}")


@pytest.mark.usefixtures("driver")
def test_everything_is_dirty_where_the_kernel_cannot_report(*, reports: bool) -> None:
    with MigTest.created(state_bytes=4096) as device, logged(device) as log:
        write(device, 16 * MIB, 1)
        report = log.report()
    assert report.is_everything == (not reports)
    assert report.ranges == (((16 * MIB, PAGE),) if reports else tuple(RANGES))


def test_what_the_device_writes_is_reported_once(device: MigTest) -> None:
    with logged(device) as log:
        assert addresses(log.report()) == []
        write(device, 16 * MIB + 5000, 1)
        write(device, 16 * MIB + 2 * PAGE, 2 * PAGE)
        write(device, 17 * MIB - 1, 100)
        write(device, 64 * MIB - 1, 2)
        write(device, 80 * MIB, MIB)
        expected = [(16 * MIB + PAGE, 3 * PAGE), (17 * MIB - PAGE, PAGE), (64 * MIB, PAGE)]
        assert addresses(log.report()) == expected
        assert addresses(log.report()) == []


def test_every_page_of_a_bitmap_is_where_it_belongs(device: MigTest) -> None:
    # Each word's first and last bit, the bits between two words, and the range's last page.
    pages = [0, 1, 62, 63, 64, 127, 128, 191, 255]
    with logged(device, [(3 * PAGE, 256 * PAGE)]) as log:
        for page in pages:
            write(device, (3 + page) * PAGE, 1)
        found = addresses(log.report())
    assert [iova // PAGE - 3 + n for iova, length in found for n in range(length // PAGE)] == pages


def test_the_register_marks_as_the_setting_does(device: MigTest) -> None:
    with device.opened() as opened:
        offset = ioctl.get_region_info(opened.device_fd, 0).offset_bytes
        with DirtyLog(opened.device, RANGES) as log:
            for register, number in ((0x28, 64 * MIB + PAGE), (0x30, 3 * PAGE)):
                os.pwrite(opened.device_fd, struct.pack("<Q", number), offset + register)
            assert addresses(log.report()) == [(64 * MIB + PAGE, 3 * PAGE)]


def test_a_range_of_several_pieces(device: MigTest) -> None:
    start, piece_bytes = 5 * PAGE, 256 * GIB
    with logged(device, [(start, piece_bytes + GIB)]) as log:
        write(device, start, 1)
        write(device, start + piece_bytes - PAGE, 2 * PAGE)
        write(device, start + piece_bytes + GIB - 1, 1)
        assert addresses(log.report()) == [
            (start, PAGE),
            (start + piece_bytes - PAGE, 2 * PAGE),
            (start + piece_bytes + GIB - PAGE, PAGE),
        ]


def test_a_log_without_end_pages_is_full_of_ones(device: MigTest) -> None:
    with logged(device, [(0, 64 * GIB)]) as log:
        write(device, 0, 64 * GIB)
        assert addresses(log.report()) == [(0, 64 * GIB)]


def test_the_kernel_sets_bits_and_clears_none(device: MigTest) -> None:
    bits = bytearray(b"\1" + bytes(31))
    with device.opened() as opened, DirtyLog(opened.device, RANGES):
        write(device, 16 * MIB + 9 * PAGE, 60 * PAGE)
        opened.device.ops.report_dma_logging(16 * MIB, MIB, PAGE, bits)
    assert list(runs(bits)) == [(0, 1), (9, 60)]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(("asked", "chosen"), [(PAGE, 8192), (1 << 14, 1 << 14), (MIB, 1 << 16)])
def test_the_device_chooses_the_page_size(asked: int, chosen: int) -> None:
    made = MigTest.created(log_page_min=8192, log_page_max=1 << 16)
    with made as device, logged(device, RANGES, asked) as log:
        assert (log.device_page_size, log.page_size) == (chosen, chosen)
        write(device, 16 * MIB + MIB // 2 + 1, 1)
        assert addresses(log.report()) == [(16 * MIB + MIB // 2, chosen)]


@pytest.mark.usefixtures("seen")
def test_pages_of_the_device_that_do_not_fit_the_range_are_reported_in_ours() -> None:
    made = MigTest.created(log_page_min=1 << 16)
    with made as device, logged(device, [(PAGE, MIB)]) as log:
        assert (log.device_page_size, log.page_size) == (1 << 16, PAGE)
        write(device, (1 << 16) + 1, 1)
        assert covers(addresses(log.report()), 1 << 16)


def covers(ranges: Sequence[tuple[int, int]], page: int) -> bool:
    return any(iova <= page and page + PAGE <= iova + length for iova, length in ranges)


@pytest.mark.usefixtures("seen")
def test_more_ranges_than_the_device_has_are_all_reported() -> None:
    ranges = [(n * MIB, PAGE) for n in range(64)]
    with MigTest.created(log_ranges_most=4) as device, logged(device, ranges) as log:
        for iova, _ in ranges[::2]:
            write(device, iova, 1)
        assert addresses(log.report()) == ranges[::2]


def test_one_log_at_a_time(device: MigTest) -> None:
    with device.opened() as opened, DirtyLog(opened.device, RANGES) as log:
        with pytest.raises(DeviceBusyError) as caught, DirtyLog(opened.device, RANGES):
            pass
        assert caught.value.errno == errno.EINVAL
        write(device, 16 * MIB, 1)
        assert addresses(log.report()) == [(16 * MIB, PAGE)]
        stop_logging(opened.device)
        stop_logging(opened.device)
        assert log.report().is_everything


@pytest.mark.parametrize("code", [errno.EIO, errno.EOPNOTSUPP, errno.ENOMEM])
def test_a_report_that_fails_means_everything(device: MigTest, code: int) -> None:
    with logged(device) as log:
        device.set("fault", f"log_report 0 errno {code} 1")
        report = log.report()
        assert (report.is_everything, report.errno) == (True, code)
        assert report.ranges == tuple(RANGES)
        assert addresses(log.report()) == []


def test_faults_of_start_and_stop_are_told(device: MigTest) -> None:
    device.set("fault", f"log_start 0 errno {errno.EIO} 1")
    with pytest.raises(DeviceIOError, match="cannot start"), logged(device):
        pass
    device.set("fault", f"log_stop 0 errno {errno.EIO} 1")
    with pytest.raises(DeviceIOError, match="cannot stop"), logged(device):
        pass


def test_closing_the_device_ends_the_log(device: MigTest) -> None:
    with device.opened() as opened:
        opened.device.ops.start_dma_logging(PAGE, RANGES)
        write(device, 16 * MIB, 1)
    with logged(device) as log:
        assert addresses(log.report()) == []


# The command.


def test_the_command_reports_and_ends_with_a_signal(device: MigTest) -> None:
    with start("dirty", device.uuid, *WORDS, "--json", "--map") as running:
        running.wait_for_output('"number": 1')
        write(device, 64 * MIB + PAGE, 2 * PAGE)
        running.wait_for_output('"dirty_pages": 2')
        running.signal(signal.SIGINT)
        done = running.finish()
    assert done.code == 0
    told = [report["ranges"] for report in done.of_type("report") if report["dirty_pages"]]
    assert told == [[[64 * MIB + PAGE, 2 * PAGE]]]
    result = done.records[-1]
    assert (result["dirty_pages"], result["distinct_pages"]) == (2, 2)
    assert (result["is_everything"], result["failed_reports"]) == (False, 0)


def test_a_log_that_a_killed_process_left_on_is_ended_by_restart(device: MigTest) -> None:
    with device.opened() as opened:
        fd = opened.device_fd
        words = ["dirty", f"fd:{fd}", *WORDS, "--json"]
        with start(*words, keep=[fd]) as running:
            running.wait_for_output('"number": 1')
            running.kill()
        # It had borrowed the device: nobody has closed it, and nobody reads the log.
        refused = run(*words, "--count", "1", keep=[fd])
        assert (refused.code, refused.records[-1]["error"]) == (5, "DeviceBusyError")
        assert "--restart" in refused.records[-1]["hint"]
        assert run(*words, "--count", "1", "--restart", keep=[fd]).code == 0
        assert run(*words, "--count", "1", keep=[fd]).code == 0
