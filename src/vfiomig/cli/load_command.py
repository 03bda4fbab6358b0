"""Load the state in FILE ("-": standard input) into a device. The framing is found out.

What the device held is lost. The whole stream is verified before it is committed; whatever fails
earlier ends in a reset of the device.

examples:
  vfiomig load a.vmig 'sim:b.state?size=64M'
  ssh host 'cat vf0.vmig' | vfiomig load - unix:/run/vf0.sock
  vfiomig load vf0.qemu unix:/run/vf0.sock --after stop --config-out vf0.config
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.cli.transfer_text import transfer_text
from vfiomig.cli.watch import Watch
from vfiomig.device import Device
from vfiomig.errors import StreamError, UsageError
from vfiomig.inspection import inspect
from vfiomig.load import check_identity, load
from vfiomig.options import DEFAULT_BUFFER_BYTES, LoadOptions
from vfiomig.transport import Stream, open_sink
from vfiomig.uapi import DeviceState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("file", metavar="FILE", help='the file to read, or "-"')
    parser.add_argument(
        "device", metavar="DEVICE", help="the device; vfiomig --help says how named"
    )
    arguments.add_transfer_arguments(parser)
    parser.add_argument(
        "--buffer",
        type=arguments.size,
        default=DEFAULT_BUFFER_BYTES,
        metavar="SIZE",
        help="bytes of one read of the stream, 4K to 128M (default: 1M)",
    )
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
    with arguments.opened(args.device, out) as device, ExitStack() as stack:
        if args.dry_run:
            if from_stdin:
                raise UsageError("--dry-run reads the file twice: name one")
            return _dry_run(args, out, device, options)
        # Opened first: what is loaded cannot be taken back for a name that exists.
        config = stack.enter_context(open_sink(args.config_out)) if args.config_out else None
        if args.force_reset and device.state() is not DeviceState.RUNNING:
            out.note(f"{device.name} is in {device.state().name}: resetting it")
            device.reset()
        with Watch(out) as watch:
            report = load(source, device, options, on_event=watch)
            watch.finished(report.device_bytes)
        _keep_config(config, report.config, out)
    where = "standard input" if from_stdin else args.file
    out.result(
        {"file": where, **report.as_dict()},
        transfer_text(f"loaded {where} into {report.device}", report),
    )
    return 0


def _options(args: argparse.Namespace) -> LoadOptions:
    fields = frozenset(field for field in args.allow_mismatch.split(",") if field)
    return LoadOptions(
        after=args.after,
        allow_mismatch=fields,
        buffer_bytes=args.buffer,
        max_state_bytes=args.max_state,
    )


def _dry_run(args: argparse.Namespace, out: Output, device: Device, options: LoadOptions) -> int:
    found = inspect(args.file, max_state_bytes=options.max_state_bytes)
    if not found.sound:
        offset = found.problem_offset or 0
        problem = StreamError(found.problem.removesuffix(f" (at byte {offset})"), offset=offset)
        problem.name_stream(args.file)
        raise problem
    manifest = found.manifest
    doubt = check_identity(manifest, args.file, device, options) if manifest is not None else ""
    if doubt:
        out.note(doubt)
    state = device.state()
    ready = state is DeviceState.RUNNING or args.force_reset
    verdict = "would load" if ready else "would refuse: not RUNNING"
    what = f"{args.file}, sound, {found.device_bytes} bytes, into {device.name}, in {state.name}"
    values = {"dry_run": True, "ready": ready, "state": state.name}
    out.result(values | {"device_bytes": found.device_bytes}, f"{verdict}: {what}")
    return 0 if ready else 5


def _keep_config(sink: Stream | None, config: bytes, out: Output) -> None:
    if sink is None:
        if config:
            out.note(f"the stream carries a config blob of {len(config)} bytes: not kept")
        return
    if not config:
        return out.note("the stream carries no config blob: nothing to keep")
    try:
        with open(sink.fileno(), "wb", closefd=False) as file:
            file.write(config)
    except OSError as err:
        raise sink.failed(err) from err
    sink.commit()
