"""The ring: a thread of our own writes what copy() reads. Order, counters, errors, and the end."""

import errno
import gc
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copying import (
    EVERYTHING,
    THREADED_FROM,
    Filled,
    InChild,
    InThread,
    Refuse,
    asleep,
    checked,
    copied,
    counted,
    drained,
    feed,
    framed,
    only_threads,
    pattern,
    pipe,
    small_disk,
    thread_ids,
    unread_bytes,
    whole,
)
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader
from vfiomig.fd import OwnedFd

BUFFER = 1 << 16
STATE = pattern((6 << 20) + 12_345)
STREAM = framed(STATE, BUFFER)


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def ring_of(out: OwnedFd | socket.socket, slots: int = 4, wake_fd: int = -1) -> FrameWriter:
    return FrameWriter(out.fileno(), BUFFER, ring_slots=slots, wake_fd=wake_fd)


def counters(writer: FrameWriter) -> tuple[int, ...]:
    return writer.device_bytes, writer.stream_bytes, writer.frames, writer.sequence


ALL_FRAMES = -(-len(STATE) // BUFFER)
ALL = (len(STATE), len(STREAM), ALL_FRAMES, ALL_FRAMES)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 64])
def test_a_file_gets_the_bytes_in_their_order(filled: Filled, slots: int) -> None:
    with filled(STATE) as src, filled(b"") as dst:
        writer, before = ring_of(dst, slots), thread_ids()
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert thread_ids() == before  # nothing waited: a thread would cost more than it brings
        assert whole(dst) == STREAM
    assert counters(writer) == ALL
    assert (writer.failed_fd, writer.buffer_bytes, writer.direct_bytes) == (-1, BUFFER, 0)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_file_gets_a_thread_where_reads_wait(
    filled: Filled, in_thread: InThread, slots: int
) -> None:
    (read_end, write_end), reader = pipe(), threading.get_native_id()

    def feed_who_waits() -> None:
        with write_end:
            for at in range(0, len(STATE), BUFFER):
                while unread_bytes(read_end.fileno()) or not asleep(reader):
                    os.sched_yield()
                os.write(write_end.fileno(), STATE[at : at + BUFFER])

    with read_end, filled(b"") as dst:
        before = thread_ids()
        feeder = in_thread(feed_who_waits)
        writer = ring_of(dst, slots)
        assert writer.copy(read_end.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        feeder.join()
        # A thread that was joined may not have left the kernel yet.
        assert len(thread_ids() - before - {feeder.native_id}) == (slots > 1)
        assert whole(dst) == STREAM


@pytest.mark.parametrize("kind", ["socket", "polled socket", "pipe", "polled pipe"])
def test_a_slow_reader_gets_the_bytes_in_their_order(
    filled: Filled, in_thread: InThread, kind: str
) -> None:
    (near, far), (read_end, write_end) = socket.socketpair(), pipe()
    out, back = (near, far) if "socket" in kind else (write_end, read_end)
    received = list[bytes]()
    with near, far, read_end, write_end, filled(STATE) as src:
        os.set_blocking(out.fileno(), "polled" not in kind)
        reader = in_thread(lambda: received.append(drained(back.fileno())))
        writer = ring_of(out)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        out.close()
        reader.join()
    assert received[0] == STREAM
    assert counters(writer) == ALL


def test_a_source_of_short_reads_loses_nothing(filled: Filled, in_thread: InThread) -> None:
    source, near = pipe()
    with source, filled(b"") as dst:
        in_thread(lambda: feed(near, STATE, [7001] * 500))
        digest, writer = Digest(), ring_of(dst)
        writer.copy(source.fileno(), checked(), EVERYTHING, digest)
        os.lseek(dst.fileno(), 0, os.SEEK_SET)
        reader, again = StreamReader(dst.fileno(), BUFFER), Digest()
        assert copied(reader, checked(), again) == (Outcome.OTHER_FRAME, STATE)
    assert (again.value, reader.sequence) == (digest.value, writer.frames)


@settings(max_examples=15)
@given(st.integers(2, 5), st.integers(4096, 300_000), st.integers(0, 1 << 20), st.booleans())
def test_any_state_is_read_back(
    filled: Filled, slots: int, buffer_bytes: int, more: int, has_zeros: st.DataObject
) -> None:
    state = STATE[:THREADED_FROM] + bytes(more if has_zeros else 0) + STATE[:more]
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), buffer_bytes, ring_slots=slots)
        writer.copy(src.fileno(), checked(), EVERYTHING, Digest())
        os.lseek(dst.fileno(), 0, os.SEEK_SET)
        reader = StreamReader(dst.fileno(), BUFFER)
        assert copied(reader, checked(), Digest()) == (Outcome.OTHER_FRAME, state)
        writer.close()


def test_after_a_deadline_flush_waits_for_what_was_read(filled: Filled) -> None:
    with filled(STATE) as src, filled(b"") as dst:
        writer, outcome = ring_of(dst), Outcome.DEADLINE_REACHED
        while writer.device_bytes < 5 << 20:
            outcome = writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=1)
            assert outcome is Outcome.DEADLINE_REACHED
        writer.flush()
        assert whole(dst) == framed(STATE[: 5 << 20], BUFFER)
        writer.flush()
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert whole(dst) == STREAM
    assert counters(writer) == ALL


def test_what_is_put_goes_behind_what_was_read(filled: Filled) -> None:
    with filled(STATE) as src, filled(b"") as dst:
        writer = ring_of(dst)
        while writer.device_bytes < 5 << 20:
            writer.copy(src.fileno(), counted(), BUFFER, deadline_ns=1)
        writer.put(b"between")
        writer.put_frame(counted(), b"frame")
        writer.copy(src.fileno(), counted(), EVERYTHING)
        start, end = framed(STATE[: 5 << 20], BUFFER), framed(STATE[5 << 20 :], BUFFER)
        assert whole(dst) == start + b"between" + framed(b"frame", BUFFER) + end


def test_a_limit_is_kept_to_the_byte(filled: Filled) -> None:
    with filled(STATE) as src, filled(b"") as dst:
        writer = ring_of(dst)
        for limit in (THREADED_FROM + 1, 1_000_000, 3):
            assert writer.copy(src.fileno(), counted(), limit) is Outcome.LIMIT_REACHED
        assert os.lseek(src.fileno(), 0, os.SEEK_CUR) == writer.device_bytes
        assert len(whole(dst)) == writer.stream_bytes
    assert writer.device_bytes == THREADED_FROM + 1_000_004


# What fails.


def refuse_to_grow(filled: Filled, size: int) -> None:
    """Copy, in a child, to a file that may have so many bytes; look at what is left."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    threads = thread_ids()
    with filled(STATE) as src, filled(b"") as dst, filled(b"") as other:
        writer = ring_of(dst)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert (writer.failed_fd, writer.stream_bytes) == (dst.fileno(), size)
        assert whole(dst) == STREAM[:size]
        assert only_threads(threads)
        # The number may be another file's now: nobody must write to it any more.
        os.dup2(other.fileno(), dst.fileno())
        gc.collect()
        writer.close()
        assert whole(other) == b""


@pytest.mark.parametrize("size", [1 << 20, THREADED_FROM + (1 << 16), 5_000_001, len(STREAM) - 1])
def test_a_write_that_fails_ends_the_copy_with_its_errno(
    filled: Filled, in_child: InChild, size: int
) -> None:
    in_child(lambda: refuse_to_grow(filled, size))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EPIPE, errno.ENODEV])
def test_an_errno_of_the_writing_thread_is_raised(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        writer = ring_of(dst)
        writer.copy(src.fileno(), counted(), THREADED_FROM)
        refuse("write", dst.fileno(), code)  # of the thread that is started now, too
        with pytest.raises(OSError, match=os.strerror(code)) as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert (failure.value.errno, writer.failed_fd) == (code, dst.fileno())
        assert whole(dst) == framed(STATE[:THREADED_FROM], BUFFER)

    with filled(STATE) as src, filled(b"") as dst:
        in_child(fail)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_fills_ends_the_copy(filled: Filled, tmp_path: Path) -> None:
    with small_disk(tmp_path, 5 << 20), filled(STATE) as src:
        with (tmp_path / "out").open("wb", buffering=0) as file:
            writer = FrameWriter(file.fileno(), BUFFER, ring_slots=4)
            with pytest.raises(OSError, match="No space left"):
                writer.copy(src.fileno(), counted(), EVERYTHING)
            assert writer.failed_fd == file.fileno()
        assert (tmp_path / "out").read_bytes() == STREAM[: 5 << 20]


@pytest.mark.parametrize("at", [0, BUFFER, BUFFER + 1, 1_000_001])
def test_a_read_that_fails_stops_the_thread(
    filled: Filled, refuse: Refuse, in_child: InChild, at: int
) -> None:
    def fail() -> None:
        threads, writer = thread_ids(), ring_of(dst)
        writer.copy(src.fileno(), counted(), THREADED_FROM + at)
        refuse("read", src.fileno(), errno.EIO)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert only_threads(threads)
        assert (writer.failed_fd, writer.device_bytes) == (src.fileno(), THREADED_FROM + at)

    with filled(STATE) as src, filled(b"") as dst:
        in_child(fail)


def test_enomsg_means_drained_and_all_is_written(
    filled: Filled, refuse: Refuse, in_child: InChild
) -> None:
    def drain() -> None:
        writer = ring_of(dst)
        writer.copy(src.fileno(), counted(), 5 << 20, deadline_ns=0)
        refuse("read", src.fileno(), errno.ENOMSG)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.DRAINED
        assert whole(dst) == framed(STATE[: 5 << 20], BUFFER)

    with filled(STATE) as src, filled(b"") as dst:
        in_child(drain)


def test_without_threads_one_does_both(filled: Filled, refuse: Refuse, in_child: InChild) -> None:
    def copy() -> None:
        for syscall in ("clone3", "clone"):
            refuse(syscall, -1, errno.EAGAIN)
        threads, writer = thread_ids(), ring_of(dst)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert thread_ids() == threads
        assert whole(dst) == STREAM
        assert counters(writer) == ALL

    with filled(STATE) as src, filled(b"") as dst:
        in_child(copy)


@pytest.mark.parametrize(("slots", "writers"), [(0, 1), (1025, 1), (4, 0), (4, 4), (1, 2), (-1, 1)])
def test_rings_that_cannot_be_are_refused(slots: int, writers: int) -> None:
    with pytest.raises(ValueError, match=f"{writers} writers and {slots} slots"):
        FrameWriter(1, BUFFER, ring_slots=slots, writers=writers)


# Side by side.


def test_two_rings_in_two_threads_do_not_disturb_each_other(
    filled: Filled, in_thread: InThread
) -> None:
    states = [pattern(6 << 20, seed) for seed in (2, 3)]
    (one, other), (first, second) = map(filled, states), (filled(b""), filled(b""))
    with one, other, first, second:
        jobs: list[Callable[[], object]] = [
            lambda: ring_of(first).copy(one.fileno(), counted(), EVERYTHING),
            lambda: ring_of(second).copy(other.fileno(), counted(), EVERYTHING),
        ]
        for thread in [in_thread(job) for job in jobs]:
            thread.join()
        assert [whole(first), whole(second)] == [framed(state, BUFFER) for state in states]


def test_a_thread_that_is_busy_in_python_does_not_stop_the_copy(
    filled: Filled, in_thread: InThread
) -> None:
    done = list[bool]()

    def spin() -> None:
        while not done:
            pass

    with filled(STATE) as src, filled(b"") as dst:
        in_thread(spin)
        try:
            ring_of(dst).copy(src.fileno(), counted(), EVERYTHING)
        finally:
            done.append(True)
        assert whole(dst) == STREAM


def test_a_pipe_that_blocks_is_written_without_a_thread(
    filled: Filled, in_thread: InThread
) -> None:
    # Nothing could end a thread that waits there: close() would wait for ever.
    read_end, write_end = pipe()
    with read_end, write_end, filled(STATE) as src:
        reader = in_thread(lambda: drained(read_end.fileno()))
        before = thread_ids()
        writer = FrameWriter(write_end.fileno(), BUFFER, ring_slots=4)
        writer.copy(src.fileno(), counted(), THREADED_FROM + BUFFER)
        assert thread_ids() == before
        write_end.close()
        reader.join()
