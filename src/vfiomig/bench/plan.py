"""What a run of the bench is asked to do, and the names of the devices it needs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiomig.bench.baselines import Baseline
from vfiomig.bench.cases import STREAMING, Case, Sweep
from vfiomig.errors import LocalIOError, ResourceLimitError, UsageError
from vfiomig.quantities import format_size
from vfiomig.simulator.url import parse_url

MEMORY, NOWHERE = "memory", "none"
_MOST_RUNS = 1000
# Ours: what a machine needs beside the states that fill its memory.
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """device: its name. size_bytes: of each simulated device, where its name does not
    say; None for the default.
    into: what receivers do with what they checked: MEMORY that is used again, NOWHERE, or the name
    of a device that loads it. against: the baseline that ratios are to, None if there is none.
    """

    device: str
    size_bytes: int | None
    default_size_bytes: int
    sweep: Sweep
    baselines: Sequence[Baseline]
    against: str | None
    runs: int
    directory: Path
    into: str = NOWHERE

    @property
    def is_made(self) -> bool:
        """Whether the devices are made for this run: simulated, in memory."""
        return self.device.startswith("sim:") and not parse_url(self.device).path

    @property
    def state_bytes(self) -> int | None:
        """The bytes of each device that is made here; None where the device decides."""
        if not self.is_made:
            return None
        given = parse_url(self.device).given
        if self.size_bytes is None and given.keys() & {"size", "profile"}:
            return None
        return self.size_bytes or self.default_size_bytes

    def check(self) -> None:
        """Raise for what cannot be, before anything is started. Raises MigrationError."""
        self.sweep.check()
        if not 1 <= self.runs <= _MOST_RUNS:
            raise UsageError(f"--runs {self.runs}: 1 to {_MOST_RUNS}")
        self._check_device()
        self._check_into()
        self._check_room()

    def _check_device(self) -> None:
        if not self.is_made:
            for option, differs in (
                ("--size", self.size_bytes is not None),
                ("--zeros", tuple(self.sweep.zeros) != (0,)),
                ("--devices", tuple(self.sweep.devices) != (1,)),
            ):
                if differs:
                    raise UsageError(f"{option} is for simulated devices in memory (sim:)")
            return
        given = parse_url(self.device).given
        for key, said in (("size", self.size_bytes), ("zeros", any(self.sweep.zeros))):
            if key in given and said:
                raise UsageError(f"--{key} is in {self.device} already")
        if self.size_bytes == 0:
            raise UsageError("--size: nothing to measure in 0 bytes")

    def _check_into(self) -> None:
        if self.into == NOWHERE:
            return
        if not STREAMING & set(self.sweep.sinks):
            raise UsageError("--into: none of these sinks has a receiver: pipe, unix and tcp have")
        if self.into == MEMORY:
            return
        if self.baselines:
            raise UsageError(
                f"--into {self.into}: only vfiomig can load a device", hint="--baselines none"
            )
        if max(self.sweep.devices) > 1:
            raise UsageError(f"--into {self.into}: it is one device; --devices must be 1")

    def _check_room(self) -> None:
        if not (os.path.isdir(self.directory) and os.access(self.directory, os.W_OK | os.X_OK)):
            raise LocalIOError(f"--dir: cannot make files in {self.directory}")
        size = self.state_bytes or 0
        devices = max(self.sweep.devices)
        files = len({"file", "durable"} & set(self.sweep.sinks))
        disk = os.statvfs(self.directory)
        if files and files * size * devices > disk.f_bavail * disk.f_frsize:
            what = f"{format_size(files * size * devices)} of files"
            raise LocalIOError(f"--dir: {self.directory} has no room for {what}")
        # Each zero share is a device of its own; each receiver may keep one state.
        needed = size * devices * (len(self.sweep.zeros) + 1) + _SPARE_BYTES
        if needed > (available := _available_bytes()):
            raise ResourceLimitError(
                f"this takes {format_size(needed)} of memory, and {format_size(available)} are"
                " available",
                hint="fewer --devices, fewer --zeros, or a smaller --size",
            )

    def cases(self) -> list[Case]:
        """Every case there is, vfiomig's first; not those that a baseline cannot do."""
        found = list(self.sweep.cases())
        for baseline in self.baselines:
            of_it = self.sweep.baseline_cases(baseline.name, hashes=baseline.hashes)
            found += [case for case in of_it if not baseline.cannot(case)]
        return found

    def device_name(self, zeros: int, number: int) -> str:
        """Return the name of a device with such a share of zeros. number: counts from 0."""
        if not self.is_made:
            return self.device
        given = parse_url(self.device).given
        added = {"size": self.state_bytes, "zeros": zeros or None, "seed": number + 1}
        pairs = [f"{key}={value}" for key, value in added.items() if key not in given and value]
        if not pairs:
            return self.device
        return self.device + ("&" if "?" in self.device else "?") + "&".join(pairs)


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62  # a kernel that does not say
