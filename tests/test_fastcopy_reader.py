"""Reading with the native module: what is given out, what is written on, and what fails."""

import errno
import os
import resource
import signal
import threading

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from copying import (
    EVERYTHING,
    Alarms,
    Filled,
    InChild,
    InThread,
    Refuse,
    checked,
    copied,
    counted,
    feed,
    framed,
    pipe,
    reading,
    unread_bytes,
    whole,
    written,
)
from vfiomig._fastcopy import Digest, Outcome, StreamReader
from vfiomig.fd import OwnedFd

Calls = list[tuple[str, bytes]]
KINDS = st.sampled_from(["blocking", "polled"])
calls_of_any_order = st.lists(
    st.tuples(
        st.sampled_from(["peek", "take", "copy", "nowhere"]), st.binary(min_size=1, max_size=4096)
    ),
    max_size=30,
)


def stream_of(calls: Calls) -> bytes:
    """Text for take(), a frame for copy(); peek() is of what comes next."""
    stream = b""
    for call, data in calls:
        if call != "peek":
            stream += data if call == "take" else framed(data, 4096)
    return stream


def check_calls(reader: StreamReader, dst: OwnedFd, calls: Calls, stream: bytes) -> bytes:
    """Make the calls, and check each. Returns what must have been written."""
    at, expected = 0, b""
    for call, data in calls:
        if call == "peek":
            assert reader.peek(len(data)) == stream[at : at + len(data)]
        elif call == "take":
            assert reader.take(len(data)) == data
            at += len(data)
        else:
            fd = dst.fileno() if call == "copy" else -1
            outcome = reader.copy(fd, counted(), len(data), frames=1)
            assert outcome is Outcome.LIMIT_REACHED
            assert (reader.frame_offset, reader.frame_bytes) == (at, len(data))
            assert reader.left_bytes == 0
            expected += data if call == "copy" else b""
            at += 8 + len(data)
        assert reader.offset == at
    return expected


@given(calls_of_any_order, st.lists(st.integers(1, 5000), max_size=20), KINDS)
def test_any_order_of_calls_gives_the_bytes_in_order(
    filled: Filled, calls: Calls, sizes: list[int], kind: str
) -> None:
    source, near = pipe()
    stream = stream_of(calls)
    with source, filled(b"") as dst:
        os.set_blocking(source.fileno(), kind == "blocking")
        feeder = threading.Thread(target=feed, args=(near, stream, sizes))
        feeder.start()
        reader = StreamReader(source.fileno(), 4096)
        expected = check_calls(reader, dst, calls, stream)
        assert reader.copy(-1, counted(), EVERYTHING) is Outcome.OTHER_FRAME
        assert reader.peek(4096) == reader.take(1) == b""
        feeder.join()
        assert whole(dst) == expected
    assert (reader.offset, reader.failed_fd) == (len(stream), -1)


def test_what_is_copied_is_counted_and_digested() -> None:
    state, digest = os.urandom(50_000) + bytes(200_000), Digest()
    stream = written(checked(), state, 100_000)
    with reading(b"in front  " + stream, 8192) as reader:
        assert reader.take(10) == b"in front  "
        assert copied(reader, checked(), digest) == (Outcome.OTHER_FRAME, state)
        assert (reader.device_bytes, reader.offset) == (250_000, 10 + len(stream))
        # From page 13 on: 50 000 bytes end inside the page before.
        assert reader.zero_bytes == 250_000 - 13 * 4096
    assert digest.value == xxhash.xxh3_64_intdigest(state)


def test_more_than_the_buffer_cannot_be_asked_for(filled: Filled) -> None:
    with filled(bytes(5000)) as src:
        reader = StreamReader(src.fileno(), 4096)
        for ask in (reader.peek, reader.take):
            with pytest.raises(ValueError, match="4097 bytes do not fit into a buffer of 4096"):
                ask(4097)
    for buffer_bytes in (0, 4095, (1 << 40) + 1):
        with pytest.raises(ValueError, match=f"a buffer of {buffer_bytes} bytes"):
            StreamReader(0, buffer_bytes)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_a_failed_read_keeps_what_came_before(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        reader = StreamReader(src.fileno(), 4096)
        reader.take(96)
        refuse("read", src.fileno(), code)
        assert len(reader.take(4000)) == 4000
        with pytest.raises(OSError, match=os.strerror(code)) as failure:
            reader.take(1)
        assert (failure.value.errno, reader.failed_fd) == (code, src.fileno())
        assert reader.offset == 4096

    with filled(bytes(9000)) as src:
        in_child(fail)


@pytest.mark.parametrize("kind", ["data", "zeros"])
@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENODEV, errno.EINVAL, errno.EINTR, errno.EAGAIN, errno.ENOMEM]
)
def test_a_failed_write_to_the_device_is_not_repeated(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int, kind: str
) -> None:
    state = b"x" * 3000 if kind == "data" else bytes(3000)
    stream = written(checked(), b"1" * 4096 + state)

    def fail() -> None:
        reader = StreamReader(src.fileno(), 4096)
        reader.copy(dst.fileno(), checked(), EVERYTHING, frames=1)
        offset = reader.offset
        refuse("write", dst.fileno(), code)
        # To repeat EINTR or EAGAIN would never end.
        with pytest.raises(OSError, match=os.strerror(code)) as failure:
            reader.copy(dst.fileno(), checked(), EVERYTHING)
        assert (failure.value.errno, reader.failed_fd) == (code, dst.fileno())
        assert (reader.device_bytes, reader.left_bytes) == (4096, 3000)
        assert reader.offset == offset + 64

    with filled(stream) as src, filled(b"") as dst:
        in_child(fail)


def test_a_short_write_to_the_device_goes_on(filled: Filled, in_child: InChild) -> None:
    def write_to_the_limit() -> None:
        # RLIMIT_FSIZE: the write that crosses it is short, and the one behind it fails.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        reader = StreamReader(src.fileno(), 4096)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            reader.copy(dst.fileno(), counted(), EVERYTHING)
        assert reader.device_bytes == 1000
        # Judged to its end, the frame has as many bytes as it says: none counts twice.
        reader.copy(-1, counted(), EVERYTHING, frames=1)
        assert reader.device_bytes == reader.frame_bytes == 9000

    with filled(framed(bytes(9000), 9000)) as src, filled(b"") as dst:
        in_child(write_to_the_limit)


@pytest.mark.parametrize("polled", [False, True])
def test_a_reader_of_an_empty_pipe_is_cancelled(in_thread: InThread, *, polled: bool) -> None:
    source, feed = pipe()

    def cancel() -> None:
        while unread_bytes(source.fileno()):
            os.sched_yield()
        os.eventfd_write(wake.fileno(), 1)

    with source, feed, OwnedFd(os.eventfd(0)) as wake:
        os.set_blocking(source.fileno(), not polled)
        os.write(feed.fileno(), b"abc")
        reader = StreamReader(source.fileno(), 4096, wake_fd=wake.fileno())
        in_thread(cancel)
        with pytest.raises(OSError, match="cancel") as failure:
            reader.peek(4)
        assert (failure.value.errno, reader.failed_fd) == (errno.ECANCELED, source.fileno())
        assert reader.offset == 0


@pytest.mark.parametrize("state", [b"x" * 3000, bytes(3000)])
def test_a_reader_that_was_cancelled_before_writes_nothing(filled: Filled, state: bytes) -> None:
    stream = written(checked(), state)
    with filled(stream) as src, filled(b"") as dst, OwnedFd(os.eventfd(0)) as wake:
        reader = StreamReader(src.fileno(), 4096, wake_fd=wake.fileno())
        reader.peek(len(stream))
        os.eventfd_write(wake.fileno(), 1)
        with pytest.raises(OSError, match="cancel"):
            reader.copy(dst.fileno(), checked(), EVERYTHING)
        with pytest.raises(OSError, match="cancel"):
            StreamReader(src.fileno(), 4096, wake_fd=wake.fileno()).take(1)
        assert whole(dst) == b""
        os.eventfd_read(wake.fileno())
        assert copied(reader, checked(), frames=1) == (Outcome.LIMIT_REACHED, state)


@pytest.mark.parametrize("polled", [False, True])
def test_a_signal_runs_its_handler_and_the_reader_goes_on(alarms: Alarms, *, polled: bool) -> None:
    source, feed = pipe()
    with source, feed:
        os.set_blocking(source.fileno(), not polled)
        handled = list[int]()

        def feed_at_the_fifth() -> None:
            handled.append(1)
            if len(handled) == 5:
                os.write(feed.fileno(), b"abc")

        alarms(feed_at_the_fifth)
        assert StreamReader(source.fileno(), 4096).take(3) == b"abc"
    assert len(handled) >= 5


def test_an_exception_in_a_signal_handler_stops_the_reader(alarms: Alarms) -> None:
    raised = list[int]()

    def interrupt() -> None:
        if not raised:
            raised.append(1)
            raise KeyboardInterrupt

    source, feed = pipe()
    with source, feed:
        reader = StreamReader(source.fileno(), 4096)

        def read() -> None:
            alarms(interrupt)
            reader.take(3)

        with pytest.raises(KeyboardInterrupt):
            read()


def test_other_python_threads_run_while_a_reader_waits(in_thread: InThread) -> None:
    source, feed = pipe()
    with source, feed:
        reading = threading.Event()
        in_thread(lambda: reading.wait() and os.write(feed.fileno(), b"abc"))
        reading.set()
        assert StreamReader(source.fileno(), 4096).take(3) == b"abc"


def test_a_closed_source_is_its_own_error(filled: Filled) -> None:
    with filled(b"") as dst, OwnedFd(os.open("/dev/null", os.O_WRONLY)) as src:
        reader = StreamReader(src.fileno(), 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.copy(dst.fileno(), counted(), EVERYTHING)
        assert (reader.failed_fd, reader.device_bytes) == (src.fileno(), 0)
