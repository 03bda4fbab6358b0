"""One run of a program that is not ours: its descriptors, its figures, its end."""

import os
import re
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vfiomig.bench.measure import Usage, peak_kib
from vfiomig.errors import CancelledError, MigrationError
from vfiomig.fd import OwnedFd

# A transfer of 256 MiB takes 100 ms: a look at VmHWM so often finds it, and costs nothing.
_LOOK_MS = 10
_OUTPUT_BYTES = 4096
_FIGURE = re.compile(r"(\w+)=([0-9.]+)")
# As a shell gives them to a program: blocked signals and ignored ones are inherited otherwise.
_DEFAULT_SIGNALS = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGPIPE,
    signal.SIGXFSZ,
)


class ToolError(MigrationError):
    """A tool ended in failure: it is left out, and the reason is told."""

    code = 10


@dataclass(frozen=True, slots=True)
class ToolRun:
    """A run that succeeded. device_bytes: what it says it moved, None when it says nothing."""

    usage: Usage
    device_bytes: int | None = None


def run_tool(
    argv: Sequence[str], in_fd: int, out_fd: int, cancel_fd: int, *, figures: bool
) -> ToolRun:
    """Run argv with in_fd as descriptor 0 and out_fd as 1, and wait for it.

    figures: it is one of our C programs: its destination is descriptor 3, and what it prints on 1
    are its figures, which leave its start out. Descriptors stay the caller's. Once cancel_fd is
    readable, the program is killed. Raises ToolError, CancelledError, OSError.
    """
    with OwnedFd(os.memfd_create("words")) as words:
        start_ns = time.monotonic_ns()
        pid = _spawn(argv, in_fd, out_fd, words.fileno(), figures=figures)
        look_ms = -1 if figures else _LOOK_MS
        used, peak = _wait(pid, cancel_fd, look_ms, os.path.basename(argv[0]), words.fileno())
        usage = Usage(start_ns, time.monotonic_ns(), used, peak)
        return _with_figures(_said(words.fileno()), argv[0]) if figures else ToolRun(usage)


def _spawn(argv: Sequence[str], in_fd: int, out_fd: int, words_fd: int, *, figures: bool) -> int:
    # In this order: each source is above 2, and the last target may be one of the sources.
    places = [(in_fd, 0), (words_fd, 1), (words_fd, 2), (out_fd, 3 if figures else 1)]
    return os.posix_spawn(
        argv[0],
        list(argv),
        os.environ | {"LC_ALL": "C"},
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in places if fd != -1],
        setsigmask=[],
        setsigdef=_DEFAULT_SIGNALS,
    )


def _wait(
    pid: int, cancel_fd: int, look_ms: int, name: str, words_fd: int
) -> tuple[float, int | None]:
    """Return the CPU seconds of a child, once it has ended well, and its peak in KiB."""
    peak, cancelled = None, False
    with OwnedFd(os.pidfd_open(pid)) as process:
        waiting = select.poll()
        waiting.register(process.fileno(), select.POLLIN)
        waiting.register(cancel_fd, select.POLLIN)
        ready: set[int] = set()
        while process.fileno() not in ready:
            if cancel_fd in ready and not cancelled:
                cancelled = True
                os.kill(pid, signal.SIGKILL)
                waiting.unregister(cancel_fd)
            ready = {fd for fd, _ in waiting.poll(look_ms)}
            if not ready:
                peak = peak_kib(pid) or peak
        _, status, used = os.wait4(pid, 0)
    if cancelled:
        raise CancelledError(f"cancelled while {name} ran")
    if code := os.waitstatus_to_exitcode(status):
        ended = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        lines = _said(words_fd).splitlines()
        raise ToolError(f"{name}: {lines[-1] if lines else ended}")
    return used.ru_utime + used.ru_stime, peak


def _said(words_fd: int) -> str:
    return os.pread(words_fd, _OUTPUT_BYTES, 0).decode(errors="replace").strip()


def _with_figures(line: str, name: str) -> ToolRun:
    found = dict(_FIGURE.findall(line))
    try:
        usage = Usage(
            int(found["start_ns"]),
            int(found["end_ns"]),
            float(found["user"]) + float(found["sys"]),
            int(found["peak_kib"]),
        )
        return ToolRun(usage, int(found["bytes"]))
    except (KeyError, ValueError) as err:
        raise ToolError(f"{name} prints no figures: {line!r}") from err
