"""The ring and a peer who reads no more: cancelling, signals, closing, forks, and what is left."""

import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from copying import (
    EVERYTHING,
    THREADED_FROM,
    Alarms,
    Filled,
    InChild,
    InThread,
    OpenFds,
    asleep,
    counted,
    framed,
    only_threads,
    pattern,
    thread_ids,
    whole,
)
from vfiomig._fastcopy import FrameWriter, Outcome
from vfiomig.fd import OwnedFd

BUFFER, SLOTS = 1 << 16, 4
STATE = pattern(6 << 20)
STREAM = framed(STATE, BUFFER)
# The reader takes what is written before there is a thread, and no more.
TAKEN = len(framed(STATE[:THREADED_FROM], BUFFER))
# What copy() can read until it waits for a slot: the writer is stuck in the first.
FULL = THREADED_FROM + SLOTS * BUFFER


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def take(far: socket.socket, count: int) -> bytes:
    found = bytearray()
    while piece := far.recv(count - len(found)):
        found += piece
    return bytes(found)


@dataclass
class Stalled:
    """A writer whose thread waits for its peer, with a slot to spare; and both ends.

    before: the threads without the writer's.
    """

    before: set[int]
    writer: FrameWriter
    src: OwnedFd
    near: socket.socket
    far: socket.socket
    wake: OwnedFd

    def copy(self) -> Outcome:
        return self.writer.copy(self.src.fileno(), counted(), EVERYTHING)

    def is_full(self, thread_id: int) -> bool:
        """Whether the thread that copies waits for a slot."""
        return self.writer.device_bytes == FULL and asleep(thread_id)


def new_writer(near: socket.socket, wake: OwnedFd) -> FrameWriter:
    return FrameWriter(near.fileno(), BUFFER, wake_fd=wake.fileno(), ring_slots=SLOTS)


@contextmanager
def _stalled() -> Iterator[Stalled]:
    near, far = socket.socketpair()
    with near, far, OwnedFd(os.memfd_create("s")) as src, OwnedFd(os.eventfd(0)) as wake:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        os.pwrite(src.fileno(), STATE, 0)
        ring = Stalled(thread_ids(), new_writer(near, wake), src, near, far, wake)
        reader = threading.Thread(target=take, args=(far, TAKEN))
        reader.start()
        while ring.writer.device_bytes < FULL - BUFFER:
            outcome = ring.writer.copy(src.fileno(), counted(), EVERYTHING, deadline_ns=1)
            assert outcome is Outcome.DEADLINE_REACHED
        reader.join()
        yield ring


@pytest.fixture
def ring(leaves_nothing: None) -> Iterator[Stalled]:
    with _stalled() as stalled:
        yield stalled
        del stalled.writer


def when_full(ring: Stalled, action: Callable[[], object]) -> Callable[[], None]:
    """A job for another thread: wait until the copy of this one is stuck, then act."""
    copying = threading.get_native_id()

    def job() -> None:
        while not ring.is_full(copying):
            os.sched_yield()
        action()

    return job


def test_a_peer_who_reads_again_gets_all(ring: Stalled, in_thread: InThread) -> None:
    received = list[bytes]()
    rest = len(STREAM) - TAKEN
    reader = in_thread(when_full(ring, lambda: received.append(take(ring.far, rest))))
    assert ring.copy() is Outcome.END_OF_STREAM
    reader.join()
    assert received[0] == STREAM[TAKEN:]
    assert (ring.writer.device_bytes, ring.writer.stream_bytes) == (len(STATE), len(STREAM))


def test_a_copy_that_waits_for_a_slot_is_cancelled(ring: Stalled, in_thread: InThread) -> None:
    in_thread(when_full(ring, lambda: os.eventfd_write(ring.wake.fileno(), 1)))
    with pytest.raises(OSError, match="cancel") as failure:
        ring.copy()
    assert (failure.value.errno, ring.writer.failed_fd) == (errno.ECANCELED, ring.near.fileno())
    assert ring.writer.device_bytes == FULL


def test_a_flush_is_cancelled(ring: Stalled, in_thread: InThread) -> None:
    copying = threading.get_native_id()

    def cancel() -> None:
        while not asleep(copying):
            os.sched_yield()
        os.eventfd_write(ring.wake.fileno(), 1)

    in_thread(cancel)
    with pytest.raises(OSError, match="cancel"):
        ring.writer.flush()


def test_a_peer_who_goes_away_is_noticed(ring: Stalled, in_thread: InThread) -> None:
    in_thread(when_full(ring, lambda: ring.far.shutdown(socket.SHUT_RDWR)))
    with pytest.raises(BrokenPipeError):
        ring.copy()
    assert ring.writer.failed_fd == ring.near.fileno()


def test_a_handler_that_raises_ends_a_copy_that_waits_for_a_slot(
    ring: Stalled, alarms: Alarms
) -> None:
    raised = list[int]()

    def interrupt() -> None:
        if ring.writer.device_bytes == FULL and not raised:
            raised.append(1)
            raise KeyboardInterrupt

    alarms(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ring.copy()
    assert only_threads(ring.before)


def test_handlers_run_while_a_copy_waits_for_a_slot(
    ring: Stalled, alarms: Alarms, in_thread: InThread
) -> None:
    handled, received, begin = list[int](), list[bytes](), threading.Event()

    def handler() -> None:
        handled.append(ring.writer.device_bytes)
        if handled[-5:] == [FULL] * 5:
            begin.set()

    def read() -> None:
        begin.wait()
        received.append(take(ring.far, len(STREAM) - TAKEN))

    reader = in_thread(read)
    alarms(handler)
    assert ring.copy() is Outcome.END_OF_STREAM
    reader.join()
    assert received[0] == STREAM[TAKEN:]


def test_nothing_is_written_once_the_copy_has_failed(
    ring: Stalled, in_thread: InThread, filled: Filled
) -> None:
    with filled(b"") as other:
        in_thread(when_full(ring, lambda: os.eventfd_write(ring.wake.fileno(), 1)))
        with pytest.raises(OSError, match="cancel"):
            ring.copy()
        written = ring.writer.stream_bytes
        # The number may be another file's now.
        os.dup2(other.fileno(), ring.near.fileno())
        ring.writer.flush()
        ring.writer.close()
        assert (whole(other), ring.writer.stream_bytes) == (b"", written)


def test_closing_does_not_wait_for_the_peer(ring: Stalled) -> None:
    ring.writer.close()
    assert only_threads(ring.before)
    assert ring.writer.stream_bytes < ring.writer.device_bytes
    ring.writer.close()


def test_a_writer_that_nobody_closed_takes_its_thread_along(
    ring: Stalled, open_fds: OpenFds
) -> None:
    before = len(open_fds())
    ring.writer = FrameWriter(ring.near.fileno(), 4096)
    assert only_threads(ring.before)
    assert len(open_fds()) == before - 1  # the eventfd that stops the thread


def test_the_thread_takes_no_signals(ring: Stalled) -> None:
    while len(found := thread_ids() - ring.before) > 1:
        os.sched_yield()  # the reader's thread is joined, and may be listed still
    with open(f"/proc/self/task/{found.pop()}/status") as file:
        fields = dict(line.split(":\t") for line in file)
    # All but SIGKILL and SIGSTOP, and the two that nptl(7) keeps for itself.
    blocked = sum(1 << number - 1 for number in range(1, 65) if number not in (9, 19, 32, 33))
    assert int(fields["SigBlk"], 16) & blocked == blocked


def goes_on(ring: Stalled, in_thread: InThread) -> bytes:
    """What the peer gets when it reads again."""
    received = list[bytes]()
    reader = in_thread(lambda: received.append(take(ring.far, len(STREAM) - TAKEN)))
    try:
        assert ring.copy() is Outcome.END_OF_STREAM
    finally:
        ring.near.close()
        reader.join()
    return received[0]


def test_a_fork_leaves_without_the_thread(
    ring: Stalled, in_child: InChild, in_thread: InThread
) -> None:
    def forget() -> None:
        assert thread_ids() == {os.getpid()}
        del ring.writer
        gc.collect()

    in_child(forget)
    assert goes_on(ring, in_thread) == STREAM[TAKEN:]


def test_a_fork_that_closes_the_writer_does_not_disturb_the_parent(
    ring: Stalled, in_child: InChild, in_thread: InThread
) -> None:
    in_child(ring.writer.close)
    assert goes_on(ring, in_thread) == STREAM[TAKEN:]
