"""The receiver of a session, started on another host through ssh: `vfiomig send --via`."""

import errno
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from vfiomig.cli.output import Output, printable
from vfiomig.errors import CancelledError, MigrationError, PeerError, UsageError
from vfiomig.threads import start_thread
from vfiomig.worker import Cancellation

# After the session: how long it may take to reset its devices and to end, and to end when told to.
_PATIENCE_S, _TERMINATION_S = 10, 2
_LINE_BYTES = 64 << 10
# Ctrl-C is for every process of the terminal; ssh would die of it, and the hand-over with it.
_TERMINAL_SIGNALS = {signal.SIGINT, signal.SIGHUP}
# Exit codes of that end which say nothing but that this end has gone, or that a person ended it.
_CONSEQUENCES = {0, PeerError.code, CancelledError.code, 129, 130, 143}
_SSH_FAILED, _NOT_EXECUTABLE, _NOT_FOUND = 255, 126, 127


@contextmanager
def receiver(host: str, words: Sequence[str], out: Output) -> Iterator[str]:
    """Start `vfiomig receive` with words on a host. Yields the URL to send to, and ends it.

    VFIOMIG_SSH is the command to use instead of ssh, with its options. What the receiver says is
    said here, behind the name of the host. A session that failed because of that end raises a
    PeerError with its words and its exit code. Raises PeerError when there is no ssh.
    """
    near, far = socket.socketpair()
    with near, far:
        process = _start(host, words, far)
        far.close()
        with process, _FarEnd(process, host, out) as end:
            url = f"fd:{near.fileno()}"
            try:
                yield url
            except BaseException as err:
                near.close()
                end.wait()
                if isinstance(err, MigrationError):  # people know it by another name
                    err.args = (str(err).replace(url, host, 1),)
                if isinstance(err, PeerError) and (cause := end.blame(err)) is not None:
                    raise cause from err
                raise
            near.close()
            if code := end.wait():
                why = end.failure.get("message", f"exit code {code}")
                out.note(f"{host}: the receiver runs the devices, and failed then: {why}")


def _start(host: str, words: Sequence[str], far: socket.socket) -> "subprocess.Popen[bytes]":
    ssh = _ssh()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_SIGNALS)  # inherited
    try:
        return subprocess.Popen(
            [*ssh, host, shlex.join(["vfiomig", "receive", *words])],
            stdin=far.fileno(),
            stdout=far.fileno(),
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as err:
        raise PeerError(
            f"cannot run {ssh[0]}: {err.strerror}",
            errno=err.errno,
            hint="--via needs ssh; VFIOMIG_SSH names another command, with its options",
        ) from err
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ssh() -> list[str]:
    given = os.environ.get("VFIOMIG_SSH") or "ssh"
    try:
        return shlex.split(given)
    except ValueError as err:
        raise UsageError(f"VFIOMIG_SSH is {given!r}: {err}") from err


class _FarEnd:
    """What the receiver says on its standard error. failure: its last error record, or {}."""

    def __init__(self, process: "subprocess.Popen[bytes]", host: str, out: Output) -> None:
        assert process.stderr is not None
        self._process, self._host, self._out = process, host, out
        self._fd = process.stderr.fileno()
        self._end, self._was_ended = Cancellation(), False
        self.failure: Mapping[str, Any] = {}
        os.set_blocking(self._fd, False)
        self._thread = start_thread(self._listen, "vfiomig ssh")

    def __enter__(self) -> "_FarEnd":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._end.close()

    def wait(self) -> int:
        """Wait until it has ended; end it when that takes too long. Returns its exit code."""
        steps = ((_PATIENCE_S, self._process.terminate), (_TERMINATION_S, self._process.kill))
        for seconds, end in steps:
            try:
                self._process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                self._was_ended = True
                end()
        self._process.wait()
        self._end.cancel()
        self._thread.join()
        return self._process.returncode

    def blame(self, err: PeerError) -> PeerError | None:
        """Return the error of that end which explains err, None where none does. After wait()."""
        code = self._process.returncode
        if self.failure and self.failure.get("code") not in _CONSEQUENCES:
            return self._told(err)
        if self.failure or self._was_ended or not code:
            return None
        text, hint = f"ssh ended with exit code {code}", f"ssh {self._host} has to work"
        if code in (_NOT_FOUND, _NOT_EXECUTABLE):
            text, hint = "vfiomig cannot be run there", f"try: ssh {self._host} vfiomig --version"
        elif code < 0:
            text = f"ssh was ended by {signal.Signals(-code).name}"
        return _like(err, PeerError(f"{self._host}: {text}", hint=hint))

    def _told(self, err: PeerError) -> PeerError:
        failure = self.failure
        hint = f"at {self._host}: {failure['hint']}" if failure.get("hint") else ""
        told = _like(err, PeerError(f"{self._host}: {failure.get('message')}", hint=hint))
        told.destination_state = told.destination_state or str(failure.get("dest_state") or "")
        code, number = failure.get("code"), failure.get("errno")
        told.code = code if isinstance(code, int) and 0 < code < 256 else PeerError.code
        told.errno = number if isinstance(number, int) else None
        return told

    def _listen(self) -> None:
        """Hear until nobody is left who could speak, or the process has ended.

        An ssh that others share (ControlPersist) keeps standard error open for ever.
        """
        waiter = select.poll()
        waiter.register(self._fd, select.POLLIN)
        waiter.register(self._end.fileno(), select.POLLIN)
        left = b""
        while True:
            waiter.poll()
            try:
                piece = os.read(self._fd, _LINE_BYTES)
            except BlockingIOError:
                if self._end.cancelled:
                    piece = b""
                else:
                    continue
            *lines, left = (left + piece).split(b"\n")
            if not piece or len(left) > _LINE_BYTES:
                lines, left = [*lines, left], b""
            for line in filter(None, lines):
                self._hear(line)
            if not piece:
                return

    def _hear(self, line: bytes) -> None:
        record = _record(line)
        if record is None:  # ssh's own, or a shell's
            with suppress(OSError):
                print(printable(line.decode(errors="backslashreplace")), file=sys.stderr)
        elif record["type"] == "error":
            self.failure = record
        elif record["type"] == "warning":
            self._out.note(f"{self._host}: {record.get('text')}")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "schema" in found and "type" in found else None


def _like(err: MigrationError, told: PeerError) -> PeerError:
    """Return told with what err says of both ends."""
    told.device, told.phase, told.aftermath = err.device, err.phase, err.aftermath
    told.actual, told.errno = err.actual, err.errno if err.errno != errno.ECONNRESET else None
    told.source_state, told.destination_state = err.source_state, err.destination_state
    return told
