"""A rate, and a buffer that grows: how much is read and written at a time, and when."""

import errno
import os
import socket
import threading
import time

import pytest

from copying import EVERYTHING, Filled, InThread, asleep, counted, framed, pattern, whole
from vfiomig._fastcopy import FrameWriter, Outcome, is_fixed_cost_high
from vfiomig.fd import OwnedFd

PIECE = 1 << 16  # the least that is read at once with a rate


@pytest.mark.parametrize("slots", [1, 4])
def test_a_rate_is_kept(filled: Filled, slots: int) -> None:
    state = pattern(40 * PIECE)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 1 << 20, ring_slots=slots)
        writer.bytes_per_s = 5 * len(state)
        started_ns = time.monotonic_ns()
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        took_ns = time.monotonic_ns() - started_ns
        assert whole(dst) == framed(state, len(state) // 10)  # fifty reads a second
    # A fifth of a second, less the last of ten frames and what lateness may be made good for.
    assert took_ns > 180_000_000 - 50_000_000


@pytest.mark.parametrize("bytes_per_s", [1, 50 * PIECE, 50 * PIECE + 50, 1 << 40])
def test_reads_are_small_enough_for_the_rate(filled: Filled, bytes_per_s: int) -> None:
    with filled(pattern(32 * PIECE)) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 1 << 20)
        writer.bytes_per_s = bytes_per_s
        writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=1)
        assert writer.device_bytes == min(max(PIECE, bytes_per_s // 50), 1 << 20)


def wait_until_it_paces(writer: FrameWriter, copying: int) -> None:
    while not (writer.stream_bytes and asleep(copying)):
        os.sched_yield()


@pytest.mark.parametrize("slots", [1, 4])
def test_a_copy_that_waits_for_its_rate_is_cancelled(
    filled: Filled, in_thread: InThread, slots: int
) -> None:
    copying = threading.get_native_id()
    with filled(bytes(1 << 20)) as src, filled(b"") as dst, OwnedFd(os.eventfd(0)) as wake:
        writer = FrameWriter(dst.fileno(), PIECE, wake_fd=wake.fileno(), ring_slots=slots)
        writer.bytes_per_s = 1  # eighteen hours for the next frame

        def cancel() -> None:
            wait_until_it_paces(writer, copying)
            os.eventfd_write(wake.fileno(), 1)

        in_thread(cancel)
        with pytest.raises(OSError, match="cancel") as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert failure.value.errno == errno.ECANCELED
        assert (writer.stream_bytes, writer.failed_fd) == (PIECE + 8, dst.fileno())


@pytest.mark.parametrize("bytes_per_s", [0, 1 << 40])
@pytest.mark.parametrize("slots", [1, 4])
def test_another_thread_may_change_the_rate(
    filled: Filled, in_thread: InThread, slots: int, bytes_per_s: int
) -> None:
    copying, state = threading.get_native_id(), pattern(32 * PIECE)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), PIECE, ring_slots=slots)
        writer.bytes_per_s = 20 * PIECE  # 50 ms for each frame

        def change() -> None:
            wait_until_it_paces(writer, copying)
            writer.bytes_per_s = bytes_per_s

        in_thread(change)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert whole(dst) == framed(state, PIECE)


@pytest.mark.parametrize("earlier", [0, 1 << 40])
def test_what_passed_at_a_higher_rate_is_not_owed(filled: Filled, earlier: int) -> None:
    with filled(bytes(34 * PIECE)) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), PIECE)
        for bytes_per_s, pieces in ((1 << 40, 1), (earlier, 32)):
            writer.bytes_per_s = bytes_per_s
            writer.copy(src.fileno(), counted(), pieces * PIECE)
        writer.bytes_per_s = 8 * PIECE  # as if it had been 8 from the beginning: four seconds
        started_ns = time.monotonic_ns()
        writer.copy(src.fileno(), counted(), PIECE)
        assert time.monotonic_ns() - started_ns < 2e9


# The buffer that grows.


@pytest.mark.parametrize(
    ("quarter_ns", "full_ns", "is_high"),
    [
        (100, 100, True),  # all of it is fixed
        (25, 100, False),  # none is
        (32, 100, False),  # 9.3 of 100
        (33, 100, True),  # 10.7 of 100
        (325, 1000, False),  # a tenth, and no more
        (20, 100, False),  # a small read that was lucky
        (0, 0, False),
        (1 << 40, 1 << 40, True),
        (1, 1 << 60, False),
    ],
)
def test_a_fixed_cost_above_a_tenth_is_high(quarter_ns: int, full_ns: int, is_high: object) -> None:
    assert is_fixed_cost_high(quarter_ns, full_ns) is is_high


# Which reads are small: two full ones, then small and full in turn.
TIMED = [PIECE, PIECE] + 3 * [PIECE // 4, PIECE]


def lengths(stream: bytes) -> list[int]:
    found = []
    while stream:
        found.append(int.from_bytes(stream[:8], "little"))
        stream = stream[8 + found[-1] :]
    return found


@pytest.mark.parametrize("slots", [1, 4])
def test_a_file_is_copied_right_whether_the_buffer_grows_or_not(filled: Filled, slots: int) -> None:
    state = pattern(6 << 20)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), PIECE, ring_slots=slots, grown_bytes=4 * PIECE)
        writer.copy(src.fileno(), counted(), EVERYTHING)
        stream = whole(dst)
    timed, rest = sum(TIMED), len(state) - sum(TIMED)
    assert writer.buffer_bytes in (PIECE, 4 * PIECE)
    assert lengths(stream)[:8] == TIMED
    assert stream[timed + 8 * 8 :] == framed(state[timed:], writer.buffer_bytes)
    assert sum(lengths(stream)[8:]) == rest


def packets(*sizes: int) -> tuple[socket.socket, socket.socket]:
    """A source each of whose reads gives one packet, and its other end."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for size in sizes:
        near.send(b"x" * size)
    return near, far


def test_a_source_that_is_slow_to_begin_makes_the_buffer_grow(
    filled: Filled, in_thread: InThread
) -> None:
    copying, last = threading.get_native_id(), 2 * PIECE
    near, far = packets()

    def send_when_it_waits() -> None:
        for size in [*TIMED, last]:
            while not asleep(copying):
                os.sched_yield()
            near.send(b"x" * size)
        near.close()

    with near, far, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), PIECE, grown_bytes=4 * PIECE)
        in_thread(send_when_it_waits)
        assert writer.copy(far.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert lengths(whole(dst)) == [*TIMED, last]
    assert writer.buffer_bytes == 4 * PIECE


def test_short_reads_never_make_it_grow(filled: Filled) -> None:
    # The fourth is not cut to a quarter: the first has said that the source decides.
    sizes = [1000, 2000, 3000, 40_000, 40_000, 1000]
    near, far = packets(*sizes)
    with near, far, filled(b"") as dst:
        near.close()
        writer = FrameWriter(dst.fileno(), PIECE, grown_bytes=4 * PIECE)
        assert writer.copy(far.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert lengths(whole(dst)) == sizes
    assert writer.buffer_bytes == PIECE


def test_a_limit_never_makes_it_grow(filled: Filled) -> None:
    with filled(pattern(1 << 20)) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), PIECE, grown_bytes=4 * PIECE)
        while writer.copy(src.fileno(), counted(), 40_000) is Outcome.LIMIT_REACHED:
            pass
        assert set(lengths(whole(dst))[:-1]) == {40_000}
    assert writer.buffer_bytes == PIECE
