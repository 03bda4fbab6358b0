"""Save the state of a device into FILE, or to standard output with "-".

The device is stopped while its state is read, and runs again before FILE is synced. FILE bears its
name only when it is whole. Whatever fails, the device is RUNNING again, or the exit code is 20.

examples:
  vfiomig save 'sim:a.state?size=64M' a.vmig
  vfiomig save unix:/run/vf0.sock vf0.vmig --pre-copy
  vfiomig save 0000:3b:00.2 - --framing qemu --idstr 0000:00:05.0/vfio | ssh host 'cat > vf0.qemu'
"""

import argparse
import sys
from pathlib import Path

from vfiomig.cli import arguments
from vfiomig.cli.output import Output
from vfiomig.cli.transfer_text import transfer_text
from vfiomig.cli.watch import Watch
from vfiomig.errors import LocalIOError, UsageError
from vfiomig.options import PreCopyLimits, QemuFraming, SaveOptions
from vfiomig.quantities import format_size
from vfiomig.save import save
from vfiomig.transport import open_sink
from vfiomig.uapi import DeviceState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument(
        "device", metavar="DEVICE", help="the device; vfiomig --help says how named"
    )
    parser.add_argument("file", metavar="FILE", help='the file to write, or "-"')
    parser.add_argument("--framing", choices=["native", "qemu"], default="native")
    parser.add_argument("--section-id", type=int, default=1, metavar="N", help="qemu framing")
    parser.add_argument(
        "--idstr", metavar="TEXT", help="qemu framing: the guest's name of the device"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="an opaque blob to send along")
    arguments.add_transfer_arguments(parser)
    parser.add_argument("--from-stop", action="store_true", help="accept a device that is in STOP")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--no-digest", action="store_true", help="qemu framing: no digest; splices where it can"
    )
    defaults = SaveOptions()
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--buffer",
        type=arguments.typed(arguments.parse_buffer),
        default=defaults.buffer_bytes,
        metavar="auto|SIZE",
        help="bytes of one read, 4K to 128M (default: auto, which is 1M unless reads are slow to"
        " begin: then 4M)",
    )
    group.add_argument(
        "--ring",
        type=int,
        default=defaults.ring_slots,
        metavar="N",
        help="buffers between the thread that reads and the one that writes; 1: one thread"
        f" (default: {defaults.ring_slots})",
    )
    group.add_argument(
        "--bandwidth",
        type=arguments.rate,
        default=0,
        metavar="RATE",
        help="the most to write: 25Gbit",
    )
    group.add_argument(
        "--durable",
        action="store_true",
        help="write FILE past the page cache while the device is stopped: less CPU and done sooner;"
        " else it is synced when the device runs again",
    )
    group.add_argument(
        "--keep-zeros", action="store_true", help="native framing: send runs of zeros as they are"
    )
    group = parser.add_argument_group("pre-copy (read while the device runs; bounded)")
    group.add_argument("--pre-copy", action="store_true", help="PRE_COPY rounds before STOP_COPY")
    pre_copy = PreCopyLimits()
    group.add_argument("--pre-copy-rounds", type=int, default=pre_copy.rounds, metavar="N")
    group.add_argument(
        "--pre-copy-time", type=arguments.duration, default=pre_copy.duration_ns, metavar="TIME"
    )
    group.add_argument(
        "--pre-copy-bytes", type=arguments.size, default=pre_copy.device_bytes, metavar="SIZE"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Save. Returns the exit code."""
    to_stdout = args.file == "-"
    if to_stdout:
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal", hint="redirect it, or name a file")
        out.results = sys.stderr
    options = _options(args)
    target = sys.stdout.fileno() if to_stdout else args.file
    with arguments.opened(args.device, out) as device:
        if args.dry_run:
            options.check(device.name, device.capabilities)
            state = device.state()
            length = device.stop_copy_length()
            with open_sink(target, force=args.force):
                pass
            told = "unknown" if length is None else f"about {format_size(length)}"
            ready = state is DeviceState.RUNNING or (args.from_stop and state is DeviceState.STOP)
            values = {"dry_run": True, "state": state.name, "stop_copy_length": length}
            verdict = "would save" if ready else "would refuse: not RUNNING"
            out.result(
                values | {"ready": ready},
                f"{verdict}: {device.name}, in {state.name}, its state {told}",
            )
            return 0 if ready else 5
        with Watch(out) as watch:
            report = save(device, target, options, on_event=watch)
            watch.finished(report.device_bytes)
    where = "standard output" if to_stdout else args.file
    out.result(
        {"file": where, **report.as_dict()},
        transfer_text(f"saved {report.device} to {where}", report),
    )
    return 0


def _options(args: argparse.Namespace) -> SaveOptions:
    if args.framing == "native" and (args.idstr or args.no_digest):
        raise UsageError("--idstr and --no-digest belong to --framing qemu")
    if args.framing == "qemu" and args.keep_zeros:
        raise UsageError("--keep-zeros belongs to --framing native: QEMU's keeps them always")
    limits = PreCopyLimits(args.pre_copy_rounds, args.pre_copy_time, args.pre_copy_bytes)
    return SaveOptions(
        framing="native" if args.framing == "native" else QemuFraming(args.section_id, args.idstr),
        pre_copy=limits if args.pre_copy else None,
        after=args.after,
        from_stop=args.from_stop,
        config=_read_config(args.config) if args.config else b"",
        digest=not args.no_digest,
        force=args.force,
        buffer_bytes=args.buffer,
        ring_slots=args.ring,
        elide_zeros=not args.keep_zeros,
        durable=args.durable,
        bytes_per_s=args.bandwidth,
        max_state_bytes=args.max_state,
    )


def _read_config(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read((16 << 20) + 1)  # options.check() says what is too much
    except OSError as err:
        raise LocalIOError(f"cannot read {path}: {err.strerror}", errno=err.errno) from err
