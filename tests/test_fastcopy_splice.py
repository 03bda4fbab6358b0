"""Splicing: the same bytes as by reading and writing, and a way back where the kernel says no."""

import ctypes
import errno
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copying import EVERYTHING, Filled, InChild, InThread, OpenFds, Refuse, pipe, whole
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, Template
from vfiomig.fd import OwnedFd


def counted(**more: int) -> Template:
    return Template(bytes(8), length_at=0, **more)  # type: ignore[arg-type]


def payload(stream: bytes) -> bytes:
    found = b""
    while stream:
        (length,) = struct.unpack_from("<Q", stream)
        found += stream[8 : 8 + length]
        stream = stream[8 + length :]
    return found


def collected(fd: int, into: list[bytes]) -> None:
    with open(fd, "rb", closefd=False) as file:
        into.append(file.read())


@given(st.integers(0, 20_000), st.integers(4096, 9000), st.sampled_from([1, 64, 512]))
def test_a_file_is_spliced_into_a_file(
    filled: Filled, size: int, buffer_bytes: int, align: int
) -> None:
    state, found = os.urandom(size), b""
    template = Template(bytes(8), b"|", align=align, length_at=0)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), buffer_bytes)
        outcome = writer.copy(src.fileno(), template, EVERYTHING, splicing=True)
        stream = whole(dst)
    assert (outcome, writer.device_bytes) == (Outcome.END_OF_STREAM, size)
    assert (writer.spliced_bytes, writer.stream_bytes) == (size, len(stream))
    while stream:
        (length,) = struct.unpack_from("<Q", stream)
        start = 8 + -8 % align
        end = start + length + -length % align
        assert 0 < length <= buffer_bytes
        assert not any(stream[8:start] + stream[start + length : end])
        assert stream[end : end + 1] == b"|"
        found, stream = found + stream[start : start + length], stream[end + 1 :]
    assert found == state


@pytest.mark.parametrize("kind", ["pipe", "polled pipe", "polled socket"])
def test_a_file_is_spliced_into_what_fills_up(
    filled: Filled, in_thread: InThread, kind: str
) -> None:
    state, received = os.urandom(3 << 20), list[bytes]()
    near, far = socket.socketpair()
    read_end, write_end = pipe()
    out, back = (near, far) if "socket" in kind else (write_end, read_end)
    with near, far, read_end, write_end, filled(state) as src:
        os.set_blocking(out.fileno(), kind == "pipe")
        reader = in_thread(lambda: collected(back.fileno(), received))
        writer = FrameWriter(out.fileno(), 1 << 20)
        outcome = writer.copy(src.fileno(), counted(), EVERYTHING, splicing=True)
        out.close()
        reader.join()
    assert (outcome, writer.spliced_bytes) == (Outcome.END_OF_STREAM, len(state))
    assert payload(received[0]) == state
    assert writer.stream_bytes == len(received[0])


def test_nothing_is_spliced_into_a_socket_that_blocks(filled: Filled, in_thread: InThread) -> None:
    # splice() has no MSG_DONTWAIT: a peer who stalls would make the copy deaf to cancel().
    state, received = os.urandom(1 << 20), list[bytes]()
    near, far = socket.socketpair()
    with near, far, filled(state) as src:
        reader = in_thread(lambda: collected(far.fileno(), received))
        writer = FrameWriter(near.fileno(), 1 << 16)
        writer.copy(src.fileno(), counted(), EVERYTHING, splicing=True)
        near.close()
        reader.join()
    assert (writer.spliced_bytes, payload(received[0])) == (0, state)


def test_a_pipe_fed_in_pieces_is_spliced(filled: Filled, in_thread: InThread) -> None:
    source, feed = pipe()
    state = os.urandom(300_000)

    def write() -> None:
        with feed:
            for at in range(0, len(state), 7000):
                os.write(feed.fileno(), state[at : at + 7000])

    with source, feed, filled(b"") as dst:
        in_thread(write)
        writer = FrameWriter(dst.fileno(), 1 << 16)
        outcome = writer.copy(source.fileno(), counted(), EVERYTHING, splicing=True)
        assert (outcome, writer.spliced_bytes) == (Outcome.END_OF_STREAM, len(state))
        assert payload(whole(dst)) == state


def test_a_source_that_cannot_splice_is_read(filled: Filled) -> None:
    # /proc/self/mem has no splice_read (measured: EINVAL, Linux 6.18), like every data_fd.
    state = os.urandom(100_000)
    memory = ctypes.create_string_buffer(state, len(state))
    with OwnedFd(os.open("/proc/self/mem", os.O_RDONLY)) as src, filled(b"") as dst:
        os.lseek(src.fileno(), ctypes.addressof(memory), os.SEEK_SET)
        writer = FrameWriter(dst.fileno(), 8192)
        outcome = writer.copy(src.fileno(), counted(), len(state), splicing=True)
        assert (outcome, writer.spliced_bytes) == (Outcome.LIMIT_REACHED, 0)
        assert payload(whole(dst)) == state


def test_a_sink_that_cannot_splice_is_written_to(filled: Filled) -> None:
    state = os.urandom(100_000)
    with filled(state) as src, filled(b"") as dst:
        again = f"/proc/self/fd/{dst.fileno()}"
        with OwnedFd(os.open(again, os.O_WRONLY | os.O_APPEND)) as appending:
            writer = FrameWriter(appending.fileno(), 8192)
            for limit in (20_000, EVERYTHING):
                writer.copy(src.fileno(), counted(), limit, splicing=True)
        assert writer.spliced_bytes == 0
        assert (writer.device_bytes, writer.stream_bytes) == (len(state), len(whole(dst)))
        assert payload(whole(dst)) == state


def test_nothing_is_spliced_past_a_digest_or_a_checksum(filled: Filled) -> None:
    with filled(b"abc") as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.copy(src.fileno(), counted(), 1, Digest(), splicing=True)
        template = Template(bytes(16), length_at=0, checksum_at=8)
        writer.copy(src.fileno(), template, EVERYTHING, splicing=True)
    assert (writer.device_bytes, writer.spliced_bytes) == (3, 0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.EINTR])
def test_a_failed_splice_from_the_source_is_its_error(
    filled: Filled, refuse: Refuse, in_child: InChild, code: int
) -> None:
    def fail() -> None:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.copy(src.fileno(), counted(), 100, splicing=True)
        refuse("splice", src.fileno(), code)
        with pytest.raises(OSError, match=os.strerror(code)):
            writer.copy(src.fileno(), counted(), EVERYTHING, splicing=True)
        assert (writer.failed_fd, writer.device_bytes) == (src.fileno(), 100)

    with filled(bytes(9000)) as src, filled(b"") as dst:
        in_child(fail)


def test_a_splice_into_a_full_disk_is_an_error_of_the_sink(filled: Filled) -> None:
    with filled(bytes(9000)) as src, OwnedFd(os.open("/dev/full", os.O_WRONLY)) as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        with pytest.raises(OSError, match="No space left"):
            writer.copy(src.fileno(), counted(), EVERYTHING, splicing=True)
        assert (writer.failed_fd, writer.device_bytes) == (dst.fileno(), 0)


def test_a_reader_who_leaves_during_a_splice_is_noticed(filled: Filled) -> None:
    read_end, write_end = pipe()
    with write_end, filled(bytes(9000)) as src:
        read_end.close()
        with pytest.raises(BrokenPipeError):
            FrameWriter(write_end.fileno(), 4096).copy(
                src.fileno(), counted(), EVERYTHING, splicing=True
            )


def test_the_private_pipe_goes_with_the_writer(filled: Filled, open_fds: OpenFds) -> None:
    before = open_fds()
    with filled(b"abc") as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        writer.copy(src.fileno(), counted(), EVERYTHING, splicing=True)
        assert len(open_fds()) == len(before) + 4
        del writer
    assert open_fds() == before
