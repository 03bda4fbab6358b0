"""The DMA log of simulated devices: the checks of the kernel's core, and what each driver adds."""

import errno
from collections.abc import Callable
from contextlib import closing

import pytest

from vfiomig.backends import open_device
from vfiomig.bitmap import count, runs, size_of
from vfiomig.errors import UsageError
from vfiomig.simulator.device import SimulatedOps
from vfiomig.simulator.profiles import PROFILES
from vfiomig.uapi import DeviceState

PAGE, MIB = 4096, 1 << 20
LOGGING = {"generic", "mlx5", "pds"}
STUBS = {"mtty", "mtty-1", "mtty-2"}


def opened(query: str) -> SimulatedOps:
    return SimulatedOps.open(f"sim:?{query}")


def error_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as err:
        return err.errno
    return None


def reported(ops: SimulatedOps, iova: int, length: int, page_size: int = PAGE) -> bytearray:
    bits = bytearray(size_of(length // page_size))
    ops.report_dma_logging(iova, length, page_size, bits)
    return bits


@pytest.mark.parametrize("name", PROFILES)
def test_drivers_without_a_log_say_so(name: str) -> None:
    expected = None if name in LOGGING | STUBS else errno.ENOTTY
    with closing(opened(f"profile={name}")) as ops:
        assert error_of(lambda: ops.start_dma_logging(PAGE, [(0, PAGE)])) == expected
        assert error_of(lambda: reported(ops, 0, PAGE)) == expected
        assert error_of(ops.stop_dma_logging) == expected
        assert error_of(ops.stop_dma_logging) == expected  # STOP may be asked for at any time


@pytest.mark.parametrize(
    ("ranges", "page_size", "code"),
    [
        ([], PAGE, errno.EINVAL),
        ([(n * 2 * PAGE, PAGE) for n in range(257)], PAGE, errno.E2BIG),
        ([(1, PAGE)], PAGE, errno.EINVAL),
        ([(0, PAGE + 512)], PAGE, errno.EINVAL),
        ([(2**64 - PAGE, PAGE)], PAGE, errno.EOVERFLOW),
        ([(0, 2 * PAGE), (PAGE, PAGE)], PAGE, errno.EINVAL),
        ([(0, PAGE)], 0, errno.EINVAL),
        ([(0, 0)], PAGE, None),  # the core does not notice
        ([(0, 512)], 512, None),
        ([(0, PAGE)] * 2, PAGE, errno.EINVAL),
    ],
)
def test_start_checks_what_the_kernel_checks(
    ranges: list[tuple[int, int]], page_size: int, code: int | None
) -> None:
    with closing(opened("size=1")) as ops:
        assert error_of(lambda: ops.start_dma_logging(page_size, ranges)) == code


@pytest.mark.parametrize(
    ("iova", "length", "page_size", "code"),
    [
        (0, PAGE, 2048, errno.EINVAL),
        (0, 3 * PAGE, 3 * PAGE, errno.EINVAL),
        (2**64 - PAGE, PAGE, PAGE, errno.EOVERFLOW),
        (0, MIB, 1 << 16, None),
    ],
)
def test_report_checks_what_the_kernel_checks(
    iova: int, length: int, page_size: int, code: int | None
) -> None:
    with closing(opened("size=1")) as ops:
        ops.start_dma_logging(PAGE, [(0, MIB)])
        assert error_of(lambda: reported(ops, iova, length, page_size)) == code


@pytest.mark.parametrize("name", sorted(LOGGING))
def test_one_log_at_a_time_and_none_to_read_before(name: str) -> None:
    with closing(opened(f"profile={name}")) as ops:
        assert error_of(lambda: reported(ops, 0, PAGE)) == errno.EINVAL
        ops.start_dma_logging(PAGE, [(0, MIB)])
        assert error_of(lambda: ops.start_dma_logging(PAGE, [(0, MIB)])) == errno.EINVAL
        ops.stop_dma_logging()
        assert error_of(lambda: reported(ops, 0, PAGE)) == errno.EINVAL
        ops.start_dma_logging(PAGE, [(0, MIB)])


def test_mtty_takes_everything_and_is_never_dirty() -> None:
    with closing(opened("profile=mtty&dma_writes=5")) as ops:
        for _ in range(2):
            assert ops.start_dma_logging(1 << 40, [(0, 1 << 40)]) == 1 << 40
        ops.write_memory(0, PAGE)
        assert not any(reported(ops, 0, MIB))
        ops.stop_dma_logging()
        assert not any(reported(ops, 0, MIB))


def test_mlx5_brings_the_page_size_into_its_bounds() -> None:
    for asked, chosen in ((512, PAGE), (PAGE, PAGE), (1 << 30, 2 * MIB)):
        with closing(opened("profile=mlx5")) as ops:
            assert ops.start_dma_logging(asked, [(0, 1 << 30)]) == chosen


def test_mlx5_refuses_ranges_too_far_apart() -> None:
    ranges = [(0, PAGE), (1 << 42, PAGE)]
    with closing(opened("profile=mlx5")) as ops:
        assert error_of(lambda: ops.start_dma_logging(PAGE, ranges)) == errno.EOPNOTSUPP


def test_more_ranges_than_a_driver_has_become_fewer_over_the_smallest_gaps() -> None:
    ranges = [(n * MIB, PAGE) for n in range(16)] + [(2 * PAGE, PAGE)]
    with closing(opened("profile=mlx5")) as ops:
        ops.start_dma_logging(PAGE, ranges)
        ops.write_memory(0, 100 * MIB)
        assert list(runs(reported(ops, 0, MIB))) == [(0, 3)]  # with the gap
        assert list(runs(reported(ops, MIB, MIB))) == [(0, 1)]


def test_pds_reports_within_one_range() -> None:
    with closing(opened("profile=pds")) as ops:
        ops.start_dma_logging(PAGE, [(0, MIB), (2 * MIB, MIB)])
        assert error_of(lambda: reported(ops, 0, 3 * MIB)) == errno.EINVAL
        assert error_of(lambda: reported(ops, 2 * MIB, MIB)) is None


def test_pds_stops_with_stop_copy() -> None:
    with closing(opened("profile=pds")) as ops:
        ops.start_dma_logging(PAGE, [(0, MIB)])
        channel = ops.set_device_state(DeviceState.STOP_COPY)
        assert channel is not None
        channel.close()
        reported(ops, 0, MIB)
        ops.set_device_state(DeviceState.STOP)
        assert error_of(lambda: reported(ops, 0, MIB)) == errno.EINVAL


def test_bits_are_set_and_never_cleared() -> None:
    with closing(opened("size=1")) as ops:
        ops.start_dma_logging(PAGE, [(0, MIB)])
        ops.write_memory(9 * PAGE, 60 * PAGE)
        bits = bytearray(b"\1" + bytes(31))
        ops.report_dma_logging(0, MIB, PAGE, bits)
        assert list(runs(bits)) == [(0, 1), (9, 60)]


def test_a_report_forgets_its_own_range_only() -> None:
    with closing(opened("size=1")) as ops:
        ops.start_dma_logging(PAGE, [(0, MIB)])
        ops.write_memory(0, MIB)
        assert list(runs(reported(ops, 64 * PAGE, 64 * PAGE))) == [(0, 64)]
        assert list(runs(reported(ops, 0, MIB))) == [(0, 64), (128, 128)]


def test_pages_of_a_report_may_be_larger_or_smaller_than_those_of_the_log() -> None:
    with closing(opened("size=1")) as ops:
        ops.start_dma_logging(1 << 16, [(0, MIB)])
        ops.write_memory(1 << 16, 1)
        assert list(runs(reported(ops, 0, MIB))) == [(16, 16)]
        ops.write_memory(1 << 16, 1)
        assert list(runs(reported(ops, 0, MIB, 1 << 18))) == [(0, 1)]


@pytest.mark.parametrize("ranges", [[(0, MIB)], [(MIB, 15 * PAGE), (2 * MIB, 5 * PAGE)]])
def test_a_device_writes_so_many_pages_a_round_and_none_twice_before_all(
    ranges: list[tuple[int, int]],
) -> None:
    total = sum(length for _, length in ranges) // PAGE

    def rounds(query: str) -> list[list[bytearray]]:
        with closing(opened(f"size=1&dma_writes={total // 4}&{query}")) as ops:
            ops.start_dma_logging(PAGE, ranges)
            return [[reported(ops, *each) for each in ranges] for _ in range(4)]

    found = rounds("seed=1")
    assert [sum(count(bits)[0] for bits in each) for each in found] == [total // 4] * 4
    assert sum(count(bits)[0] for bits in map(merged, zip(*found, strict=True))) == total
    assert found == rounds("seed=1")
    assert found != rounds("seed=2")


def merged(bitmaps: tuple[bytearray, ...]) -> bytearray:
    number = 0
    for bits in bitmaps:
        number |= int.from_bytes(bits, "little")
    return bytearray(number.to_bytes(len(bitmaps[0]), "little"))


def test_a_device_cannot_write_more_pages_than_there_are() -> None:
    with closing(opened("size=1&dma_writes=1000")) as ops:
        ops.start_dma_logging(PAGE, [(0, 5 * PAGE)])
        assert list(runs(reported(ops, 0, 5 * PAGE))) == [(0, 5)]


def test_a_log_can_be_given_and_taken_and_is_kept_with_the_device(tmp_path: object) -> None:
    for query, code in (("profile=xe&dma_log=1", None), ("dma_log=0", errno.ENOTTY)):
        with closing(opened(query)) as ops:
            assert error_of(lambda: ops.start_dma_logging(PAGE, [(0, MIB)])) == code
    name = f"sim:{tmp_path}/a"
    with open_device(f"{name}?size=1&dma_log=0"):
        pass
    with open_device(name) as device:
        assert error_of(device.ops.stop_dma_logging) == errno.ENOTTY
    with pytest.raises(UsageError, match="its dma_log is 0, not 1"):
        open_device(f"{name}?dma_log=1")


@pytest.mark.parametrize("query", ["dma_log=2", "dma_writes=0", "dma_writes=-1", "dma_writes=x"])
def test_what_makes_no_sense_is_refused(query: str) -> None:
    with pytest.raises(UsageError):
        opened(query)
