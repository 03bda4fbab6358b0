"""What vfiomig is compared with: programs that only copy, found on this machine.

Each reads the device's data_fd as its standard input. The C programs (benchmarks/programs) also
receive; what the others send is received by a loop that counts.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiomig.bench.cases import STREAMING, Case
from vfiomig.errors import UsageError

_COPYFILEOBJ = (
    "import shutil, sys\n"
    "with open(0, 'rb') as source, open(1, 'wb') as sink:\n"
    "    shutil.copyfileobj(source, sink, int(sys.argv[1]))"
)
# mbuffer wants at least five blocks.
_MBUFFER_BLOCKS = 8
_C_PROGRAMS = ("qemu_like", "plain_ring")
# The first of these that is there is what ratios are to, unless told otherwise.
PREFERRED = ("qemu_like", "dd", "cat")


def _dd(size: int, case: Case) -> list[str]:
    direct = ["oflag=direct"] if case.sink == "durable" else []
    return [f"bs={size}", "status=none", *direct]


# What follows the program's name.
_WORDS: dict[str, Callable[[int, Case], list[str]]] = {
    "dd": _dd,
    "cat": lambda size, case: [],
    "cp": lambda size, case: ["/dev/stdin"],  # the sender adds the file
    "socat": lambda size, case: ["-u", f"-b{size}", "STDIN", "STDOUT"],
    "pv": lambda size, case: ["-q", "-B", str(size)],
    "mbuffer": lambda size, case: ["-q", "-s", str(size), "-m", str(_MBUFFER_BLOCKS * size)],
    "copyfileobj": lambda size, case: ["-I", "-S", "-c", _COPYFILEOBJ, str(size)],
}
NAMES = (*_C_PROGRAMS, *_WORDS)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A program that was found. figures: it prints its own, and has a receiver of its own."""

    name: str
    path: str

    @property
    def figures(self) -> bool:
        """Whether it is one of our C programs."""
        return self.name in _C_PROGRAMS

    @property
    def hashes(self) -> bool:
        """Whether it can compute vfiomig's checksum on the way."""
        return self.name == "plain_ring"

    @property
    def names_its_file(self) -> bool:
        """Whether it opens the file itself, by the name that is its last word."""
        return self.name == "cp"

    def cannot(self, case: Case) -> str:
        """Return why it cannot do a case, or ""."""
        if self.names_its_file and (case.sink in STREAMING or case.sink == "null"):
            return "cp copies to files only"
        return ""

    def send_words(self, case: Case) -> list[str]:
        """Return its argv: it reads descriptor 0, and writes to 1, or to 3 if it prints figures."""
        size = case.buffer_bytes or 0
        if not self.figures:
            return [self.path, *_WORDS[self.name](size, case)]
        words = [self.path, "send", "--src", "fd:0", "--dst", "fd:3", "--buffer", str(size)]
        words += ["--checksum"] * case.checksum
        if case.sink == "durable":
            words += ["--sync"] + ["--direct"] * self.hashes  # qemu_like's frames are not aligned
        return words

    def receive_words(self, case: Case, *, keeping: bool) -> list[str]:
        """Return its argv as a receiver of descriptor 0, which writes to 3 if keeping."""
        words = [self.path, "recv", "--src", "fd:0", "--dst", "fd:3" if keeping else "null"]
        return [*words, "--buffer", str(case.buffer_bytes)]


def find_baselines(wanted: str, programs: Path | None) -> list[Baseline]:
    """Return what there is. wanted: auto (all), none, or names in a list, which must be there.

    The C programs are looked for in programs, else on PATH. Raises UsageError.
    """
    if programs is not None and not os.path.isdir(programs):
        raise UsageError(f"--programs: {programs} is no directory")
    if wanted == "none":
        return []
    names = NAMES if wanted == "auto" else _named(wanted)
    found = [Baseline(name, path) for name in names if (path := _path_of(name, programs))]
    missing = sorted(set(names) - {baseline.name for baseline in found})
    if missing and wanted != "auto":
        hint = "make bench-programs builds the C programs: --programs benchmarks/build"
        raise UsageError(f"--baselines: not on this machine: {', '.join(missing)}", hint=hint)
    return found


def chosen(baselines: Sequence[Baseline], wanted: str | None) -> str | None:
    """Return the name of what ratios are to; None when there is nothing. Raises UsageError."""
    names = [baseline.name for baseline in baselines]
    if wanted is not None and wanted not in names:
        raise UsageError(f"--against {wanted}: it is not among the baselines: {', '.join(names)}")
    return wanted or next((name for name in PREFERRED if name in names), next(iter(names), None))


def _named(wanted: str) -> list[str]:
    names = wanted.split(",")
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--baselines: there is no {name!r}: {', '.join(NAMES)}")
    if len(set(names)) != len(names):
        raise UsageError("--baselines: a name is there twice")
    return names


def _path_of(name: str, programs: Path | None) -> str | None:
    if name == "copyfileobj":
        return sys.executable
    if name in _C_PROGRAMS and programs is not None:
        return shutil.which(name, path=os.fspath(programs.absolute()))
    return shutil.which(name)
