#!/usr/bin/env python3
"""Abuse the test device of driver/, in the lab (tests/vm): make test-driver.

Each round does at random, as its seed says, what no program should do, and then checks that the
device is fit, and that the kernel has reported no bug. It ends at the first failure, and says how
to repeat the round.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Run as a script, this file finds its neighbours as the tests do: from the folder "tests".
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from abuse import removal, scenarios, starving
from abuse.fitness import KernelLog, check_leaks
from kernel import migtest
from vfiomig import MigrationError

ROUNDS = 60
_LEAKS_EVERY = 100

SCENARIOS: dict[Callable[[random.Random], None], int] = {
    scenarios.storm: 20,
    scenarios.crowd: 15,
    scenarios.heirs: 10,
    scenarios.killed: 20,
    scenarios.rubbish: 8,
    removal.removed: 10,
    removal.outlived: 4,
    removal.unloaded: 5,
    removal.churn: 4,
}
STARVING: dict[Callable[[random.Random], None], int] = {
    starving.starved: 15,
    starving.stillborn: 4,
}


def main() -> int:
    """Return 0 when every round was survived."""
    options = _parser().parse_args()
    if not migtest.is_there():
        sys.stderr.write("abuse: the module vfiomig_test is not loaded: see tests/vm/README.md\n")
        return 2
    known = SCENARIOS | (STARVING if starving.is_possible() else {})
    log = KernelLog()
    _say(f"abuse: seed {options.seed}, {options.rounds} rounds\n")
    for number in range(options.first, options.first + options.rounds):
        if not _round(options, known, number, log):
            _say(f"abuse: to repeat it: --seed {options.seed} --first {number} --rounds 1\n")
            return 1
    return 0


def _round(
    options: argparse.Namespace,
    known: dict[Callable[[random.Random], None], int],
    number: int,
    log: KernelLog,
) -> bool:
    chance = random.Random(f"{options.seed}/{number}")
    # Every scenario has its turn, before chance has its way.
    names = list(known)
    scenario = names[number] if number < len(names) else None
    scenario = scenario or chance.choices(names, list(known.values()))[0]
    if options.only:
        (scenario,) = (each for each in names if each.__name__ == options.only)
    began = time.monotonic()
    _say(f"abuse: round {number}: {scenario.__name__}")
    last = number == options.first + options.rounds - 1
    try:
        scenario(chance)
        log.check()
        if last or number % _LEAKS_EVERY == _LEAKS_EVERY - 1:
            check_leaks()
    except (AssertionError, MigrationError, OSError) as err:
        _say(f": {type(err).__name__}: {err}\n")
        if options.trace:
            raise
        return False
    _say(f": {time.monotonic() - began:.1f} s\n")
    return True


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    add("--rounds", type=int, default=ROUNDS)
    add("--first", type=int, default=0, metavar="ROUND", help="begin with this round")
    add("--only", metavar="NAME", help="only this kind of round: storm, killed, starved, …")
    add("--trace", action="store_true", help="end with the traceback of what failed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
