"""What work costs this process: time, CPU time of all its threads, and the peak of its memory."""

import resource
import time
from contextlib import suppress
from dataclasses import dataclass

# Documentation/filesystems/proc.rst, clear_refs: 5 resets VmHWM to the present resident set.
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Usage:
    """CLOCK_MONOTONIC at both ends, the same in all processes. peak_kib: None where unknown."""

    start_ns: int
    end_ns: int
    cpu_s: float
    peak_kib: int | None


class Meter:
    """Measures what happens between two moments in this process, threads included."""

    def __init__(self) -> None:
        # A kernel without it: the peak is then that of all runs so far.
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(_RESET_PEAK)
        self._cpu_s, self._start_ns = _cpu_s(), time.monotonic_ns()

    def read(self) -> Usage:
        """Return what was used since."""
        end_ns, cpu_s = time.monotonic_ns(), _cpu_s() - self._cpu_s
        return Usage(self._start_ns, end_ns, cpu_s, peak_kib("self"))


def peak_kib(pid: int | str) -> int | None:
    """Return VmHWM of a process, None when it has none (any more).

    ru_maxrss will not do: after exec() it still counts what the process was before.
    """
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return None


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
