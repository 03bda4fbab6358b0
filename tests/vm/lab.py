#!/usr/bin/env python3
"""Boot a real kernel with VFIO migration devices and run a command in it: see README.md."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

# Run as a script, this file finds its neighbours as the tests do: from the folder "tests".
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import guest, kernels
from vm.kernels import LabError

EXIT_TIMEOUT = 124  # As timeout(1) has it.
EXIT_LAB = 125  # As docker-run has it: the lab failed, not the command.
CONSOLE_TAIL_LINES = 40

MTTY = (
    "5a5a0000-0000-4000-8000-000000000001:mtty-2",
    "5a5a0000-0000-4000-8000-000000000002:mtty-2",
    "5a5a0000-0000-4000-8000-000000000003:mtty-1",
    "5a5a0000-0000-4000-8000-000000000004:mtty-1",
)
# The guest gets these as they are here.
PASSED_ON = ("PATH", "HOME")
FIXED = {
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "USER": "root",
    "TERM": "dumb",
    "TMPDIR": "/tmp",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: the command's, or EXIT_TIMEOUT or EXIT_LAB."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    try:
        cache = kernels.cache_folder()
        kernel = kernels.prepare(options.kernel, cache)
        if not options.no_driver:
            kernel = kernels.with_driver(kernel, cache)
        if options.action == "prepare":
            sys.stdout.write(f"{kernel.image}\n")
            return 0
        return _run(options, kernel)
    except guest.LabTimeout as err:
        sys.stderr.write(f"lab: {err}\n")
        return EXIT_TIMEOUT
    except LabError as err:
        sys.stderr.write(f"lab: {err}\n")
        return EXIT_LAB
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(options: argparse.Namespace, kernel: kernels.Kernel) -> int:
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
        return _boot(options, kernel, options.logs)
    folder = Path(tempfile.mkdtemp(prefix="vfiomig-vm-"))
    keep = False
    try:
        return _boot(options, kernel, folder)
    except LabError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder)


def _boot(options: argparse.Namespace, kernel: kernels.Kernel, logs: Path) -> int:
    console = logs / "console.log"
    try:
        return guest.run(_guest(options, kernel), logs)
    except LabError:
        lines = console.read_text(errors="replace").splitlines()[-CONSOLE_TAIL_LINES:]
        sys.stderr.write("\n".join([*lines, f"lab: the whole console log is {console}", ""]))
        raise


def _guest(options: argparse.Namespace, kernel: kernels.Kernel) -> guest.Guest:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | FIXED
    mtty = options.mtty or [_device(text) for text in MTTY]
    environment["VFIOMIG_MTTY"] = ",".join(f"{uuid}:{kind}" for uuid, kind in mtty)
    return guest.Guest(
        kernel=kernel,
        command=options.command,
        cwd=Path.cwd(),
        environment=environment | dict(options.env),
        mtty=mtty,
        read_only=options.ro,
        writable=options.rw,
        memory=options.memory,
        cpus=options.cpus,
        timeout_s=options.timeout * 60,
        fatal_oops=not options.allow_oops,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="fetch or build a kernel, print its file")
    run = actions.add_parser("run", help="run a command in a guest")
    for action in (prepare, run):
        action.add_argument("--kernel", choices=kernels.NAMES, default="debian")
        action.add_argument("--no-driver", action="store_true",
            help="without the test device of the folder driver")  # fmt: skip
    add = run.add_argument
    add("--mtty", action="append", type=_device, metavar="UUID:TYPE",
        help="create this device (repeatable; default: two mtty-2 and two mtty-1)")  # fmt: skip
    add("--rw", action="append", type=_folder, default=[], metavar="DIR",
        help="let the guest write here (repeatable)")  # fmt: skip
    add("--ro", action="append", type=_folder, default=[], metavar="DIR",
        help="show this folder, which the guest's own /tmp or /run hides (repeatable)")  # fmt: skip
    add("--env", action="append", type=_assignment, default=[], metavar="NAME=VALUE")
    add("--memory", default="1G", metavar="SIZE")
    add("--cpus", type=int, default=1)
    add("--timeout", type=float, default=10, metavar="MINUTES",
        help="for boot and command together (default: 10)")  # fmt: skip
    add("--logs", type=Path, metavar="DIR",
        help="leave console.log and the other logs here, after a success too")  # fmt: skip
    add("--allow-oops", action="store_true",
        help="do not fail when the kernel reports a bug of its own")  # fmt: skip
    run.add_argument("command", nargs="+", metavar="COMMAND")
    return parser


def _device(text: str) -> tuple[str, str]:
    uuid, colon, kind = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("expected UUID:TYPE")
    return uuid, kind


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return path


def _end(_signal: int, _frame: object) -> NoReturn:
    """Unwind, so that the guest is ended and its folder is removed."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
