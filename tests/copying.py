"""What the tests of the native module share: templates, streams, pipes, and threads looked at."""

import fcntl
import os
import random
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader, Template
from vfiomig.fd import OwnedFd

Filled = Callable[[bytes], OwnedFd]
InChild = Callable[[Callable[[], object]], None]
InThread = Callable[[Callable[[], object]], Thread]
OpenFds = Callable[[], dict[int, str]]
Refuse = Callable[[str, int, int], None]
Alarms = Callable[[Callable[[], object]], None]
EVERYTHING = 1 << 62
PAGE = 4096
# From here on a ring has a thread of its own: THREADED_FROM_BYTES, src/fastcopy/writer.pxi.
THREADED_FROM = 4 << 20


def counted() -> Template:
    """Eight bytes of length before each chunk, and nothing else."""
    return Template(bytes(8), length_at=0)


def checked(**more: int) -> Template:
    """Every field there is: kind, flags, six bytes, length, number, checksum, chain."""
    fields = {"length_at": 8, "sequence_at": 16, "checksum_at": 24, "chain_at": 32, "align": 64}
    fields |= {"kind_at": 0, "zeros_kind": ord("Z"), "flags_at": 1, "continued": 2}
    return Template(b"D\0magic!" + bytes(32), **fields | more)  # type: ignore[arg-type]


def framed(state: bytes, chunk_bytes: int) -> bytes:
    """What counted() makes of a state that is read in such chunks."""
    chunks = (state[at : at + chunk_bytes] for at in range(0, len(state), chunk_bytes))
    return b"".join(struct.pack("<Q", len(chunk)) + chunk for chunk in chunks)


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that are nowhere alike."""
    return random.Random(seed).randbytes(size)


def whole(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)


def pipe() -> tuple[OwnedFd, OwnedFd]:
    read_fd, write_fd = os.pipe()
    return OwnedFd(read_fd), OwnedFd(write_fd)


def drained(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def feed(fd: OwnedFd, content: bytes, sizes: list[int]) -> None:
    """Write content in pieces of these sizes, the rest in one, and close."""
    with fd:
        for size in [*sizes, len(content)]:
            while piece := content[:size]:
                put = os.write(fd.fileno(), piece)
                content, size = content[put:], size - put


def unread_bytes(fd: int) -> int:
    found = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, found)
    return int.from_bytes(found, "little")


def asleep(thread_id: int) -> bool:
    """Whether a thread waits in the kernel: proc(5), the state in /proc/self/task/TID/stat."""
    with open(f"/proc/self/task/{thread_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def thread_ids() -> set[int]:
    """All threads of this process, Python's or not."""
    return set(map(int, os.listdir("/proc/self/task")))


def only_threads(expected: set[int]) -> bool:
    """Whether no other thread is left. One that was joined may be listed for a moment longer."""
    ends = time.monotonic() + 3
    while thread_ids() - expected and time.monotonic() < ends:
        os.sched_yield()
    return not thread_ids() - expected


def written(template: Template, state: bytes, buffer_bytes: int = PAGE) -> bytes:
    """The stream of a state, with its running digest."""
    with OwnedFd(os.memfd_create("state")) as src, OwnedFd(os.memfd_create("stream")) as dst:
        os.pwrite(src.fileno(), state, 0)
        FrameWriter(dst.fileno(), buffer_bytes).copy(src.fileno(), template, EVERYTHING, Digest())
        return whole(dst)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes at place; the test is skipped where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def reading(stream: bytes, buffer_bytes: int = PAGE) -> Iterator[StreamReader]:
    """A reader of a stream that lies in memory."""
    with OwnedFd(os.memfd_create("stream")) as src:
        os.pwrite(src.fileno(), stream, 0)
        yield StreamReader(src.fileno(), buffer_bytes)


def copied(
    reader: StreamReader,
    template: Template,
    digest: Digest | None = None,
    *,
    limit: int = EVERYTHING,
    frames: int = 0,
    deadline_ns: int = 0,
) -> tuple[Outcome, bytes]:
    """How one StreamReader.copy() ends, and what it wrote."""
    with OwnedFd(os.memfd_create("device")) as dst:
        outcome = reader.copy(
            dst.fileno(), template, limit, digest, frames=frames, deadline_ns=deadline_ns
        )
        return outcome, whole(dst)
