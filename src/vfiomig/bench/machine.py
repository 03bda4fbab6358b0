"""The machine that figures come from: without it they say nothing."""

import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vfiomig._version import __version__

# Sender and receiver with two threads each.
ENOUGH_CORES = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """cores: those this process may use. load: the mean of the last minute, before the run."""

    cpu: str
    cores: int
    kernel: str
    congestion_control: str
    load: float
    python: str
    vfiomig: str

    def as_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


def this_machine() -> Machine:
    """Return what this machine says of itself."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        congestion_control=_first_line(Path("/proc/sys/net/ipv4/tcp_congestion_control")),
        load=round(os.getloadavg()[0], 2),
        python=sys.version.split()[0],
        vfiomig=__version__,
    )


def _cpu_model() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, text = line.partition(":")
            if name.strip() == "model name":
                return text.strip()
    return platform.machine()  # aarch64 gives no name there


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
