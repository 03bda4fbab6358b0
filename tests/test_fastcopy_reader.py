"""Reading with the native module: what is given out, what is written on, and what fails."""

import errno
import fcntl
import os
import resource
import signal
import termios
import threading
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vfiomig._fastcopy import Digest, StreamReader
from vfiomig.fd import OwnedFd

Filled = Callable[[bytes], OwnedFd]
InChild = Callable[[Callable[[], object]], None]
InThread = Callable[[Callable[[], object]], threading.Thread]
Refuse = Callable[[str, int, int], None]
Alarms = Callable[[Callable[[], object]], None]


def pipe() -> tuple[OwnedFd, OwnedFd]:
    read_fd, write_fd = os.pipe()
    return OwnedFd(read_fd), OwnedFd(write_fd)


def whole(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)


def unread_bytes(fd: int) -> int:
    found = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, found)
    return int.from_bytes(found, "little")


steps = st.lists(
    st.tuples(st.sampled_from(["peek", "take", "forward", "nowhere"]), st.integers(0, 4096)),
    max_size=40,
)
sizes = st.lists(st.integers(1, 5000), max_size=20)


@given(steps, sizes, st.sampled_from(["blocking", "polled"]))
def test_any_order_of_calls_gives_the_bytes_in_order(
    filled: Filled, calls: list[tuple[str, int]], pieces: list[int], source_blocks: str
) -> None:
    content = os.urandom(sum(pieces))
    source, feed = pipe()

    def write() -> None:
        with feed:
            at = 0
            for size in pieces:
                at += os.write(feed.fileno(), content[at : at + size])

    with source, filled(b"") as dst:
        os.set_blocking(source.fileno(), source_blocks == "blocking")
        feeder = threading.Thread(target=write)
        feeder.start()
        reader, at, written, digest = StreamReader(source.fileno(), 4096), 0, b"", Digest()
        for call, count in calls:
            expected = content[at : at + count]
            if call == "peek":
                assert reader.peek(count) == expected
                continue
            if call == "take":
                assert reader.take(count) == expected
            else:
                fd = dst.fileno() if call == "forward" else -1
                assert reader.forward(fd, count, digest) == len(expected)
                written += expected if call == "forward" else b""
            at += len(expected)
            assert reader.offset == at
        assert reader.forward(-1, 1 << 40) == len(content) - at
        assert reader.peek(4096) == reader.take(1) == b""
        feeder.join()
        assert whole(dst) == written
    assert (reader.offset, reader.failed_fd) == (len(content), -1)


def test_what_is_forwarded_is_counted_and_digested(filled: Filled) -> None:
    content, digest = os.urandom(50_000), Digest()
    with filled(content) as src, filled(b"") as dst:
        reader = StreamReader(src.fileno(), 8192)
        assert reader.take(10) == content[:10]
        assert reader.forward(dst.fileno(), 30_000, digest) == 30_000
        reader.zeros(dst.fileno(), 200_000, digest)
        state = content[10:30_010] + bytes(200_000)
        assert whole(dst) == state
    assert digest.value == xxhash.xxh3_64_intdigest(state)
    assert (reader.device_bytes, reader.offset) == (230_000, 30_010)


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


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.EINVAL, errno.EINTR, errno.EAGAIN])
def test_a_failed_write_to_the_device_is_not_repeated(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        reader = StreamReader(src.fileno(), 4096)
        reader.forward(dst.fileno(), 100)
        refuse("write", dst.fileno(), code)
        for ask in (reader.forward, reader.zeros):
            with pytest.raises(OSError, match=os.strerror(code)) as failure:
                ask(dst.fileno(), 10)
            assert (failure.value.errno, reader.failed_fd) == (code, dst.fileno())
        assert (reader.device_bytes, reader.offset) == (100, 100)

    with filled(bytes(9000)) as src, filled(b"") as dst:
        in_child(fail)


def test_a_short_write_to_the_device_goes_on(filled: Filled, in_child: InChild) -> None:
    def write_to_the_limit() -> None:
        # RLIMIT_FSIZE: the write that crosses it is short, and the one behind it fails.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        reader = StreamReader(src.fileno(), 4096)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            reader.forward(dst.fileno(), 4096)
        assert reader.device_bytes == 1000

    with filled(bytes(9000)) as src, filled(b"") as dst:
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


def test_a_reader_that_was_cancelled_before_writes_nothing(filled: Filled) -> None:
    with filled(bytes(9000)) as src, filled(b"") as dst, OwnedFd(os.eventfd(0)) as wake:
        reader = StreamReader(src.fileno(), 4096, wake_fd=wake.fileno())
        reader.peek(4096)
        os.eventfd_write(wake.fileno(), 1)
        for ask in (reader.forward, reader.zeros):
            with pytest.raises(OSError, match="cancel"):
                ask(dst.fileno(), 10)
        with pytest.raises(OSError, match="cancel"):
            StreamReader(src.fileno(), 4096, wake_fd=wake.fileno()).take(1)
        assert whole(dst) == b""


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
