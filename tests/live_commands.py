"""`vfiomig send` and `vfiomig receive` as users run them; the receiver is a process of its own."""

import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli_runner import Run, documents, run, start, state_of, wait_for

# 1 MiB in no time; the contents by their seed.
HERE, THERE = "sim:here?size=1M&seed=1", "sim:there?size=1M&seed=2"
SEND_JOURNAL, RECEIVE_JOURNAL = ("--journal", "journal-here"), ("--journal", "journal-there")
SHORT = ("--silence", "2s")

Wanted = Callable[[dict[str, Any]], bool]


def of_type(*kinds: str) -> Wanted:
    """Whether a document is of a type."""
    return lambda document: document["type"] in kinds


def in_state(state: str, before: str | None = None) -> Wanted:
    """Whether a document says that a device has entered state, from the state before."""
    return lambda document: (
        document["type"] == "transition"
        and (document["actual"], document["errno"]) == (state, None)
        and before in (None, document["before"])
    )


@dataclass
class Command:
    """A command that runs, with --json."""

    process: "subprocess.Popen[bytes]"
    on_stderr: bool
    peak_rss_bytes: int = 0  # once it has ended

    def wait_for(self, wanted: Wanted) -> dict[str, Any]:
        """Read what it says until that is the wanted document."""
        return wait_for(self.process, wanted, stderr=self.on_stderr)

    def ending(self) -> Run:
        """Wait until it ends. Returns its exit code, and what it said that was not read yet."""
        stream = self.process.stderr if self.on_stderr else self.process.stdout
        assert stream is not None
        told = stream.read().decode()
        documents(told)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.peak_rss_bytes = usage.ru_maxrss << 10
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return Run(self.process.returncode, told, "")


@contextmanager
def started(*words: object, on_stderr: bool = False, **arguments: Any) -> Iterator[Command]:  # noqa: ANN401
    """Start a command with --json; kill it when the test fails. arguments: Popen's."""
    pipe: dict[str, Any] = {"stderr" if on_stderr else "stdout": subprocess.PIPE}
    with start(*words, "--json", **pipe, **arguments) as process:
        try:
            yield Command(process, on_stderr)
        finally:
            process.kill()


@contextmanager
def receiving(
    *words: object,
    url: str = "unix:there.sock",
    **arguments: Any,  # noqa: ANN401
) -> Iterator[tuple[Command, str]]:
    """Start a receiver, by default of THERE. Yields it once it listens, and where it does."""
    words = (*RECEIVE_JOURNAL, *SHORT, *(words or (THERE,)), url)
    with started("receive", *words, **arguments) as command:
        yield command, str(command.wait_for(of_type("listening"))["address"])


def send(*words: object) -> Run:
    """Run `vfiomig send` with --json in this process."""
    return run("send", "--json", *SEND_JOURNAL, *SHORT, *words)


@contextmanager
def sending(*words: object, **arguments: Any) -> Iterator[Command]:  # noqa: ANN401
    """Start a sender."""
    with started("send", *SEND_JOURNAL, *SHORT, *words, **arguments) as command:
        yield command


def resolve(session: str, side: str, *words: object) -> Run:
    """Run `vfiomig resolve` with --json for the journal of one side, "here" or "there"."""
    return run("resolve", session, "--journal", f"journal-{side}", "--json", *words)


def check_error(found: Run, code: int, text: str, *, hint: str = "") -> None:
    """It is one document, the last: what happened, where, what both are in, what to do."""
    last = found.last
    assert (found.code, last["type"], last["code"]) == (code, "error", code), last
    assert re.search(text, last["message"]), last
    assert hint in last["hint"], last
    fields = {"errno", "phase", "source_state", "dest_state", "hint", "fields", "session", "device"}
    assert fields <= set(last)
    assert last["recoverable"] is (code not in (20, 21))


def check_moved(*, here: str = "here", there: str = "there") -> None:
    """The state runs there, and here it does not."""
    assert Path(here).read_bytes() == Path(there).read_bytes()
    assert (state_of(f"sim:{here}"), state_of(f"sim:{there}")) == ("STOP", "RUNNING")


def check_stayed(*, here: str = "here", there: str = "there") -> None:
    """The state runs here; the device there runs with something else."""
    assert Path(here).read_bytes() != Path(there).read_bytes()
    assert any(Path(here).read_bytes())
    assert (state_of(f"sim:{here}"), state_of(f"sim:{there}")) == ("RUNNING", "RUNNING")


class Proxy:
    """Between the two ends at a UNIX socket, until a text comes by: that is kept from the peer.

    held: set when it has come. cut() ends both connections; else they stay as they are.
    """

    def __init__(self, text: bytes, listen: str, connect: str) -> None:
        self._text, self._connect = text, connect
        self.held = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listen)
        self._listener.listen()
        self._near: socket.socket | None = None
        self._far = socket.socket(socket.AF_UNIX)
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        self._near, _ = self._listener.accept()
        self._far.connect(self._connect)
        for pair in ((self._near, self._far), (self._far, self._near)):
            self._threads.append(threading.Thread(target=self._pass_on, args=pair, daemon=True))
            self._threads[-1].start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if self._text in data:
                    self.held.set()
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End both connections."""
        for sock in (self._near, self._far):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut, wait for the threads, and close everything."""
        self.cut()
        self._threads[0].join(30)
        for thread in self._threads[1:]:
            thread.join(30)
        for sock in (self._near, self._far, self._listener):
            if sock is not None:
                sock.close()


@contextmanager
def proxy(text: bytes, *, listen: str, connect: str) -> Iterator[Proxy]:
    """Stand between a sender and the receiver until text comes by."""
    between = Proxy(text, listen, connect)
    try:
        yield between
    finally:
        between.close()
