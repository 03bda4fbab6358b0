"""Show what a stream holds, in either framing, and how far it is sound. Needs no privileges.

A damaged stream is shown as far as it goes, with what is wrong at which byte; the exit code is 7.

examples:
  vfiomig inspect a.vmig
  vfiomig inspect a.vmig --frames
  vfiomig inspect vf0.qemu --json | jq .problem
"""

import argparse
import sys

from vfiomig.cli.output import Output, printable, table
from vfiomig.incoming.checked import FrameInfo
from vfiomig.inspection import Inspection, inspect
from vfiomig.quantities import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("file", metavar="FILE", help='the file to read, or "-"')
    parser.add_argument("--frames", action="store_true", help="list every frame with its offset")


def run(args: argparse.Namespace, out: Output) -> int:
    """Inspect. Returns the exit code."""
    source = sys.stdin.fileno() if args.file == "-" else args.file

    def show(frame: FrameInfo) -> None:
        values = {
            "kind": frame.kind,
            "offset": frame.offset,
            "length_bytes": frame.length_bytes,
            "device": frame.device,
            "detail": frame.detail,
        }
        if out.json:
            out.record("frame", values)
        else:
            print(f"{frame.offset:>14}  {frame.kind:8}  {frame.length_bytes:>12}  {frame.detail}")

    found = inspect(source, on_frame=show if args.frames else None)
    out.answer(found.as_dict(), _text(found))
    return found.code


def _text(found: Inspection) -> str:
    rows = [("framing", found.framing or "not known")]
    if found.manifest is not None:
        rows += [("written", f"{found.manifest.created} by {found.manifest.tool}")]
        for entry in found.manifest.devices:
            identity = entry.identity
            ids = ":".join(part for part in (identity.vendor_id, identity.device_id) if part)
            what = " ".join(part for part in (identity.driver, identity.model, ids) if part)
            rows += [("device", f"{entry.name} ({what})")]
            rows += [("capabilities", ", ".join(entry.capabilities))]
    if found.idstr is not None:
        rows += [("section", f"id {found.section_id}, idstr {found.idstr}")]
    rows += [
        ("state", f"{format_size(found.device_bytes)} ({found.device_bytes} bytes)"),
        ("", f"{found.pre_copy_bytes} read in PRE_COPY, {found.zero_bytes} in runs of zeros"),
        ("digest", f"xxh3:{found.digest}" if found.digest else "none"),
        ("config", f"{len(found.config)} bytes"),
        ("records" if found.framing == "qemu" else "frames", str(found.frames)),
    ]
    if found.framing != "native":
        rows = [row for row in rows if row[0]]
    verdict = "sound to the end"
    if not found.sound:
        verdict = f"DAMAGED: sound up to byte {found.sound_bytes}; {found.problem}"
    elif found.framing == "qemu":
        verdict = "well formed to the end; this framing has no checksums"
    rows += [("verdict", verdict)]
    return f"{printable(found.name)}\n" + table(rows, indent="  ")
