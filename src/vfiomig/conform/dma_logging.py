"""The group "dma-logging", START and STOP: what they take."""

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vfiomig.conform import raw
from vfiomig.conform.findings import errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import PAGE_BYTES, Subject
from vfiomig.uapi import Feature

GROUP = "dma-logging"
NEEDS = (Need.DMA_LOGGING,)
START = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START"
_MAIN = "drivers/vfio/vfio_main.c, vfio_ioctl_device_feature_logging_start()"
# Ours: where guests have memory, and within what any device can reach.
IOVA, _LENGTH = 0x1000_0000, 16 << 20
RANGE = (IOVA, _LENGTH)
SPAN_END = 1 << 64
# vfio_device_feature_dma_logging_control: page_size, num_ranges, reserved, pointer.
_CONTROL = struct.Struct("=QIIQ")


@contextmanager
def dma_logged(
    subject: Subject, page_bytes: int = PAGE_BYTES, ranges: Sequence[tuple[int, int]] = (RANGE,)
) -> Iterator[int]:
    """Log what the device writes, for a with block; gives the page size that it chose."""
    subject.log.begin(f"DMA_LOGGING_START with pages of {page_bytes} bytes")
    chosen_bytes = subject.ops.start_dma_logging(page_bytes, ranges)
    subject.log.done("DMA_LOGGING_START")
    try:
        yield chosen_bytes
    finally:
        subject.log.begin("DMA_LOGGING_STOP")
        subject.ops.stop_dma_logging()
        subject.log.done("DMA_LOGGING_STOP")


def _start_error(subject: Subject, page_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Return the errno of START, 0 when it was taken; then it is stopped again."""
    try:
        with dma_logged(subject, page_bytes, ranges):
            return 0
    except OSError as err:
        return err.errno or errno.EIO


@rule(
    "log-start-stop",
    group=GROUP,
    text="DMA logging is started and stopped, and started again.",
    source=f"{START}, DMA_LOGGING_STOP",
    needs=NEEDS,
)
def _start_stop(subject: Subject) -> None:
    for _ in range(2):
        with dma_logged(subject) as chosen_bytes:
            subject.saw(f"pages of {chosen_bytes} bytes")


@rule(
    "log-page-size",
    group=GROUP,
    text="START says which page size it chose: a power of two.",
    source=f'{START}: "the device will return the page size it selected"',
    needs=NEEDS,
)
def _page_size(subject: Subject) -> None:
    for hint_bytes in (PAGE_BYTES, 64 << 10, 2 << 20, 16 << 20):
        with dma_logged(subject, hint_bytes) as chosen_bytes:
            what = f"{hint_bytes} became {chosen_bytes}"
            is_power = chosen_bytes > 0 and not chosen_bytes & (chosen_bytes - 1)
            subject.expect(is_power, what)
            subject.saw(what)


@rule(
    "log-start-arguments",
    group=GROUP,
    text="START refuses what is no range: none, not aligned, overlapping, beyond the end.",
    source=_MAIN,
    needs=NEEDS,
)
def _start_arguments(subject: Subject) -> None:
    page = PAGE_BYTES
    refused = {
        "no range": (page, [], errno.EINVAL),
        "an IOVA that is not aligned": (page, [(IOVA + 8, page)], errno.EINVAL),
        "a length that is not aligned": (page, [(IOVA, page + 8)], errno.EINVAL),
        "ranges that overlap": (page, [(IOVA, 2 * page), (IOVA + page, page)], errno.EINVAL),
        "a range beyond the end": (page, [(SPAN_END - page, 2 * page)], errno.EOVERFLOW),
        "pages of 0 bytes": (0, [RANGE], errno.EINVAL),
    }
    for what, (page_bytes, ranges, wanted) in refused.items():
        found = _start_error(subject, page_bytes, ranges)
        subject.log.done(f"DMA_LOGGING_START with {what}")
        subject.expect_error(found, [wanted], what)
    if subject.device_fd != -1:
        flags, control = Feature.SET | Feature.DMA_LOGGING_START, _CONTROL.pack(page, 1, 0, 8)
        found = raw.feature_error(subject.device_fd, flags, control)
        subject.expect_error(found, [errno.EFAULT], "ranges at address 8")


@rule(
    "log-range-count",
    group=GROUP,
    text="START takes as many ranges as a page of the kernel holds, and refuses more with E2BIG.",
    source=f'{START}: "num_ranges that fit into a single kernel page"; {_MAIN}',
    needs=NEEDS,
)
def _range_count(subject: Subject) -> None:
    most = os.sysconf("SC_PAGE_SIZE") // 16  # struct vfio_device_feature_dma_logging_range
    ranges = [(IOVA + 2 * PAGE_BYTES * index, PAGE_BYTES) for index in range(most + 1)]
    found = _start_error(subject, PAGE_BYTES, ranges[:most])
    subject.expect(found == 0, f"{most} ranges: {errno_name(found)}")
    found = _start_error(subject, PAGE_BYTES, ranges)
    subject.expect_error(found, [errno.E2BIG], f"{most + 1} ranges")
    subject.saw(f"{most} ranges are taken")


@rule(
    "log-empty-range",
    group=GROUP,
    text="A range of 0 bytes is refused by START.",
    source="the kernel does not look (vfio_main.c); measured",
    needs=NEEDS,
    losing="a driver may not expect what its kernel should have refused",
)
def _empty_range(subject: Subject) -> None:
    found = _start_error(subject, PAGE_BYTES, [(IOVA, 0)])
    if found:
        subject.saw(errno_name(found))
    else:
        subject.note("it is taken: who asks has to look")


@rule(
    "log-start-twice",
    group=GROUP,
    text="While DMA logging is on, a second START is refused.",
    source=f'{START}: "Another start is not allowed in the meantime"',
    needs=NEEDS,
)
def _start_twice(subject: Subject) -> None:
    with dma_logged(subject):
        found = 0
        try:
            subject.ops.start_dma_logging(PAGE_BYTES, [RANGE])
        except OSError as err:
            found = err.errno or errno.EIO
        subject.log.done("DMA_LOGGING_START again")
        if subject.expect(found != 0, "a second START succeeds"):
            subject.saw(f"a second START: {errno_name(found)}")


@rule(
    "log-stop-when-off",
    group=GROUP,
    text="STOP while DMA logging is off does nothing.",
    source="drivers/vfio/pci/{mlx5,pds}: 0; measured",
    needs=NEEDS,
)
def _stop_when_off(subject: Subject) -> None:
    subject.log.begin("DMA_LOGGING_STOP without START")
    try:
        subject.ops.stop_dma_logging()
        subject.saw("success")
    except OSError as err:
        subject.note(f"{errno_name(err.errno or 0)}")
    subject.log.done("DMA_LOGGING_STOP")
