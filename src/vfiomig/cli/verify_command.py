"""Check streams to their end: every header, checksum, order and total. Exit code 7 if one is bad.

examples:
  vfiomig verify *.vmig
"""

import argparse

from vfiomig.cli.output import Output, printable
from vfiomig.errors import MigrationError
from vfiomig.inspection import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("files", metavar="FILE", nargs="+")


def run(args: argparse.Namespace, out: Output) -> int:
    """Verify. Returns the code of the first file that is not sound."""
    worst = 0
    for name in args.files:
        try:
            found = inspect(name)
        except MigrationError as err:
            out.error(err)
            worst = worst or err.code
            continue
        text = f"{name}: {'sound' if found.sound else found.problem}"
        values = {"file": name, "sound": found.sound, "digest": found.digest}
        values |= {"problem": found.problem, "problem_offset": found.problem_offset}
        if found.sound:
            out.result(values, f"{printable(text)}, xxh3:{found.digest}")
        else:
            out.answer(values, printable(text))
        worst = worst or found.code
    return worst
