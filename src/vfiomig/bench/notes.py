"""What has to be said with the figures, so that nobody reads more into them than they say."""

from collections.abc import Iterator

from vfiomig.bench.cases import STREAMING
from vfiomig.bench.machine import ENOUGH_CORES, Machine
from vfiomig.bench.plan import MEMORY, NOWHERE, Plan
from vfiomig.bench.runner import Results
from vfiomig.bench.summary import ENOUGH_RUNS

_SINK_NOTES = {
    "file": "file: through the page cache, one file that each run writes over, not synced;"
    " read back afterwards",
    "durable": "durable: a new file each run, on the disk before the clock stops",
    "tcp": "tcp: loopback; no wire, no network card, no round trip",
}


def notes_on(plan: Plan, machine: Machine, results: Results, against: str | None) -> Iterator[str]:
    """Give the notes, a sentence or two each."""
    yield (
        f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel},"
        f" tcp {machine.congestion_control}, Python {machine.python}, vfiomig {machine.vfiomig};"
        f" load before the run {machine.load}"
    )
    yield (
        "GB/s: medians, and between what they lie; in each round every case ran once. send, recv:"
        " CPU seconds per GB. MiB: the sender's peak, - where it ended before it was looked at"
    )
    if plan.runs < ENOUGH_RUNS:
        yield f"only {plan.runs} runs: to compare, take at least {ENOUGH_RUNS} (--runs)"
    if against:
        yield (
            f"speed, CPU: how many times {against}'s in the same round; above 1 is faster, or takes"
            " less CPU time of both sides together"
        )
    yield from (text for sink, text in _SINK_NOTES.items() if sink in plan.sweep.sinks)
    if STREAMING & set(plan.sweep.sinks):
        yield _receivers(plan)
    yield _checked(plan, results)
    if any(not baseline.figures for baseline in plan.baselines):
        yield (
            "tools: their start is in the time; the C programs' is not, and vfiomig runs in a"
            " process that is there already"
        )
    if machine.cores < ENOUGH_CORES:
        yield (
            f"{machine.cores} cores: sender and receiver fill them, so that more threads, devices"
            " or connections cannot show what they gain"
        )


def _receivers(plan: Plan) -> str:
    if plan.into == NOWHERE:
        return "pipe, unix, tcp: the receiver checks vfiomig's streams, and keeps nothing"
    if plan.into == MEMORY:
        return "pipe, unix, tcp: received into memory that every run uses again"
    return (
        f"pipe, unix, tcp: loaded into {plan.into}; a simulated device takes new memory each time"
    )


def _checked(plan: Plan, results: Results) -> str:
    own = "every stream of vfiomig was verified to its end, and its digest compared"
    if not plan.baselines:
        return own
    if results.stable:
        return own + "; of tools the first run's bytes were compared, later ones counted"
    return own + (
        "; the device's state differs from read to read: what tools copied could not be compared"
    )


def left_out(results: Results) -> Iterator[str]:
    """Give what failed, and why."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for case, reason in results.skipped.items():
        by_reason.setdefault((case.program, reason), []).append(case.sink)
    for (program, reason), sinks in by_reason.items():
        yield f"left out: {program} ({', '.join(dict.fromkeys(sinks))}): {reason}"
