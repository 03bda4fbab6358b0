"""What the command prints: for people or as JSON, results on stdout, all talk on stderr."""

import json
import signal
import sys
from collections.abc import Iterable, Mapping
from errno import errorcode
from typing import Any, TextIO

from vfiomig.errors import MigrationError

# Fields are only ever added within one number.
SCHEMA = 1
# The first of them ends the work.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Output:
    """Where a command puts its words."""

    def __init__(self, *, json: bool) -> None:
        self.json, self.pretty, self.quiet, self.verbose = json, False, False, False
        self.command = ""
        # The stream itself may be what goes to stdout: then the words go to stderr.
        self.results: TextIO = sys.stdout

    def configure(self, *, json: bool, pretty: bool, quiet: bool, verbose: bool) -> None:
        """Take over the options, once they are parsed."""
        self.json, self.pretty, self.quiet, self.verbose = json or pretty, pretty, quiet, verbose

    def settle(self) -> None:
        """Take in that the work is done: a signal could only make the exit code untrue."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def record(self, kind: str, values: Mapping[str, Any], stream: TextIO | None = None) -> None:
        """Print one JSON document: a line of its own, or indented when pretty."""
        plain = {"schema": SCHEMA, "type": kind, "command": self.command, **values}
        text = json.dumps(plain, indent=2 if self.pretty else None, default=str)
        # In one piece: the thread that works and a signal handler may both have something to say.
        (stream or self.results).write(text + "\n")
        (stream or self.results).flush()

    def result(self, values: Mapping[str, Any], text: str) -> None:
        """Print the result: JSON with --json, else text, unless quiet."""
        if self.json:
            self.record("result", values)
        elif not self.quiet:
            print(_lines(text), file=self.results)

    def answer(self, values: Mapping[str, Any], text: str) -> None:
        """Print what was asked for: as result(), also when quiet."""
        if self.json:
            self.record("result", values)
        else:
            print(_lines(text), file=self.results)

    def note(self, text: str) -> None:
        """Say something on stderr, unless quiet. With --json: a warning record."""
        if self.json:
            self.record("warning", {"text": text})
        elif not self.quiet:
            print(_lines(f"vfiomig: {text}"), file=sys.stderr)

    def error(self, err: MigrationError) -> None:
        """Say what failed, what became of the device, and what to do."""
        if self.json:
            return self.record("error", error_values(err))
        lines = [f"vfiomig: {printable(str(err))}"]
        if err.aftermath:
            lines.append(f"  now: {printable(err.aftermath)}")
        if err.hint:
            lines.append(f"  hint: {printable(err.hint)}")
        print("\n".join(lines), file=sys.stderr)


def stopped_by(number: int, err: BaseException) -> MigrationError:
    """Return the error for work that a signal ended, with what became of the device."""
    cause = err.__cause__ or err.__context__
    if isinstance(cause, MigrationError) and cause.code in (20, 21):
        return cause  # the device did not come back, or nobody knows: that matters more
    stopped = MigrationError(f"stopped by {signal.Signals(number).name}")
    stopped.code = 128 + number
    if isinstance(cause, MigrationError):
        stopped.aftermath, stopped.actual = cause.aftermath, cause.actual
        stopped.device, stopped.phase = cause.device, cause.phase
        stopped.source_state = cause.source_state
        stopped.destination_state = cause.destination_state
    return stopped


def error_values(err: MigrationError) -> dict[str, Any]:
    """Return an error as plain values for JSON."""
    return {
        "error": type(err).__name__,
        "message": str(err),
        "code": err.code,
        "errno": err.errno,
        "errno_name": errorcode.get(err.errno) if err.errno else None,
        "device": err.device,
        "phase": err.phase,
        "wanted_state": err.wanted.name if err.wanted is not None else None,
        "actual_state": err.actual.name if err.actual is not None else None,
        "offset": getattr(err, "offset", None),
        "aftermath": err.aftermath,
        "source_state": err.source_state,
        "dest_state": err.destination_state,
        "session": getattr(err, "session", None),
        "fields": [list(field) for field in getattr(err, "fields", ())],
        "recoverable": err.code not in (20, 21),
        "hint": err.hint,
    }


def printable(text: str) -> str:
    """Return text with control characters escaped: a stream must not drive the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def table(rows: Iterable[tuple[str, ...]], indent: str = "") -> str:
    """Return rows in columns, the last one ragged."""
    cells = [tuple(printable(cell) for cell in row) for row in rows]
    if not cells:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(indent + line.rstrip() for line in lines)
