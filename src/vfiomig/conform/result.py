"""What comes of a check: a verdict for each rule, and the time each state change took. Frozen."""

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from vfiomig.errors import DeviceIOError, DeviceLostError
from vfiomig.uapi import DeviceState

# How the reason of a rule begins that was skipped because it is destructive.
NOT_ALLOWED = "destructive: "


class Verdict(StrEnum):
    """PASS, FAIL; SKIP: it could not be asked; NOTE: legal, and worth knowing."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    NOTE = "note"


class RuleResult(NamedTuple):
    """What one rule found.

    text: the rule. source: where it comes from. did: what was done, in order, the first of many.
    seen: what the device answered, or why it was not asked; a sentence or more. aftermath: how it
    was brought back to RUNNING when the rule left it elsewhere, or "".
    """

    id: str
    group: str
    text: str
    source: str
    destructive: bool
    verdict: Verdict
    did: tuple[str, ...]
    seen: str
    duration_ns: int
    aftermath: str = ""


class ArcTime(NamedTuple):
    """How long one request took, of the times it succeeded. by: "set" or "reset".

    steps: the states it passed, the wanted one last; one for a single arc of the state machine.
    """

    before: DeviceState
    wanted: DeviceState
    steps: tuple[DeviceState, ...]
    by: str
    times: int
    min_ns: int
    median_ns: int
    max_ns: int


class Conformance(NamedTuple):
    """What a check of one device found. lost: why nothing more could be asked of it, or ""."""

    device: str
    driver: str
    capabilities: tuple[str, ...]
    destructive: bool
    results: tuple[RuleResult, ...]
    arcs: tuple[ArcTime, ...]
    duration_ns: int
    lost: str = ""

    def how_many(self, verdict: Verdict) -> int:
        """Return how many rules ended so."""
        return sum(result.verdict is verdict for result in self.results)

    @property
    def code(self) -> int:
        """The exit code: 0, 6 when a rule failed, 20 when the device was lost."""
        if self.lost:
            return DeviceLostError.code
        return DeviceIOError.code if self.how_many(Verdict.FAIL) else 0


class Stopwatch:
    """Collects how long requests took."""

    def __init__(self) -> None:
        self._taken_ns: dict[tuple[DeviceState, tuple[DeviceState, ...], str], list[int]] = {}

    def add(
        self, before: DeviceState, steps: tuple[DeviceState, ...], took_ns: int, by: str = "set"
    ) -> None:
        """Count a request that succeeded. steps: the states it passed, the wanted one last."""
        self._taken_ns.setdefault((before, steps, by), []).append(took_ns)

    def arcs(self) -> Iterable[ArcTime]:
        """Yield what was measured: single arcs first, then longer ways, then resets."""
        for key in sorted(self._taken_ns, key=lambda key: (key[2] == "reset", len(key[1]), key)):
            (before, steps, by), taken_ns = key, sorted(self._taken_ns[key])
            median_ns = (taken_ns[(len(taken_ns) - 1) // 2] + taken_ns[len(taken_ns) // 2]) // 2
            yield ArcTime(
                before=before,
                wanted=steps[-1],
                steps=steps,
                by=by,
                times=len(taken_ns),
                min_ns=taken_ns[0],
                median_ns=median_ns,
                max_ns=taken_ns[-1],
            )
