"""Copying with the native module: what arrives, in what frames, and what the counters say."""

import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from itertools import accumulate

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from copying import EVERYTHING, Filled, InThread, counted, drained, pipe, whole
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, Template, xxh3_64
from vfiomig.fd import OwnedFd


def chunks(stream: bytes) -> list[bytes]:
    found = []
    while stream:
        (length,) = struct.unpack_from("<Q", stream)
        found.append(stream[8 : 8 + length])
        stream = stream[8 + length :]
    return found


def test_each_read_becomes_one_frame(filled: Filled) -> None:
    state = os.urandom(10_000)
    with filled(state) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        assert chunks(whole(dst)) == [state[:4096], state[4096:8192], state[8192:]]
    assert (writer.device_bytes, writer.stream_bytes) == (10_000, 10_024)
    assert (writer.frames, writer.sequence, writer.spliced_bytes) == (3, 3, 0)
    assert (writer.failed_fd, writer.buffer_bytes) == (-1, 4096)


@given(st.lists(st.binary(min_size=1, max_size=9000), max_size=20))
def test_short_reads_lose_nothing(filled: Filled, pieces: list[bytes]) -> None:
    read_end, write_end = pipe()
    digest = Digest()

    def feed() -> None:
        with write_end:
            for piece in pieces:
                os.write(write_end.fileno(), piece)

    with read_end, filled(b"") as dst:
        feeder = threading.Thread(target=feed)
        feeder.start()
        writer = FrameWriter(dst.fileno(), 4096)
        outcome = writer.copy(read_end.fileno(), counted(), EVERYTHING, digest)
        feeder.join()
        found = chunks(whole(dst))
    assert outcome is Outcome.END_OF_STREAM
    assert b"".join(found) == b"".join(pieces)
    assert all(0 < len(chunk) <= 4096 for chunk in found)
    assert digest.value == xxhash.xxh3_64_intdigest(b"".join(pieces))
    assert (writer.device_bytes, writer.frames) == (sum(map(len, pieces)), len(found))


@given(st.integers(100, 70_000), st.integers(4096, 70_000))
def test_partial_sends_lose_nothing(filled: Filled, piece: int, buffer_bytes: int) -> None:
    near, far = socket.socketpair()
    state = bytes(range(1, 255)) * 800
    received = bytearray()

    def receive() -> None:
        while data := far.recv(piece):
            received.extend(data)

    with near, far, filled(state) as src:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        receiver = threading.Thread(target=receive)
        receiver.start()
        writer = FrameWriter(near.fileno(), buffer_bytes)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        near.close()
        receiver.join()
    assert b"".join(chunks(bytes(received))) == state
    assert writer.stream_bytes == len(received)


def test_a_full_pipe_that_does_not_block_is_waited_for(filled: Filled, in_thread: InThread) -> None:
    read_end, write_end = pipe()
    state, received = os.urandom(300_000), list[bytes]()
    with read_end, write_end, filled(state) as src:
        os.set_blocking(write_end.fileno(), False)
        reader = in_thread(lambda: received.append(drained(read_end.fileno())))
        writer = FrameWriter(write_end.fileno(), 1 << 17)
        assert writer.copy(src.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
        write_end.close()
        reader.join()
    assert b"".join(chunks(received[0])) == state


def test_an_empty_source_that_does_not_block_is_waited_for(in_thread: InThread) -> None:
    (source, feed), (result, sink) = pipe(), pipe()

    def one_after_the_other() -> None:
        # The next piece is only written when the one before has arrived: the copy finds nothing.
        with feed:
            for number in range(20):
                os.write(feed.fileno(), bytes([number]))
                assert os.read(result.fileno(), 9) == struct.pack("<QB", 1, number)

    with source, feed, result, sink:
        os.set_blocking(source.fileno(), False)
        in_thread(one_after_the_other)
        writer = FrameWriter(sink.fileno(), 4096)
        assert writer.copy(source.fileno(), counted(), EVERYTHING) is Outcome.END_OF_STREAM
    assert writer.device_bytes == 20


def test_other_python_threads_run_while_a_copy_waits(filled: Filled, in_thread: InThread) -> None:
    source, feed = pipe()
    copying = threading.Event()

    def wake_the_copy() -> None:
        copying.wait()
        with feed:
            os.write(feed.fileno(), b"abc")

    with source, feed, filled(b"") as dst:
        in_thread(wake_the_copy)
        copying.set()
        # A blocking read of an empty pipe: with the GIL held nobody could ever write to it.
        FrameWriter(dst.fileno(), 4096).copy(source.fileno(), counted(), EVERYTHING)
        assert chunks(whole(dst)) == [b"abc"]


def test_a_limit_is_kept_to_the_byte_and_the_next_copy_goes_on(filled: Filled) -> None:
    with filled(b"abcdefghij") as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        assert writer.copy(src.fileno(), counted(), 0) is Outcome.LIMIT_REACHED
        assert writer.copy(src.fileno(), counted(), 4) is Outcome.LIMIT_REACHED
        assert os.lseek(src.fileno(), 0, os.SEEK_CUR) == 4
        assert writer.copy(src.fileno(), counted(), 7) is Outcome.END_OF_STREAM
        assert chunks(whole(dst)) == [b"abcd", b"efghij"]
        with pytest.raises(OverflowError):
            writer.copy(src.fileno(), counted(), -1)


def test_a_deadline_ends_the_copy_behind_a_chunk(filled: Filled) -> None:
    with filled(bytes(9000)) as src, filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        outcome = writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=1)
        assert (outcome, writer.device_bytes) == (Outcome.DEADLINE_REACHED, 4096)
        future = time.monotonic_ns() + 10**12
        outcome = writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=future)
        assert (outcome, writer.device_bytes) == (Outcome.END_OF_STREAM, 9000)


ODD_CHUNKS = [bytes(4096), bytes(4095) + b"\1", b"\1" + bytes(4095), bytes(4096), b"\xff" * 4096]


@given(st.permutations(ODD_CHUNKS), st.sampled_from([b"", b"\0", bytes(7), b"\0\1"]))
def test_a_chunk_of_zeros_travels_as_a_header(
    filled: Filled, state: list[bytes], last: bytes
) -> None:
    template = Template(b"D" + bytes(8), length_at=1, kind_at=0, zeros_kind=ord("Z"))
    with filled(b"".join(state) + last) as src, filled(b"") as dst:
        FrameWriter(dst.fileno(), 4096).copy(src.fileno(), template, EVERYTHING)
        expected = b"".join(
            struct.pack("<cQ", *((b"D", len(chunk)) if any(chunk) else (b"Z", len(chunk))))
            + (chunk if any(chunk) else b"")
            for chunk in [*state, last]
            if chunk
        )
        assert whole(dst) == expected


@given(st.binary(max_size=2000), st.integers(0, 2**64 - 1), st.integers(0, 2000))
def test_checksums_are_those_of_xxhash(content: bytes, seed: int, cut: int) -> None:
    assert xxh3_64(content) == xxhash.xxh3_64_intdigest(content)
    assert xxh3_64(content, seed) == xxhash.xxh3_64_intdigest(content, seed)
    digest = Digest()
    digest.update(content[:cut])
    assert digest.value == xxhash.xxh3_64_intdigest(content[:cut])
    digest.update(memoryview(content)[cut:])
    assert digest.value == xxhash.xxh3_64_intdigest(content)


def test_what_is_put_is_written_as_it_is(filled: Filled) -> None:
    with filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        for data in (b"abc", b"", bytearray(b"def"), memoryview(b"x" * 100_000)):
            writer.put(data)
        assert whole(dst) == b"abcdef" + b"x" * 100_000
        with pytest.raises(ValueError, match="4097 bytes do not fit into a buffer of 4096"):
            writer.put_frame(counted(), bytes(4097))
    assert (writer.stream_bytes, writer.device_bytes, writer.frames) == (100_006, 0, 0)


def test_counters_go_beyond_four_gigabytes() -> None:
    size = 5 << 30
    with OwnedFd(os.memfd_create("sparse")) as src, OwnedFd(os.open("/dev/null", os.O_WRONLY)) as n:
        os.ftruncate(src.fileno(), size)
        writer = FrameWriter(n.fileno(), 1 << 20)
        soon = time.monotonic_ns() + 3 * 10**9
        outcome = writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=soon, splicing=True)
    if outcome is Outcome.DEADLINE_REACHED:
        pytest.skip("this machine takes more than three seconds for 5 GiB")
    assert (outcome, writer.device_bytes) == (Outcome.END_OF_STREAM, size)
    assert writer.stream_bytes == size + 8 * writer.frames


def test_memory_does_not_grow_with_the_state(
    in_child: Callable[[Callable[[], None]], None],
) -> None:
    def copy_much() -> None:
        with OwnedFd(os.memfd_create("s")) as src, OwnedFd(os.open("/dev/null", os.O_WRONLY)) as n:
            os.ftruncate(src.fileno(), 128 << 20)
            writer = FrameWriter(n.fileno(), 1 << 20)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            writer.copy(src.fileno(), counted(), EVERYTHING)
            assert writer.device_bytes == 128 << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 10

    in_child(copy_much)


@pytest.mark.parametrize("buffer_bytes", [0, 1, 4095, (1 << 40) + 1])
def test_buffers_out_of_bounds_are_refused(buffer_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"a buffer of {buffer_bytes} bytes"):
        FrameWriter(1, buffer_bytes)


def test_totals_of_many_frames_add_up(filled: Filled) -> None:
    sizes = list(accumulate(range(1, 60)))
    with filled(b"") as dst:
        writer = FrameWriter(dst.fileno(), 4096)
        for size in sizes:
            writer.put_frame(counted(), b"x" * size)
        assert [len(chunk) for chunk in chunks(whole(dst))] == sizes
    assert writer.stream_bytes == sum(sizes) + 8 * len(sizes)
