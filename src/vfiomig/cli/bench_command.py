"""Measure how fast a device is saved, beside tools that only copy. DEVICE: sim: if not given.

Sizes, sinks and settings are multiplied; every combination runs once in each round, so that they
take turns. What arrives is checked: a wrong answer ends the run (exit code 7). Lists are separated
by commas.

examples:
  vfiomig bench --quick
  vfiomig bench --buffer 4K,64K,1M,16M,128M --sink null,tcp --plot speed.png
  vfiomig bench --programs benchmarks/build --baselines qemu_like,plain_ring,dd --against plain_ring
  vfiomig bench --framing native,qemu --zeros 0,50,95 --sink tcp --into memory --csv speed.csv
  vfiomig bench --devices 1,2,4 --ring 1,4 --sink unix --size 64M
  vfiomig bench unix:/run/vf0.sock --sink null,durable --baselines none
"""

import argparse
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vfiomig import quantities
from vfiomig.backends import opens_by_name
from vfiomig.bench.baselines import NAMES, chosen, find_baselines
from vfiomig.bench.cases import SINKS, Sweep
from vfiomig.bench.export import csv_text, json_values
from vfiomig.bench.machine import Machine, this_machine
from vfiomig.bench.notes import left_out, notes_on
from vfiomig.bench.plan import MEMORY, NOWHERE, Plan
from vfiomig.bench.plot import check_plot, write_plot
from vfiomig.bench.runner import Results, run_bench
from vfiomig.bench.summary import Row, summarize
from vfiomig.bench.table import table_text
from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.errors import LocalIOError, UsageError
from vfiomig.options import DEFAULT_RING_SLOTS

# What the lists are when they are not given, and with --quick: enough to see that it works.
_BUFFERS, _SINKS, _RUNS = "64K,256K,1M,4M,auto", "null,file,pipe,unix,tcp", 7
_QUICK_BUFFERS, _QUICK_SINKS, _QUICK_RUNS = "256K,1M,auto", "null,pipe,tcp", 3
_SIZE_BYTES, _QUICK_SIZE_BYTES = 256 << 20, 16 << 20
_COLUMNS = 98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument(
        "device", metavar="DEVICE", nargs="?", default="sim:", help="vfiomig --help says how named"
    )
    sweep = parser.add_argument_group("what is multiplied")
    sweep.add_argument(
        "--buffer", metavar="SIZE,…", help=f"bytes of one read, or auto ({_BUFFERS})"
    )
    sweep.add_argument("--sink", metavar="SINK,…", help=f"of {','.join(SINKS)} ({_SINKS})")
    sweep.add_argument(
        "--ring", metavar="N,…", default=str(DEFAULT_RING_SLOTS), help="buffers; 1: one thread (4)"
    )
    sweep.add_argument("--framing", metavar="NAME,…", default="native", help="native,qemu (native)")
    sweep.add_argument(
        "--checksum", metavar="on|off,…", default="on", help="off: qemu framing only (on)"
    )
    sweep.add_argument("--zeros", metavar="PERCENT,…", default="0", help="share of zeros, sim: (0)")
    sweep.add_argument("--devices", metavar="N,…", default="1", help="so many at once, sim: (1)")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--size", type=arguments.size, metavar="SIZE", help="of the state, sim: (256M)"
    )
    run.add_argument("--runs", type=int, metavar="N", help=f"measured rounds ({_RUNS})")
    run.add_argument("--quick", action="store_true", help="little of everything, to try it")
    run.add_argument(
        "--into",
        metavar="none|memory|DEVICE",
        default=NOWHERE,
        help="where receivers put what they checked (none)",
    )
    run.add_argument(
        "--dir", type=Path, default=Path(), help="where files are made, and removed (.)"
    )
    beside = parser.add_argument_group("baselines")
    beside.add_argument(
        "--baselines",
        metavar="auto|none|NAME,…",
        default="auto",
        help=f"of {','.join(NAMES)} (auto)",
    )
    beside.add_argument(
        "--programs", type=Path, metavar="DIR", help="where the C programs are (PATH)"
    )
    beside.add_argument(
        "--against", metavar="NAME", help="the baseline of the ratios (qemu_like, dd or cat)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--csv", type=Path, metavar="FILE", help="the figures, replaced if there")
    files.add_argument("--plot", type=Path, metavar="FILE", help="a picture: .png or .svg")


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure. Returns the exit code."""
    if args.plot is not None:
        check_plot(args.plot)
    plan = _plan(args)
    plan.check()
    _check_files(args.csv, args.plot)
    machine = this_machine()
    _warn(plan, out)

    def tell(number: int, runs: int) -> None:
        name = "warm-up, and a check of the bytes" if number == 0 else f"round {number} of {runs}"
        if out.json:
            out.record("progress", {"round": number, "rounds": runs})
        else:
            out.note(f"{name}: {len(plan.cases())} transfers")

    results = run_bench(plan, tell)
    rows = summarize(results, plan.against)
    notes = [*notes_on(plan, machine, results, plan.against), *left_out(results)]
    _write_files(args, plan, machine, rows)
    out.answer(json_values(plan, machine, results, rows, notes), _text(results, rows, notes))
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    quick = args.quick
    baselines = find_baselines(args.baselines, args.programs)
    buffers = args.buffer or (_QUICK_BUFFERS if quick else _BUFFERS)
    sweep = Sweep(
        sinks=(args.sink or (_QUICK_SINKS if quick else _SINKS)).split(","),
        buffers=[arguments.parse_buffer(text) for text in buffers.split(",")],
        rings=_numbers("--ring", args.ring),
        framings=args.framing.split(","),
        checksums=[_switch(text) for text in args.checksum.split(",")],
        zeros=_numbers("--zeros", args.zeros),
        devices=_numbers("--devices", args.devices),
    )
    return Plan(
        device=args.device,
        size_bytes=args.size,
        default_size_bytes=_QUICK_SIZE_BYTES if quick else _SIZE_BYTES,
        sweep=sweep,
        baselines=baselines,
        against=chosen(baselines, args.against),
        runs=(_QUICK_RUNS if quick else _RUNS) if args.runs is None else args.runs,
        directory=args.dir,
        into=args.into,
    )


def _numbers(option: str, text: str) -> list[int]:
    words = [word.removesuffix("%") for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(f"{option}: {text!r} is not a number, or several with commas")
    return [int(word) for word in words]


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"--checksum: {text!r} is neither on nor off")
    return text == "on"


def _check_files(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and (os.path.isdir(path) or not os.access(path.parent, os.W_OK)):
            raise LocalIOError(f"cannot write {path}")


def _warn(plan: Plan, out: Output) -> None:
    """Say what a run does to a device that somebody may be using."""
    for name in {plan.device, plan.into} - {NOWHERE, MEMORY}:
        if opens_by_name(name):
            out.note(
                f"opening {name} by name resets it if it is a vfio-pci device, and so does the end"
            )
    if not plan.is_made:
        runs = len(plan.cases()) * (plan.runs + 1) + 2  # it is read twice before
        out.note(
            f"each of the {runs} runs stops {plan.device} for as long as the copy takes; it is"
            " RUNNING in between"
        )


def _write_files(
    args: argparse.Namespace, plan: Plan, machine: Machine, rows: Sequence[Row]
) -> None:
    if args.csv is not None:
        args.csv.write_text(csv_text(rows), encoding="utf-8")
    if args.plot is not None:
        named = args.baselines != "auto"  # all of them would be too many to tell apart
        drawn = [
            baseline.name for baseline in plan.baselines if named or baseline.name == plan.against
        ]
        write_plot(args.plot, rows, machine, drawn)


def _text(results: Results, rows: Sequence[Row], notes: Sequence[str]) -> str:
    sizes = sorted({device.device_bytes for device in results.devices})
    states = ", ".join(quantities.format_size(size) for size in sizes)
    took = quantities.format_duration(int(results.seconds * 1e9))
    head = f"{results.devices[0].name}: {states} of state; all of it took {took}"
    return "\n".join([head, "", table_text(rows), "", *map(_wrapped, notes)])


def _wrapped(note: str) -> str:
    return textwrap.fill(note, _COLUMNS, initial_indent="- ", subsequent_indent="  ")
