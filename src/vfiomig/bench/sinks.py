"""Where a stream goes in a benchmark, and where it comes out again."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vfiomig.fd import OwnedFd


@dataclass(slots=True)
class Ends:
    """Both ends of one transfer. path: "" unless the sink is a file. Close it, or use with.

    source: where the bytes are read, -1 when they go nowhere. A file's is open from the beginning.
    """

    sink: OwnedFd
    source: OwnedFd
    path: str = ""

    def close(self) -> None:
        """Close what is open here: each process has copies of its own."""
        self.sink.close()
        self.source.close()


def open_ends(sink: str, directory: Path, number: int) -> Ends:
    """Open a sink for the device with this number. Raises OSError.

    A file keeps its name from run to run, and is written over: its pages are there already. A
    durable one is new each time, as every file is that vfiomig saves.
    """
    match sink:
        case "null":
            return Ends(OwnedFd(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)), OwnedFd(-1))
        case "file" | "durable":
            return _file(directory / f"{sink}-{number}", fresh=sink == "durable")
        case "pipe":
            source_fd, sink_fd = os.pipe()
        case "unix":
            near, far = socket.socketpair()
            source_fd, sink_fd = far.detach(), near.detach()
        case _:
            source_fd, sink_fd = _loopback()
    return Ends(OwnedFd(sink_fd), OwnedFd(source_fd))


def _file(path: Path, *, fresh: bool) -> Ends:
    if fresh:
        with suppress(FileNotFoundError):
            path.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    sink = OwnedFd(os.open(path, flags, 0o600))
    return Ends(sink, OwnedFd(-1), str(path))


def _loopback() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return far.detach(), near.detach()
