"""The receiving process: checks what arrives, and throws it away or loads it."""

import os
from contextlib import ExitStack, closing

from vfiomig._fastcopy import Digest
from vfiomig.backends import open_device
from vfiomig.bench.check import WrongBytesError
from vfiomig.bench.measure import Meter
from vfiomig.bench.messages import Open, Opened, Ready, Receive, Received
from vfiomig.bench.post import Post
from vfiomig.bench.scratch import ScratchOps, scratch_device
from vfiomig.bench.tool import run_tool
from vfiomig.bench.worker import run_worker
from vfiomig.device import Device
from vfiomig.fd import OwnedFd
from vfiomig.inspection import inspect
from vfiomig.load import load
from vfiomig.worker import Cancellation, run_shielded

MEMORY = "memory"
_READ_BYTES = 1 << 20


class Receiver:
    """Answers Open, which says where to, and Receive. Owns its destination; stack closes it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._device: Device | None = None
        self._memory: ScratchOps | None = None
        self._scratch = stack.enter_context(closing(ScratchOps()))
        self._buffer = memoryview(bytearray(_READ_BYTES))

    def handle(self, request: Open | Receive, fds: list[OwnedFd], post: Post) -> object:
        """Do what is asked, with the source's descriptor. Raises MigrationError, OSError."""
        if isinstance(request, Open):
            return self._open(request.name)
        # A sender must see that nobody reads any more when this fails: closed at once.
        with fds.pop() as source:
            post.send(Ready())
            if request.words:
                return self._run_tool(request, source.fileno())
            if request.raw:
                return self._count(source.fileno(), hashing=request.hashing)
            return self._receive(source.fileno())

    def _open(self, name: str) -> Opened:
        if name == MEMORY:
            self._memory = ScratchOps()
            self._device = self._stack.enter_context(scratch_device(self._memory))
        else:
            self._device = self._stack.enter_context(open_device(name))
        return Opened(self._device.name, 0, "")

    def _receive(self, source_fd: int) -> Received:
        meter = Meter()
        if self._device is not None:
            report = load(source_fd, self._device)
            return Received(meter.read(), report.device_bytes, report.digest)
        found = inspect(source_fd)
        if not found.sound:
            raise WrongBytesError(f"the stream that arrived is damaged: {found.problem}")
        return Received(meter.read(), found.device_bytes, found.digest)

    def _count(self, source_fd: int, *, hashing: bool) -> Received:
        digest, total, meter = Digest(), 0, Meter()
        memory_fd = self._memory.memory_fd() if self._memory else -1
        while got := os.readv(source_fd, [self._buffer]):
            piece = self._buffer[:got]
            if hashing:
                digest.update(piece)
            if memory_fd != -1:
                _write_all(memory_fd, piece)
            total += got
        return Received(meter.read(), total, f"{digest.value:016x}" if hashing else "")

    def _run_tool(self, request: Receive, source_fd: int) -> Received:
        """Let a C program receive; into memory if it is to be hashed, or to be kept."""
        place = self._memory or self._scratch
        out_fd = place.memory_fd() if request.hashing or self._memory else -1
        with closing(Cancellation()) as cancellation:

            def run() -> Received:
                words, cancel_fd = request.words, cancellation.fileno()
                done = run_tool(words, source_fd, out_fd, cancel_fd, figures=True)
                return Received(done.usage, done.device_bytes or 0)

            received = run_shielded(run, cancellation)
        if not request.hashing:
            return received
        written = os.lseek(out_fd, 0, os.SEEK_CUR)
        return Received(received.usage, written, self._digest_of(place.memory_fd(), written))

    def _digest_of(self, fd: int, length: int) -> str:
        digest, left = Digest(), length
        while left and (got := os.readv(fd, [self._buffer[:left]])):
            digest.update(self._buffer[:got])
            left -= got
        return f"{digest.value:016x}"


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def main() -> None:
    """Serve until the bench ends the connection."""
    with ExitStack() as stack:
        run_worker(Receiver(stack).handle)


if __name__ == "__main__":
    main()
