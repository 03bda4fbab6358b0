"""The command in a process of its own.

start() and run() begin it as a fork of this process, at the entry point that the installed command
has: an interpreter takes two seconds to start in the lab, a fork none. installed() is the command
itself, as a person starts it.
"""

import fcntl
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfiomig import cli

COMMAND = Path(sys.executable).with_name("vfiomig")
NOBODY = 65534
TIMEOUT_S = 30
# What the command imports only when it comes to it.
LATE_IMPORTS = ["encodings.ascii", "rich"]


@dataclass(frozen=True)
class Finished:
    """A command that ended. code: its exit status, or minus the signal that killed it."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """Its standard output."""
        return self.out.decode()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The documents of --json."""
        return [json.loads(line) for line in self.out.splitlines()]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one type."""
        return [record for record in self.records if record["type"] == kind]


@dataclass
class Running:
    """A process that was started here. Leaving it by with ends it, if it has not ended."""

    pid: int
    out_fd: int
    err_fd: int
    _seen: dict[int, bytearray] = field(default_factory=dict)
    _status: int | None = None

    def wait_for_talk(self, words: str) -> str:
        """Wait until it has said words on standard error; return all it said until then."""
        return self._wait(self.err_fd, words.encode())

    def wait_for_output(self, words: str) -> str:
        """Wait until it has said words on standard output; return all it said until then."""
        return self._wait(self.out_fd, words.encode())

    def finish(self) -> Finished:
        """Wait for its end."""
        for fd in (self.out_fd, self.err_fd):
            if fd != -1:
                self._wait(fd, None)
        self._reap(0)
        assert self._status is not None
        out, err = (bytes(self._seen.get(fd, b"")) for fd in (self.out_fd, self.err_fd))
        return Finished(os.waitstatus_to_exitcode(self._status), out, err.decode())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and wait until all it had open is closed."""
        os.kill(self.pid, signal.SIGKILL)
        self._reap(0)

    def _reap(self, flags: int) -> None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, flags)
            self._status = status if pid else None

    def _wait(self, fd: int, words: bytes | None) -> str:
        seen, ends = self._seen.setdefault(fd, bytearray()), time.monotonic() + TIMEOUT_S
        while words is None or words not in seen:
            ready, _, _ = select.select([fd], [], [], max(0, ends - time.monotonic()))
            assert ready, f"it said only {bytes(seen)!r}"
            piece = os.read(fd, 65536)
            if not piece:
                assert words is None, f"it ended, and had said {bytes(seen)!r}"
                break
            seen += piece
        return seen.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._reap(os.WNOHANG)
        if self._status is None:
            self.kill()
        for fd in (self.out_fd, self.err_fd):
            if fd != -1:
                os.close(fd)


def start(
    *words: str,
    uid: int = 0,
    stdin: int | None = None,
    stdout: int | None = None,
    before: Callable[[], None] | None = None,
    keep: Sequence[int] = (),
) -> Running:
    """Start the command. uid: whose rights it has. stdin, stdout: descriptors to take over.

    before: called in its process, last of all. keep: descriptors it has under their own numbers.
    """
    out_read, out_write = os.pipe() if stdout is None else (-1, stdout)
    err_read, err_write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    with warnings.catch_warnings():
        # Python 3.12 warns of forks of a process with threads; pytest's watchdog is one.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        streams = (null if stdin is None else stdin, out_write, err_write)
        _be_the_command(words, streams, keep, uid, before)
    for fd in {null, err_write} | ({out_write} if stdout is None else set()):
        os.close(fd)
    return Running(pid, out_read, err_read)


def run(*words: str, uid: int = 0, stdin: int | None = None, keep: Sequence[int] = ()) -> Finished:
    """Run the command to its end."""
    with start(*words, uid=uid, stdin=stdin, keep=keep) as running:
        return running.finish()


def installed(*words: str) -> Finished:
    """Run the installed command to its end."""
    done = subprocess.run(
        [COMMAND, *words], capture_output=True, check=False, timeout=TIMEOUT_S, cwd="/"
    )
    return Finished(done.returncode, done.stdout, done.stderr.decode())


def _be_the_command(
    words: Sequence[str],
    streams: Sequence[int],
    keep: Sequence[int],
    uid: int,
    before: Callable[[], None] | None,
) -> None:
    """Become the command; does not return."""
    code = 70  # EX_SOFTWARE of sysexits.h: none of the command's own
    try:
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        _close_all_but(keep)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        if uid:
            _become(uid)
        if before is not None:
            before()
        code = cli.main(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as err:  # noqa: BLE001  it must not go on in pytest
        os.write(2, f"{type(err).__name__}: {err}".encode())
    finally:
        os._exit(code)


def _become(uid: int) -> None:
    # The user may have no right to read the interpreter's library: import now what is needed then.
    for name in [f"vfiomig.cli.{command}_command" for command in cli.COMMANDS] + LATE_IMPORTS:
        importlib.import_module(name)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def _close_all_but(keep: Sequence[int]) -> None:
    for fd in keep:
        fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    last = 2
    for fd in sorted(keep):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 4096)
