"""Compare the states that two files hold, byte by byte, in whatever framing each of them is.

Exit code 0 when the states are the same (what the streams say of themselves may differ), 12 if not.

examples:
  vfiomig diff before.vmig after.vmig
"""

import argparse

from vfiomig.cli.output import Output, table
from vfiomig.inspection import diff

DIFFERS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("one", metavar="FILE")
    parser.add_argument("other", metavar="FILE")


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare. Returns 0 or 12."""
    found = diff(args.one, args.other)
    if found.same_state:
        verdict = f"same state: {found.device_bytes[0]} bytes, xxh3:{found.digests[0]}"
    else:
        sizes = " and ".join(f"{size} bytes" for size in found.device_bytes)
        verdict = f"different states: {sizes}, first at byte {found.first_offset}"
    rows = table([(name, mine, theirs) for name, mine, theirs in found.fields], indent="  ")
    values = {
        "same_state": found.same_state,
        "first_offset": found.first_offset,
        "device_bytes": found.device_bytes,
        "digests": found.digests,
        "fields": {name: [mine, theirs] for name, mine, theirs in found.fields},
    }
    out.answer(values, verdict + (f"\n{rows}" if rows else ""))
    return 0 if found.same_state else DIFFERS
