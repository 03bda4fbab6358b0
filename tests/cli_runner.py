"""The command as a user runs it: in this process for speed, or as one of its own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfiomig import cli

VFIOMIG = str(Path(sys.executable).with_name("vfiomig"))


@dataclass(frozen=True)
class Run:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Every line of stdout as JSON, checked for what each must have."""
        return documents(self.out)

    @property
    def last(self) -> dict[str, Any]:
        """The last document."""
        return self.documents[-1]


TYPES = {"progress", "transition", "warning", "frame", "report", "result", "error"}
OF_A_SESSION = {"listening", "connected", "stopping"}


def documents(text: str) -> list[dict[str, Any]]:
    """Every line as JSON, checked for what each must have."""
    found = [json.loads(line) for line in text.splitlines()]
    for document in found:
        assert document["schema"] == 1
        assert document["type"] in TYPES | OF_A_SESSION
        assert isinstance(document["command"], str)
    return found


def run(*words: object) -> Run:
    """Run the command in this process: without a terminal, and without descriptors 0 to 2."""
    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in taken}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in words])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "Traceback" not in err.getvalue()
    return Run(code, out.getvalue(), err.getvalue())


def run_process(*words: object, stdin: bytes = b"", **environment: str) -> tuple[int, bytes, bytes]:
    """Run the command as a process. Returns exit code, stdout, stderr."""
    done = subprocess.run(
        [VFIOMIG, *map(str, words)],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def start(
    *words: object,
    prefix: Sequence[str] = (),
    **arguments: Any,  # noqa: ANN401  Popen's
) -> "subprocess.Popen[bytes]":
    """Start the command as a process; arguments are Popen's. Use it with with.

    prefix: a command that becomes this one, with its words.
    """
    return subprocess.Popen([*prefix, VFIOMIG, *map(str, words)], **arguments)


def wait_for(
    process: "subprocess.Popen[bytes]",
    wanted: Callable[[dict[str, Any]], bool],
    *,
    stderr: bool = False,
) -> dict[str, Any]:
    """Read the NDJSON of a process until a document is the wanted one; return that."""
    stream = process.stderr if stderr else process.stdout
    assert stream is not None
    for line in stream:
        document: dict[str, Any] = json.loads(line)
        if wanted(document):
            return document
    raise AssertionError("it never came")


def entered(state: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a document says that the device has entered state."""
    return lambda document: document["type"] == "transition" and document["actual"] == state


def state_of(device: object) -> str:
    """Return the state that `vfiomig state` prints."""
    found = run("state", device)
    assert (found.code, found.err) == (0, "")
    return found.out.strip()
