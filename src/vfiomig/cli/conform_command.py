"""Check whether a driver keeps the rules of VFIO migration: for its authors, on a real device.

The device must be RUNNING, and is left so. Again and again it is stopped for moments, and its state
read. Rules that may lose what it holds are run with --destructive only; some of these take away
this process's descriptors for a moment, or close the device and open it again. A rule is kept
(pass), kept in a way worth knowing (note), broken (fail), or cannot be asked (skip). All are in
docs/conformance.md. Exit code 6 when a rule fails, 20 when the device does not come back.

examples:
  vfiomig conform sim:
  vfiomig conform 0000:3b:00.2 --destructive --junit conform.xml
  vfiomig conform fd:9 --only pre-copy,end-stays
  vfiomig conform --list
"""

import argparse
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from vfiomig.cli import arguments
from vfiomig.cli.output import Output, table
from vfiomig.conform import conform
from vfiomig.conform.catalog import select
from vfiomig.conform.result import NOT_ALLOWED, ArcTime, Conformance, RuleResult, Verdict
from vfiomig.conform.rule import Rule
from vfiomig.conform.streams import write_whole
from vfiomig.errors import UsageError
from vfiomig.options import DEFAULT_MAX_STATE_BYTES
from vfiomig.quantities import format_duration
from vfiomig.transport import Stream, open_sink


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE", nargs="?")
    parser.add_argument(
        "--destructive",
        action="store_true",
        help="also what may lose the device's state: loads, resets, refusals, killed owners",
    )
    parser.add_argument(
        "--only",
        type=_names,
        default=(),
        metavar="RULE,…",
        help="these rules, or groups of rules, only",
    )
    parser.add_argument("--list", action="store_true", help="list the rules, and ask nothing")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML too")
    parser.add_argument(
        "--max-state",
        type=arguments.size,
        default=DEFAULT_MAX_STATE_BYTES,
        metavar="SIZE",
        help="the largest state to read (default: 1T)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Check. Returns 0, 6 when a rule failed, 20 when the device was lost."""
    rules = select(args.only)
    if args.list:
        out.answer({"rules": [_rule_values(rule) for rule in rules]}, _listed(rules, out))
        return 0
    if args.device is None:
        raise UsageError("which DEVICE?", hint="vfiomig conform --help")
    with ExitStack() as stack:
        # Before the device is stopped: it is known then that the file can be written.
        sink = stack.enter_context(open_sink(args.junit, force=True)) if args.junit else None
        with arguments.opened(args.device, out) as device:
            found = conform(
                device,
                destructive=args.destructive,
                only=args.only,
                max_state_bytes=args.max_state,
                on_result=lambda result: _tell(result, out),
            )
        if sink is not None:
            _write_junit(found, sink)
    out.answer(_values(found), _text(found, out))
    if found.lost:
        out.note(f"the device was lost, and nothing more was asked: {found.lost}")
    return found.code


def _tell(result: RuleResult, out: Output) -> None:
    if out.verbose and not out.json:
        out.note(f"{result.verdict:4}  {result.id} {format_duration(result.duration_ns)}")


def _write_junit(found: Conformance, sink: Stream) -> None:
    from vfiomig.conform.junit import junit_xml

    try:
        write_whole(sink.fileno(), junit_xml(found))
    except OSError as err:
        raise sink.failed(err) from err
    sink.commit()


def _rule_values(rule: Rule) -> dict[str, Any]:
    needs = [need.name for need in rule.needs]
    values = {"id": rule.id, "group": rule.group, "text": rule.text, "source": rule.source}
    return values | {"needs": needs, "destructive": rule.destructive, "losing": rule.losing}


def _listed(rules: Iterable[Rule], out: Output) -> str:
    lines = []
    for rule in rules:
        lines.append((rule.group, rule.id, "destructive" * rule.destructive, rule.text))
    if not out.verbose:
        return table(lines)
    return "\n".join(_described(rule.group, rule.id, rule.text, rule.source) for rule in rules)


def _values(found: Conformance) -> dict[str, Any]:
    return {
        "device": found.device,
        "driver": found.driver,
        "capabilities": found.capabilities,
        "destructive": found.destructive,
        "rules": [result._asdict() for result in found.results],
        "state_changes": [_arc_values(arc) for arc in found.arcs],
        "totals": {verdict.value: found.how_many(verdict) for verdict in Verdict},
        "duration_ns": found.duration_ns,
        "lost": found.lost,
    }


def _arc_values(arc: ArcTime) -> dict[str, Any]:
    names = {"before": arc.before.name, "wanted": arc.wanted.name}
    return arc._asdict() | names | {"steps": [state.name for state in arc.steps]}


def _text(found: Conformance, out: Output) -> str:
    told = [r for r in found.results if out.verbose or r.verdict is not Verdict.SKIP]
    parts = [table((result.group, result.id, result.verdict, result.seen) for result in told)]
    parts += [_explained(result) for result in told if _wants_words(result, out)]
    if found.arcs:
        parts.append(table(_arc_rows(found.arcs)))
    parts.append(_totals(found))
    return "\n\n".join(part for part in parts if part)


def _wants_words(result: RuleResult, out: Output) -> bool:
    return out.verbose or result.verdict is Verdict.FAIL


def _explained(result: RuleResult) -> str:
    lines = [_described(result.verdict, result.id, result.text, result.source)]
    if result.did:
        lines.append(f"  did: {', '.join(result.did)}")
    lines.append(f"  seen: {result.seen}")
    if result.aftermath:
        lines.append(f"  then: {result.aftermath}")
    return "\n".join(lines)


def _described(first: str, name: str, text: str, source: str) -> str:
    return f"{first}: {name}\n  {text}\n  source: {source}"


def _arc_rows(arcs: Iterable[ArcTime]) -> Iterable[tuple[str, ...]]:
    yield "STATE CHANGE", "TIMES", "MIN", "MEDIAN", "MAX"
    for arc in arcs:
        way = " -> ".join([arc.before.name, *(state.name for state in arc.steps)])
        name = f"{arc.before.name} -> reset" if arc.by == "reset" else way
        times = map(format_duration, (arc.min_ns, arc.median_ns, arc.max_ns))
        yield name, str(arc.times), *times


def _totals(found: Conformance) -> str:
    counts = ", ".join(f"{found.how_many(verdict)} {verdict}" for verdict in Verdict)
    lines = [f"{found.device}: {counts}, in {format_duration(found.duration_ns)}"]
    skipped = [result.seen for result in found.results if result.verdict is Verdict.SKIP]
    unasked = sum(reason.startswith(NOT_ALLOWED) for reason in skipped)
    reasons = {reason for reason in skipped if not reason.startswith(NOT_ALLOWED)}
    lines += [f"  {skipped.count(reason)} skipped: {reason}" for reason in sorted(reasons)]
    lines += [f"  {unasked} skipped: only with --destructive"] * bool(unasked)
    return "\n".join(lines)
