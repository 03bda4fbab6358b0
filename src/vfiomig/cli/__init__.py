"""The command: finds the sub-command, and turns what it raises into sentences and exit codes."""

import argparse
import importlib
import io
import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NoReturn

from vfiomig._version import __version__
from vfiomig.cli.output import STOPPING, Output, stopped_by
from vfiomig.errors import LocalIOError, MigrationError, UsageError

# A module for each, imported only when its command runs.
COMMANDS = {
    "list": "the devices of this host that could migrate, and why others cannot",
    "info": "what a device can do",
    "doctor": "what this host lacks for migration, and what to do about it",
    "save": "save the state of a device into a file or a pipe",
    "load": "load a state into a device",
    "send": "migrate devices, live, to a receiver",
    "receive": "take the devices of a sender, which then run here",
    "estimate": "how long a device would be stopped by a migration",
    "check": "whether the state of one device fits into another",
    "inspect": "what a stream holds, and how far it is sound",
    "verify": "whether streams are sound to their end",
    "diff": "whether two streams hold the same state",
    "state": "the state a device is in, or a change of it",
    "reset": "reset a device: RUNNING, and blank",
    "conform": "whether a driver keeps the rules of migration: for its authors",
    "resolve": "decide what becomes of devices after a migration without an end",
    "dirty": "which pages of memory a device writes, and how fast",
    "bench": "how fast a device is saved, beside tools that only copy",
    "hold": "open devices once, keep them open, and lend them to other commands",
}

_EPILOG = """\
devices:
  0000:3b:00.2, 3b:00.2, a UUID of an mdev, a path in sysfs, /dev/vfio/devices/vfio0, vfio0
  fd:N, pid:PID/fd:N, unix:PATH   borrowed from the process that runs it
  sim:, sim:FILE?size=1G          simulated, for trying things out

examples:
  vfiomig list --all
  vfiomig save 'sim:a.state?size=64M' a.vmig
  vfiomig load a.vmig 'sim:b.state?size=64M'
  vfiomig inspect a.vmig

exit codes:
  0 ok, 1 internal, 2 usage, 3 not migratable, 4 permission, 5 no such device or busy, 6 device
  error, 7 stream damaged, 8 stream of another device or a newer version, 9 peer, 10 local I/O,
  11 time-out or over the downtime limit, 12 differs or does not fit, 13 authentication, 14
  cancelled, 15 resource limit, 20 the device is not RUNNING any more: look at it, 21 outcome
  unknown: run resolve, 130, 143 signals
"""


_TYPED_ONLY = {"help", "insecure"}  # no file of settings may make what is sent readable
_JSON_WORD = re.compile(r"--json|--pretty|-[qv]*[jp][jpqv]*")
# argparse makes a formatter for each argument that is added. One without a width imports shutil,
# and all archive formats with it, to ask the terminal: only a help needs that.
_SOME_WIDTH = partial(argparse.RawDescriptionHelpFormatter, width=80)


class _Parser(argparse.ArgumentParser):
    """Raises UsageError, so that --json holds for usage errors too."""

    def format_help(self) -> str:
        """Return the help, as wide as the terminal."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


class _Stopped(BaseException):
    """The first SIGINT, SIGTERM or SIGHUP: cancels, and rolls back."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (sys.argv without it). Returns the exit code; never raises."""
    words = sys.argv[1:] if argv is None else argv
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name need not fit into the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    out = Output(json=_wants_json(words))
    if words[:1] and words[0] in ("save", "send", "receive") and "-" in words:
        out.results = sys.stderr  # standard output is the stream's
    _take_signals()
    try:
        return _outcome(words, out)
    except _Stopped as err:
        return _told(out, stopped_by(err.number, err))


def _outcome(words: list[str], out: Output) -> int:
    try:
        code = _run(words, out)
        sys.stdout.flush()
        return code
    except MigrationError as err:
        return _told(out, err)
    except SystemExit as err:  # argparse's, of --help
        return int(err.code or 0)
    except BrokenPipeError:
        _spare_the_last_flush()  # the reader of our words has gone: nobody is left to tell
        return 128 + signal.SIGPIPE
    except OSError as err:
        failed = LocalIOError(f"{err.filename or 'I/O'}: {err.strerror}", errno=err.errno)
        return _told(out, failed)


def _told(out: Output, err: MigrationError) -> int:
    """Say what failed, on stderr if standard output is what fails. Returns the exit code."""
    out.settle()
    try:
        out.error(err)
        sys.stdout.flush()
    except OSError:
        _spare_the_last_flush()
        with suppress(OSError):
            Output(json=False).error(err)
    return err.code


def _spare_the_last_flush() -> None:
    """Let Python's own flush at the end succeed: what could not be written has been told."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_standard_descriptors() -> None:
    """Take the numbers of standard streams that are closed: no file of ours must come to bear them.

    Reading the one and writing the other then fails, as it should (EBADF); errors go nowhere.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number, which is this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _wants_json(words: list[str]) -> bool:
    """Whether errors are to be JSON, before the options are parsed: that may be what fails."""
    asked = any(os.environ.get(name) == "1" for name in ("VFIOMIG_JSON", "VFIOMIG_PRETTY"))
    return asked or any(_JSON_WORD.fullmatch(word) for word in words)


def _take_signals() -> None:
    """Let the first signal end the work; later ones must tear neither its roll-back nor the end."""
    stopping: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if not stopping:
            stopping.append(number)
            raise _Stopped(number)

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, stop)


def _run(words: list[str], out: Output) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_top().format_help())
        return 0 if words else UsageError.code
    if words[0] == "--version":
        print(f"vfiomig {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = [name for name in COMMANDS if name.startswith(words[0][:2])]
        hint = f"perhaps {near[0]}?" if near else "vfiomig --help lists the commands"
        raise UsageError(f"no command {words[0]!r}", hint=hint)
    module = importlib.import_module(f"vfiomig.cli.{words[0]}_command")
    parser = _parser(words[0], module.__doc__ or "")
    module.add_arguments(parser)
    _common(parser)
    _from_environment(parser)
    args = parser.parse_args(words[1:])
    out.configure(json=args.json, pretty=args.pretty, quiet=args.quiet, verbose=args.verbose)
    out.command = words[0]
    code: int = module.run(args, out)
    return code


def _top() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return _Parser(
        prog="vfiomig",
        usage="vfiomig COMMAND …  |  vfiomig COMMAND --help  |  vfiomig --version",
        description="Save, load and live-migrate the state of VFIO devices, without a VMM.\n\n"
        "commands:\n" + "\n".join(lines),
        epilog=_EPILOG,
        formatter_class=_SOME_WIDTH,
        add_help=False,
    )


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    description, _, epilog = text.partition("\n\nexamples:")
    return _Parser(
        prog=f"vfiomig {command}",
        description=description,
        epilog=f"examples:{epilog}" if epilog else None,
        formatter_class=_SOME_WIDTH,
        allow_abbrev=False,
    )


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-j", "--json", action="store_true", help="JSON, errors included")
    group.add_argument("-p", "--pretty", action="store_true", help="JSON for people: indented")
    group.add_argument("-q", "--quiet", action="store_true", help="nothing but errors")
    group.add_argument("-v", "--verbose", action="store_true", help="every state change, progress")


def _from_environment(parser: argparse.ArgumentParser) -> None:
    """Take VFIOMIG_SOME_OPTION as the default of --some-option."""
    for action in parser._actions:
        text = os.environ.get(f"VFIOMIG_{action.dest.upper()}")
        if text is None or not action.option_strings or action.dest in _TYPED_ONLY:
            continue
        flag = action.nargs == 0
        if flag and text not in ("0", "1"):
            raise UsageError(f"VFIOMIG_{action.dest.upper()} is {text!r}, and must be 0 or 1")
        if action.choices is not None and text not in action.choices:
            # argparse does not look at the choices of a default.
            known = " or ".join(map(str, action.choices))
            raise UsageError(f"VFIOMIG_{action.dest.upper()} is {text!r}, and must be {known}")
        action.required = False
        parser.set_defaults(**{action.dest: text == "1" if flag else text})
