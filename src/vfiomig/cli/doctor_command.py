"""Say what this host, or this host for one device, lacks for migration, and what to do about it.

Looks at the kernel, modules, device nodes and the caller's rights. Opens no device.

examples:
  vfiomig doctor
  vfiomig doctor 0000:3b:00.2
"""

import argparse
from dataclasses import asdict

from vfiomig import doctor, sysfs
from vfiomig.cli.output import Output, printable
from vfiomig.doctor import Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("device", metavar="DEVICE", nargs="?")


def run(args: argparse.Namespace, out: Output) -> int:
    """Examine. Returns 0 when nothing fails, else 3."""
    device = sysfs.find(args.device) if args.device else None
    findings = doctor.examine(device)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status.value:4}  {finding.subject}: {printable(finding.text)}")
        if finding.remedy and finding.status is not Status.OK:
            lines.append(f"      do: {printable(finding.remedy)}")
    failed = any(finding.status is Status.FAIL for finding in findings)
    out.answer({"findings": [asdict(finding) for finding in findings]}, "\n".join(lines))
    return 3 if failed else 0
