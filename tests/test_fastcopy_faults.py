"""Copying that fails, is interrupted or cancelled: the counters say how far it got."""

import errno
import os
import socket
import struct
import threading

import pytest

from copying import (
    EVERYTHING,
    Alarms,
    Filled,
    InChild,
    InThread,
    Refuse,
    asleep,
    counted,
    drained,
    pipe,
    unread_bytes,
)
from vfiomig._fastcopy import FrameWriter, Outcome
from vfiomig.fd import OwnedFd


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENODEV, errno.EINTR, errno.EBADF, errno.EFAULT, errno.ENOMEM]
)
def test_a_failed_read_says_its_errno_and_how_far_it_got(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        writer = FrameWriter(dst.fileno(), 4096)
        assert writer.copy(src.fileno(), counted(), 4100) is Outcome.LIMIT_REACHED
        refuse("read", src.fileno(), code)
        with pytest.raises(OSError, match=os.strerror(code)) as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert failure.value.errno == code
        assert writer.failed_fd == src.fileno()
        assert (writer.device_bytes, writer.stream_bytes, writer.frames) == (4100, 4116, 2)

    with filled(bytes(9000)) as src, filled(b"") as dst:
        in_child(fail)


@pytest.mark.parametrize("syscall", ["read", "splice"])
def test_enomsg_means_drained_and_not_the_end(
    filled: Filled, refuse: Refuse, in_child: InChild, syscall: str
) -> None:
    def drain() -> None:
        writer = FrameWriter(dst.fileno(), 4096)
        splicing = syscall == "splice"
        writer.copy(src.fileno(), counted(), 100, splicing=splicing)
        refuse(syscall, src.fileno(), errno.ENOMSG)
        for _ in range(2):
            outcome = writer.copy(src.fileno(), counted(), EVERYTHING, splicing=splicing)
            assert (outcome, writer.device_bytes) == (Outcome.DRAINED, 100)
        assert (writer.frames, writer.failed_fd) == (1, -1)

    with filled(bytes(9000)) as src, filled(b"") as dst:
        in_child(drain)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_write_says_its_errno_and_how_far_it_got(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.copy(src.fileno(), counted(), 100)
        refuse("write", dst.fileno(), code)
        with pytest.raises(OSError, match=os.strerror(code)) as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert (failure.value.errno, writer.failed_fd) == (code, dst.fileno())
        assert (writer.device_bytes, writer.stream_bytes, writer.frames) == (100, 108, 1)
        with pytest.raises(OSError, match=os.strerror(code)):
            writer.put(b"x")
        with pytest.raises(OSError, match=os.strerror(code)):
            writer.put_frame(counted(), b"x")
        assert (writer.stream_bytes, writer.frames) == (108, 1)

    with filled(bytes(9000)) as src, filled(b"") as dst:
        in_child(fail)


def test_a_closed_socket_is_an_error_and_no_signal(filled: Filled) -> None:
    near, far = socket.socketpair()
    with near, filled(b"x" * 10) as src:
        far.close()
        writer = FrameWriter(near.fileno(), 4096)
        with pytest.raises(BrokenPipeError):
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert writer.failed_fd == near.fileno()
    assert (writer.device_bytes, writer.stream_bytes) == (0, 0)


def test_a_full_disk_is_an_error_of_the_sink(filled: Filled) -> None:
    with filled(b"x") as src, OwnedFd(os.open("/dev/full", os.O_WRONLY)) as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        with pytest.raises(OSError, match="No space left") as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert (failure.value.errno, writer.failed_fd) == (errno.ENOSPC, dst.fileno())


def test_closed_descriptors_are_told_apart(filled: Filled) -> None:
    with filled(b"abc") as content:
        writer = FrameWriter(content.fileno(), 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.copy(-1, counted(), 1)
        assert writer.failed_fd == -1
        writer = FrameWriter(99_999, 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.copy(content.fileno(), counted(), 1)
        assert writer.failed_fd == 99_999


@pytest.mark.parametrize("kind", ["socket", "pipe", "polled pipe"])
def test_signals_do_not_disturb_a_blocked_sink(
    filled: Filled, in_thread: InThread, alarms: Alarms, kind: str
) -> None:
    # The reader begins when five handlers have run, all of them while the copy was blocked.
    begin, handled, state = threading.Event(), list[int](), os.urandom(1 << 20)
    received, begun = list[bytes](), list[bool]()
    near, far = socket.socketpair()
    read_end, write_end = pipe()
    out, back = (near, far) if kind == "socket" else (write_end, read_end)
    writer = FrameWriter(out.fileno(), 1 << 16)

    def handler() -> None:
        handled.append(writer.stream_bytes)
        # Once: a later signal may come while it is being set.
        if len(handled) > 4 and handled[-1] and handled[-1] == handled[-5] and not begun:
            begun.append(True)
            begin.set()

    def read() -> None:
        begin.wait()
        received.append(drained(back.fileno()))

    with near, far, read_end, write_end, filled(state) as src:
        os.set_blocking(out.fileno(), kind == "pipe")
        reader = in_thread(read)
        alarms(handler)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        out.close()
        reader.join()
    chunk = struct.pack("<Q", 1 << 16)
    assert received[0] == b"".join(
        chunk + state[at : at + (1 << 16)] for at in range(0, 1 << 20, 1 << 16)
    )


@pytest.mark.parametrize("kind", ["socket", "pipe", "polled pipe"])
def test_an_exception_in_a_signal_handler_stops_the_copy(
    filled: Filled, alarms: Alarms, kind: str
) -> None:
    near, far = socket.socketpair()
    read_end, write_end = pipe()
    out = near if kind == "socket" else write_end
    writer = FrameWriter(out.fileno(), 1 << 16)

    raised = list[int]()

    def interrupt() -> None:
        if writer.stream_bytes and not raised:
            raised.append(1)
            raise KeyboardInterrupt

    with near, far, read_end, write_end, filled(bytes(16 << 20)) as src:
        os.set_blocking(out.fileno(), kind == "pipe")
        alarms(interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.copy(src.fileno(), counted(), EVERYTHING)
    assert 0 < writer.stream_bytes < 16 << 20


def test_an_interrupted_read_of_the_source_is_not_repeated(alarms: Alarms) -> None:
    source, feed = pipe()
    handled = list[int]()
    with source, feed, OwnedFd(os.open("/dev/null", os.O_WRONLY)) as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        alarms(lambda: handled.append(1))
        with pytest.raises(InterruptedError):
            writer.copy(source.fileno(), counted(), EVERYTHING)
        assert writer.failed_fd == source.fileno()
    assert handled


def test_a_handler_runs_while_a_source_is_waited_for(alarms: Alarms) -> None:
    source, feed = pipe()
    with source, feed, OwnedFd(os.open("/dev/null", os.O_WRONLY)) as dst:
        os.set_blocking(source.fileno(), False)
        writer = FrameWriter(dst.fileno(), 4096)
        alarms(feed.close)
        assert writer.copy(source.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM


def test_a_copy_that_was_cancelled_before_takes_nothing(filled: Filled) -> None:
    with OwnedFd(os.eventfd(1)) as wake, filled(b"abc") as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096, wake_fd=wake.fileno())
        with pytest.raises(OSError, match="cancel") as failure:
            writer.copy(src.fileno(), counted(), EVERYTHING)
        assert failure.value.errno == errno.ECANCELED
        assert os.lseek(src.fileno(), 0, os.SEEK_CUR) == 0
        os.eventfd_read(wake.fileno())
        writer.copy(src.fileno(), counted(), EVERYTHING)
        assert os.pread(dst.fileno(), 20, 0) == struct.pack("<Q", 3) + b"abc"


@pytest.mark.parametrize("splicing", [False, True])
@pytest.mark.parametrize("kind", ["socket", "polled socket", "polled pipe"])
def test_a_copy_to_a_full_sink_is_cancelled(
    filled: Filled, in_thread: InThread, kind: str, *, splicing: bool
) -> None:
    near, far = socket.socketpair()
    read_end, write_end = pipe()
    out, copying = write_end if "pipe" in kind else near, threading.get_native_id()

    def cancel() -> None:
        while not (writer.stream_bytes and asleep(copying)):
            os.sched_yield()
        os.eventfd_write(wake.fileno(), 1)

    with (
        near,
        far,
        read_end,
        write_end,
        OwnedFd(os.eventfd(0)) as wake,
        filled(bytes(1 << 23)) as s,
    ):
        os.set_blocking(out.fileno(), kind == "socket")
        writer = FrameWriter(out.fileno(), 1 << 20, wake_fd=wake.fileno())
        in_thread(cancel)
        with pytest.raises(OSError, match="cancel") as failure:
            writer.copy(s.fileno(), counted(), EVERYTHING, splicing=splicing)
        assert failure.value.errno == errno.ECANCELED
    assert writer.device_bytes < 1 << 23


@pytest.mark.parametrize("splicing", [False, True])
def test_a_copy_from_an_empty_source_is_cancelled(
    filled: Filled, in_thread: InThread, *, splicing: bool
) -> None:
    source, feed = pipe()

    def cancel() -> None:
        while unread_bytes(source.fileno()):
            os.sched_yield()
        os.eventfd_write(wake.fileno(), 1)

    with source, feed, OwnedFd(os.eventfd(0)) as wake, filled(b"") as dst:
        os.set_blocking(source.fileno(), False)
        os.write(feed.fileno(), b"abc")
        writer = FrameWriter(dst.fileno(), 4096, wake_fd=wake.fileno())
        in_thread(cancel)
        with pytest.raises(OSError, match="cancel") as failure:
            writer.copy(source.fileno(), counted(), EVERYTHING, splicing=splicing)
        assert failure.value.errno == errno.ECANCELED
        assert (writer.device_bytes, writer.failed_fd) == (3, source.fileno())
