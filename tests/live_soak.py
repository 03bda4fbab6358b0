"""Rounds of live_kills.py, chosen at random: tests/test_live_kill.py plays a few, tools/soak many.

What is done in a round depends on the seed and its number alone; when it happens, on the machine.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from live_kills import KILLED, Attempt, Host, Operator, Shape, Violation
from live_victims import SUCCESS, Blow
from vfiomig import MigrationError
from vfiomig.live.journal import sessions
from vfiomig.live.verdict import Role

SMALL = Shape(1, 64 << 10, 0, has_pre_copy=True)
# These take long enough to be struck in the middle of the copy: before the stop, or after it.
WIDE = Shape(1, 4 << 20, 100_000_000, has_pre_copy=True)
SHAPES = [
    SMALL,
    SMALL._replace(has_pre_copy=False),
    SMALL._replace(devices=2),
    WIDE,
    WIDE._replace(has_pre_copy=False),
]
# One round in so many stops an end for a while, instead of killing it; migrates once more.
STOP_EACH, AGAIN_EACH = 20, 10
# A roll-back takes a few milliseconds: the other end is to be killed in the midst of it.
LONGEST_SECOND_NS = 6_000_000


class Outcome(NamedTuple):
    """What a round came to. struck: who was, a clause. codes: of the source, the destination.

    is_again: it was migrated once more.
    """

    struck: str
    codes: tuple[int, int]
    runs_at: Role
    is_again: bool

    @property
    def is_kill(self) -> bool:
        return KILLED in self.codes


class Undisturbed(NamedTuple):
    """What a session is like when nobody strikes: how long, and the points its ends pass."""

    duration_ns: int
    points: dict[Role, list[str]]


class Rounds:
    """Rounds of one seed, in a directory. cheat: done first in the children that are struck."""

    def __init__(self, place: Path, seed: int, cheat: Callable[[], None] | None = None) -> None:
        self._place, self._seed, self._cheat = place, seed, cheat
        self._undisturbed: dict[Shape, Undisturbed] = {}

    def play(self, number: int) -> Outcome:
        """Play a round, all of it chosen at random. Raises Violation, with all there is to say."""
        chance = random.Random(f"{self._seed}/{number}")
        is_stop = number % STOP_EACH == STOP_EACH - 1
        shape = chance.choice(SHAPES)
        blow = self._blow(chance, shape, signal.SIGSTOP if is_stop else signal.SIGKILL)
        return self.strike(
            str(number),
            shape,
            blow,
            is_hasty=chance.random() < 0.25,
            is_again=number % AGAIN_EACH == 0,
        )

    def strike(
        self,
        name: str,
        shape: Shape,
        blow: Blow,
        *,
        is_hasty: bool = False,
        is_again: bool = False,
    ) -> Outcome:
        """Play one round. is_hasty: the source is resolved first, and then once more."""
        attempt = self._attempt(name, shape, blow)
        operator = Operator(attempt)
        try:
            attempt.run()
            attempt.check_codes()
            if is_hasty:
                operator.hasten()
            operator.resolve()
            runs_at = attempt.runs_at()
            if is_again:
                _migrate_again(attempt, runs_at)
        except (Violation, MigrationError) as err:
            raise Violation(self._account(name, attempt, operator, err)) from err
        shutil.rmtree(self._place / name)
        codes = attempt.codes[Role.SOURCE], attempt.codes[Role.DESTINATION]
        return Outcome(_struck(attempt), codes, runs_at, is_again)

    def _attempt(self, name: str, shape: Shape, blow: Blow | None) -> Attempt:
        place = self._place / name
        place.mkdir()
        source, destination = Host(place, "source", shape, 1), Host(place, "destination", shape, 7)
        return Attempt(source, destination, shape, blow, self._cheat)

    def _measured(self, shape: Shape) -> Undisturbed:
        if shape not in self._undisturbed:
            name = f"undisturbed{len(self._undisturbed)}"
            first, second = (self._attempt(f"{name}-{again}", shape, None) for again in "ab")
            for attempt in (first, second):
                attempt.run()
                if set(attempt.codes.values()) != {SUCCESS}:
                    raise Violation(f"nobody struck, and it failed: {attempt.codes}")
            points = {role: sorted(trail) for role, trail in first.trails.items()}
            duration_ns = min(first.duration_ns, second.duration_ns)
            self._undisturbed[shape] = Undisturbed(duration_ns, points)
        return self._undisturbed[shape]

    def _blow(self, chance: random.Random, shape: Shape, number: signal.Signals) -> Blow:
        measured, role = self._measured(shape), chance.choice(list(Role))
        second_ns = -1
        if number is signal.SIGKILL and chance.random() < 0.15:
            second_ns = int(chance.uniform(0, LONGEST_SECOND_NS))
        if chance.random() < 0.5:
            point = chance.choice(measured.points[role])
            return Blow(role, number, point, second_ns=second_ns)
        after_ns = int(chance.uniform(0, 1.1) * measured.duration_ns)
        return Blow(role, number, after_ns=after_ns, second_ns=second_ns)

    def _account(self, name: str, attempt: Attempt, operator: Operator, err: Exception) -> str:
        """Return all there is to say of a round that failed."""
        codes = {str(role): code for role, code in attempt.codes.items()}
        lines = [
            f"seed {self._seed}, round {name}: {err}",
            f"{attempt.shape}",
            f"{attempt.blow}; took {attempt.duration_ns / 1e6:.1f} ms; exit codes {codes}",
        ]
        for role, host in ((Role.SOURCE, attempt.source), (Role.DESTINATION, attempt.destination)):
            states = ", ".join(state.name for state in host.states())
            recorded = "; ".join(
                ", ".join(event.event for event in one.events) for one in sessions(host.journal)
            )
            lines.append(f"{role} in {states}; recorded: {recorded}")
            lines.append(f"  passed: {'; '.join(attempt.trails.get(role, []))}")
        return "\n".join(lines + [f"resolved: {found}" for found in operator.found])


def _migrate_again(attempt: Attempt, runs_at: Role) -> None:
    """Migrate once more, undisturbed, from the side where it runs to the other."""
    source, destination = attempt.source, attempt.destination
    if runs_at is Role.DESTINATION:
        with ExitStack() as stack:
            for device in source.open(stack):
                device.reset()  # as has to be done with one that was left in STOP
        source, destination = destination, source
    again = Attempt(source, destination, attempt.shape)
    again.run()
    if set(again.codes.values()) != {SUCCESS} or again.runs_at() is not Role.DESTINATION:
        raise Violation(f"it could not be migrated again: {again.codes}")


def _struck(attempt: Attempt) -> str:
    dead = [str(role) for role, code in attempt.codes.items() if code == KILLED]
    if len(dead) == 2:
        return "both killed"
    if dead:
        return f"{dead[0]} killed"
    is_stop = attempt.blow is not None and attempt.blow.number is signal.SIGSTOP
    if is_stop and attempt.struck_ns >= 0 and attempt.blow is not None:
        return f"{attempt.blow.role} stopped"
    return "nobody struck"


def soak(place: Path, seed: int, kills: int, first: int) -> Counter[str]:
    """Play rounds until there were so many kills. Raises Violation."""
    rounds, outcomes = Rounds(place, seed), Counter[str]()
    number, killed = first, 0
    while killed < kills:
        found = rounds.play(number)
        killed += found.is_kill
        outcomes[f"{found.struck}, runs at the {found.runs_at}"] += 1
        outcomes["migrated once more"] += found.is_again
        number += 1
    return outcomes


def main() -> int:
    """tools/soak."""
    parser = argparse.ArgumentParser(prog="tools/soak", description="Kill live migrations.")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--round", type=int, default=0, help="number of the first round")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vfiomig-soak-") as place:
        try:
            outcomes = soak(Path(place), given.seed, given.kills, given.round)
        except Violation as err:
            sys.stdout.write(
                f"{err}\n(tools/soak --kills 1 --seed SEED --round ROUND repeats it)\n"
            )
            return 1
    took = time.monotonic() - started
    text = "; ".join(f"{name}: {count}" for name, count in sorted(outcomes.items()))
    sys.stdout.write(f"{given.kills} kills, seed {given.seed}: {text}; {took:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
