"""The group "dma-logging", REPORT: what it takes, and what its bitmap says.

What a device writes is its own business: only the test device of the folder driver, and simulated
ones, can be told to; the rules about single pages are skipped elsewhere.
"""

import errno
import os
import struct

from vfiomig.conform.dma_logging import GROUP, IOVA, NEEDS, RANGE, SPAN_END, START, dma_logged
from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import rule
from vfiomig.conform.subject import PAGE_BYTES, Subject
from vfiomig.ioctl import get_region_info

_REPORT = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"
# The driver of the test device, and its registers IOVA and LENGTH in region 0 (driver/README.md).
_TEST_DRIVER, _IOVA_REGISTER, _LENGTH_REGISTER = "vfiomig_test", 0x28, 0x30


def _report(
    subject: Subject, iova: int, length: int, page_bytes: int = PAGE_BYTES, filled: int = 0
) -> bytes:
    """Report into a bitmap that was filled with a byte. Returns it. Raises OSError, SkipRule."""
    bitmap = bytearray([filled]) * (-(-length // page_bytes // 64) * 8)
    subject.log.begin(f"DMA_LOGGING_REPORT of {length} bytes in pages of {page_bytes}")
    try:
        subject.ops.report_dma_logging(iova, length, page_bytes, bitmap)
    except OSError as err:
        if err.errno == errno.EOPNOTSUPP:
            # Without CONFIG_IOMMUFD_DRIVER the bitmap code is absent (measured on Debian's 6.12).
            raise SkipRule("EOPNOTSUPP: this kernel reports nothing; all counts as dirty") from err
        raise
    subject.log.done("DMA_LOGGING_REPORT")
    return bytes(bitmap)


def _report_error(subject: Subject, iova: int, length: int, page_bytes: int) -> int:
    bitmap = bytearray(8192)
    try:
        subject.ops.report_dma_logging(iova, length, page_bytes, bitmap)
    except OSError as err:
        return err.errno or errno.EIO
    return 0


def _pages(bitmap: bytes) -> list[int]:
    """Return the numbers of the bits that are set."""
    bits = int.from_bytes(bitmap, "little")
    return [page for page in range(len(bitmap) * 8) if bits >> page & 1]


@rule(
    "log-report-when-off",
    group=GROUP,
    text="REPORT while DMA logging is off is an error, before START and after STOP.",
    source=f'{_REPORT}: "If DMA logging is not enabled, an error will be returned"',
    needs=NEEDS,
)
def _report_when_off(subject: Subject) -> None:
    for when in ("before START", "after STOP"):
        found = _report_error(subject, *RANGE, PAGE_BYTES)
        subject.log.done(f"DMA_LOGGING_REPORT {when}")
        if subject.expect(found != 0, f"{when} it succeeds, as if nothing were dirty"):
            subject.saw(f"{when}: {errno_name(found)}")
        with dma_logged(subject):
            pass


@rule(
    "log-report-arguments",
    group=GROUP,
    text="REPORT refuses pages below 4096 bytes or of no power of two, and ranges beyond the end.",
    source="drivers/vfio/vfio_main.c, vfio_ioctl_device_feature_logging_report()",
    needs=NEEDS,
)
def _report_arguments(subject: Subject) -> None:
    with dma_logged(subject):
        _report(subject, *RANGE)
        for page_bytes in (0, 2048, 3 * PAGE_BYTES):
            found = _report_error(subject, *RANGE, page_bytes)
            subject.expect_error(found, [errno.EINVAL], f"pages of {page_bytes} bytes")
        found = _report_error(subject, SPAN_END - PAGE_BYTES, 2 * PAGE_BYTES, PAGE_BYTES)
        subject.expect_error(found, [errno.EOVERFLOW], "a range beyond the end")


@rule(
    "log-bits-only-set",
    group=GROUP,
    text="REPORT sets bits, and clears none that the caller had set.",
    source=f'{_REPORT}: "will only set bits in the bitmap and never clear"',
    needs=NEEDS,
)
def _bits_only_set(subject: Subject) -> None:
    filled = 0xA5
    with dma_logged(subject):
        bitmap = _report(subject, *RANGE, filled=filled)
        kept = all(byte & filled == filled for byte in bitmap)
        subject.expect(kept, "bits that were set before came back clear")
        subject.saw(f"{len(_pages(bitmap))} bits of {len(bitmap) * 8}, half of them set before")


@rule(
    "log-any-page-size",
    group=GROUP,
    text="REPORT takes any power of two for the page size, whatever START chose.",
    source=f'{_REPORT}: "does not have to match the value given to START"',
    needs=NEEDS,
)
def _any_page_size(subject: Subject) -> None:
    with dma_logged(subject, 64 << 10):
        for page_bytes in (PAGE_BYTES, 64 << 10, 2 << 20):
            bitmap = _report(subject, *RANGE, page_bytes)
            subject.saw(f"{len(_pages(bitmap))} dirty pages of {page_bytes} bytes")


@rule(
    "log-exact",
    group=GROUP,
    text="REPORT says the pages that the device has written, and no others.",
    source=f'{_REPORT}: "written pages within the given IOVA range"',
    needs=NEEDS,
)
def _exact(subject: Subject) -> None:
    with dma_logged(subject) as chosen_bytes:
        _report(subject, *RANGE)  # what it has written by itself
        at = IOVA + 3 * chosen_bytes
        _let_write(subject, at, chosen_bytes + 1)
        per_page = chosen_bytes // PAGE_BYTES
        # At the granularity that the device chose: the page, and the one it runs into.
        wanted = list(range(3 * per_page, 5 * per_page))
        found = _pages(_report(subject, *RANGE))
        text = f"{chosen_bytes + 1} bytes at page {3 * per_page} were written, and {_short(found)}"
        subject.expect(found == wanted, f"{text} are dirty")
        subject.saw(f"{len(found)} pages are dirty")


@rule(
    "log-report-clears",
    group=GROUP,
    text="REPORT clears the log for its range: the next one says what was written since.",
    source=f'{_REPORT}: "During querying the log is cleared for the IOVA range"',
    needs=NEEDS,
)
def _report_clears(subject: Subject) -> None:
    with dma_logged(subject):
        _let_write(subject, IOVA, PAGE_BYTES)
        first, second = _report(subject, *RANGE), _report(subject, *RANGE)
        subject.expect(bool(_pages(first)), "a page was written, and none is dirty")
        again = sorted(set(_pages(first)) & set(_pages(second)))
        subject.expect(not again, f"still dirty after the REPORT: {_short(again)}")
        subject.saw(f"{len(_pages(first))} dirty, then {len(_pages(second))}")


@rule(
    "log-start-clears",
    group=GROUP,
    text="A log that is started anew holds nothing of the one before.",
    source=f'{START}: "will be logged by the device" when it was started',
    needs=NEEDS,
)
def _start_clears(subject: Subject) -> None:
    with dma_logged(subject):
        _let_write(subject, IOVA, PAGE_BYTES)
    with dma_logged(subject):
        found = _pages(_report(subject, *RANGE))
        subject.expect(not found, f"dirty from before: {_short(found)}")
        subject.saw("nothing is dirty")


def _short(pages: list[int]) -> str:
    shown = ", ".join(map(str, pages[:8]))
    return f"pages {shown}{', …' if len(pages) > 8 else ''} ({len(pages)})" if pages else "none"


def _let_write(subject: Subject, iova: int, length: int) -> None:
    """Let the device write to its memory. Raises SkipRule where nobody knows how."""
    from vfiomig.simulator.device import SimulatedOps

    subject.log.begin(f"a write of the device: {length} bytes at {iova:#x}")
    if isinstance(subject.ops, SimulatedOps):
        subject.ops.write_memory(iova, length)
    elif subject.device.identity.driver == _TEST_DRIVER:
        region = get_region_info(subject.device_fd, 0).offset_bytes
        for register, value in ((_IOVA_REGISTER, iova), (_LENGTH_REGISTER, length)):
            os.pwrite(subject.device_fd, struct.pack("<Q", value), region + register)
    else:
        raise SkipRule("nobody knows how to make this device write to memory")
    subject.log.done(f"let it write {length} bytes at {iova:#x}")
