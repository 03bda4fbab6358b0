"""Load the state in FILE ("-": standard input) into a device. The framing is found out.

What the device held is lost. The whole stream is verified before it is committed; whatever fails
earlier ends in a reset of the device.

examples:
  vfiomig load a.vmig 'sim:b.state?size=64M'
  ssh host 'cat vf0.vmig' | vfiomig load - unix:/run/vf0.sock
  vfiomig load vf0.qemu unix:/run/vf0.sock --after stop --config-out vf0.config
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.cli.transfer_text import transfer_text
from vfiomig.cli.watch import Watch
from vfiomig.errors import StreamError, UsageError
from vfiomig.inspection import inspect
from vfiomig.load import load
from vfiomig.options import LoadOptions
from vfiomig.report import TransferReport
from vfiomig.transport import open_sink
from vfiomig.uapi import DeviceState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("file", metavar="FILE", help='the file to read, or "-"')
    parser.add_argument(
        "device", metavar="DEVICE", help="the device; vfiomig --help says how named"
    )
    arguments.add_transfer_arguments(parser)
    parser.add_argument(
        "--allow-mismatch",
        metavar="FIELD,…",
        default="",
        help="fields in which stream and device may differ: driver, model, vendor_id, device_id, …",
    )
    parser.add_argument(
        "--config-out", type=Path, metavar="FILE", help="where to put a config blob"
    )
    parser.add_argument(
        "--force-reset", action="store_true", help="reset a device that is not RUNNING first"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Load. Returns the exit code."""
    from_stdin = args.file == "-"
    if from_stdin and sys.stdin.isatty():
        raise UsageError("standard input is a terminal", hint="redirect it, or name a file")
    options = _options(args)
    options.check()
    source = sys.stdin.fileno() if from_stdin else args.file
    with arguments.opened(args.device, out) as device:
        if args.dry_run:
            if from_stdin:
                raise UsageError("--dry-run reads the file twice: name one")
            return _dry_run(args, out, device.name, device.state())
        if args.force_reset and device.state() is not DeviceState.RUNNING:
            out.note(f"{device.name} is in {device.state().name}: resetting it")
            device.reset()
        with Watch(out) as watch:
            report = load(source, device, options, on_event=watch)
            watch.finished(report.device_bytes)
    _keep_config(args.config_out, report, out)
    where = "standard input" if from_stdin else args.file
    out.result(
        {"file": where, **report.as_dict()},
        transfer_text(f"loaded {where} into {report.device}", report),
    )
    return 0


def _options(args: argparse.Namespace) -> LoadOptions:
    fields = frozenset(field for field in args.allow_mismatch.split(",") if field)
    options = LoadOptions(after=args.after, allow_mismatch=fields)
    if args.buffer is not None:
        options = dataclasses.replace(options, buffer_bytes=args.buffer)
    if args.max_state is not None:
        options = dataclasses.replace(options, max_state_bytes=args.max_state)
    return options


def _dry_run(args: argparse.Namespace, out: Output, name: str, state: DeviceState) -> int:
    found = inspect(args.file)
    if not found.sound:
        raise StreamError(found.problem, offset=found.problem_offset or 0)
    ready = state is DeviceState.RUNNING or args.force_reset
    verdict = "would load" if ready else "would refuse: not RUNNING"
    out.result(
        {"dry_run": True, "ready": ready, "state": state.name, "device_bytes": found.device_bytes},
        f"{verdict}: {args.file}, sound, {found.device_bytes} bytes, into {name}, in {state.name}",
    )
    return 0 if ready else 5


def _keep_config(path: Path | None, report: TransferReport, out: Output) -> None:
    if not report.config:
        return
    if path is None:
        return out.note(f"the stream carries a config blob of {len(report.config)} bytes: not kept")
    with open_sink(path) as sink:
        view = memoryview(report.config)
        with open(sink.fileno(), "wb", closefd=False) as file:
            file.write(view)
        sink.commit()
