"""The workers: for each device that is measured at once a sender and a receiver."""

import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from vfiomig.bench.post import Post
from vfiomig.errors import DeviceLostError, MigrationError

_BLOCKED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class Worker:
    """A process that answers requests. It has a session of its own: Ctrl-C is for us alone."""

    def __init__(self, role: str, inherited_fds: tuple[int, ...] = ()) -> None:
        """Start it. inherited_fds: descriptors that it gets by the same numbers."""
        self._role = role
        self._post, far = Post.pair()
        # It takes its signals once it is ready for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self._process = self._start(far, inherited_fds)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, far: socket.socket, fds: tuple[int, ...]) -> "subprocess.Popen[bytes]":
        with far:
            # -P: what lies in the current directory must not be imported.
            words = [sys.executable, "-P", "-m", f"vfiomig.bench.{self._role}", str(far.fileno())]
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(far.fileno(), *fds),
                start_new_session=True,
            )

    def request(self, message: object, *fds: int) -> None:
        """Ask for something. A worker that has died is noticed by answer()."""
        with suppress(BrokenPipeError):
            self._post.send(message, *fds)

    def answer(self) -> Any:  # noqa: ANN401  each request has an answer of its own
        """Wait for the answer. Raises MigrationError: the worker's, or that it died."""
        found = self.answer_or_error()
        if isinstance(found, MigrationError):
            raise found
        return found

    def answer_or_error(self) -> Any:  # noqa: ANN401
        """Wait for the answer, an error among them."""
        try:
            found, _ = self._post.receive()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            return MigrationError(f"the {self._role} process died (exit code {code})")
        return found

    def stop(self) -> MigrationError | None:
        """Let it roll back what it is doing, and end. Returns what it said of that, if anything."""
        self._process.terminate()
        said = None
        while True:
            try:
                found, _ = self._post.receive()
            except (EOFError, ConnectionResetError):
                break
            if isinstance(found, MigrationError):
                said = found
        self._process.wait()
        self._post.close()
        return said


class Crew:
    """Senders and receivers, one of each for each device. Leave it by with: nobody stays."""

    def __init__(self, pairs: int, device_fd: int | None) -> None:
        """Start them. device_fd: a descriptor that a device's name borrows, None if none."""
        self.senders: list[Worker] = []
        self.receivers: list[Worker] = []
        fds = () if device_fd is None else (device_fd,)
        try:
            for _ in range(pairs):
                self.senders.append(Worker("sender", fds))
                self.receivers.append(Worker("receiver", fds))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> MigrationError | None:
        """End all of them, devices RUNNING. Returns the gravest of what they said, if anything."""
        said = [worker.stop() for worker in (*self.senders, *self.receivers)]
        errors = [error for error in said if error is not None]
        lost = [error for error in errors if isinstance(error, DeviceLostError)]
        return next(iter(lost or errors), None)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, err: BaseException | None, trace: object) -> None:
        said = self.stop()
        if isinstance(said, DeviceLostError):
            raise said from err
        if err is not None and said is not None and err.__cause__ is None:
            err.__cause__ = said  # says what became of the device
