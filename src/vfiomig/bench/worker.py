"""A process that serves the bench: one request after the other, until the connection ends."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from vfiomig.bench.post import Post
from vfiomig.errors import LocalIOError, MigrationError
from vfiomig.fd import OwnedFd

Handle = Callable[[Any, list[OwnedFd], Post], object]


class _Stopped(BaseException):
    """SIGTERM: the bench gives up. Work under way is rolled back."""


def run_worker(handle: Handle) -> None:
    """Serve requests from the socket whose descriptor is the last word of the command line.

    handle answers a request; descriptors that came with it are closed here. An error that it
    raises is an answer as well. SIGTERM interrupts it; what became of a device is told.
    """
    _keep_descriptors()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    post = Post(socket.socket(fileno=int(sys.argv[-1])))
    try:
        # The bench blocked them until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        while True:
            _serve(post, handle)
    except EOFError:
        return
    except _Stopped as err:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(err.__cause__, MigrationError):
            with suppress(OSError):  # the bench has gone too
                post.send(err.__cause__)


def _keep_descriptors() -> None:
    """Let no tool inherit what this process did: a device, and the connection to the bench."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):  # the listing's own is closed
                os.set_inheritable(int(name), False)  # noqa: FBT003


def _serve(post: Post, handle: Handle) -> None:
    request, fds = post.receive()
    try:
        answer = handle(request, fds, post)
    except MigrationError as err:
        answer = err
    except OSError as err:
        answer = LocalIOError(f"{err.filename or 'I/O'}: {err.strerror}", errno=err.errno)
    finally:
        for fd in fds:
            fd.close()
    post.send(answer)


def _stop(_: int, __: FrameType | None) -> None:
    raise _Stopped
