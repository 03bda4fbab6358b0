"""What is measured: a sweep is a product of lists, and a case is one cell of it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vfiomig.errors import UsageError
from vfiomig.framing.native import MAX_FRAME_BYTES
from vfiomig.options import DEFAULT_RING_SLOTS, MAX_RING_SLOTS, MIN_BUFFER_BYTES

OWN = "vfiomig"
# What QEMU reads at a time (hw/vfio/migration.c), and where the tools are at their best.
BASELINE_BUFFER_BYTES = 1 << 20
SINKS = ("null", "file", "durable", "pipe", "unix", "tcp")
# Bytes arrive at somebody else while they are sent: a receiver takes part.
STREAMING = frozenset({"pipe", "unix", "tcp"})
FRAMINGS = ("native", "qemu")
# Ours: a bound for slips of the finger, not a limit of anything.
_MOST_DEVICES = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One combination. program: OWN, or the name of a baseline, whose framing is its own.

    buffer_bytes: None is automatic. zeros: percent of the device's state. devices: so many at once.
    """

    program: str
    sink: str
    buffer_bytes: int | None = None
    ring_slots: int = DEFAULT_RING_SLOTS
    framing: str = "native"
    checksum: bool = True
    zeros: int = 0
    devices: int = 1

    @property
    def is_own(self) -> bool:
        """Whether vfiomig itself runs."""
        return self.program == OWN

    @property
    def setting(self) -> tuple[str, int, int]:
        """What a baseline must have in common with a case to be compared with it."""
        return self.sink, self.zeros, self.devices

    @property
    def label(self) -> str:
        """The program, and what about the case is not the default."""
        words = [self.program]
        if self.is_own:
            words += [self.framing] * (self.framing != "native")
            words += [f"ring{self.ring_slots}"] * (self.ring_slots != DEFAULT_RING_SLOTS)
            words += ["nosum"] * (not self.checksum)
        elif self.checksum:
            words.append("xxh3")
        words += [f"zeros{self.zeros}"] * bool(self.zeros)
        words += [f"x{self.devices}"] * (self.devices > 1)
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The lists. check() says what is wrong with them."""

    sinks: Sequence[str]
    buffers: Sequence[int | None]
    rings: Sequence[int] = (DEFAULT_RING_SLOTS,)
    framings: Sequence[str] = ("native",)
    checksums: Sequence[bool] = (True,)
    zeros: Sequence[int] = (0,)
    devices: Sequence[int] = (1,)

    def check(self) -> None:
        """Raise UsageError for what is unknown, out of range, there twice, or cannot be."""
        _check_list("--sink", self.sinks, SINKS)
        _check_list("--framing", self.framings, FRAMINGS)
        _check_list("--checksum", self.checksums, (True, False))
        sizes = range(MIN_BUFFER_BYTES, MAX_FRAME_BYTES + 1)
        _check_list("--buffer", self.buffers, sizes, "auto, or 4K to 128M", also=None)
        _check_list("--ring", self.rings, range(1, MAX_RING_SLOTS + 1), f"1 to {MAX_RING_SLOTS}")
        _check_list("--zeros", self.zeros, range(101), "0 to 100 (percent)")
        _check_list("--devices", self.devices, range(1, _MOST_DEVICES + 1), f"1 to {_MOST_DEVICES}")
        if False in self.checksums and "qemu" not in self.framings:
            raise UsageError(
                "--checksum off: native framing always carries its checksums",
                hint="--framing qemu has none",
            )

    def cases(self) -> Iterator[Case]:
        """Every combination of vfiomig that can be: native framing always has its checksum."""
        product = itertools.product(
            self.sinks,
            self.zeros,
            self.devices,
            self.framings,
            self.checksums,
            self.rings,
            self.buffers,
        )
        for sink, zeros, devices, framing, checksum, ring, buffer_bytes in product:
            if checksum or framing == "qemu":
                yield Case(OWN, sink, buffer_bytes, ring, framing, checksum, zeros, devices)

    def baseline_cases(self, name: str, *, hashes: bool) -> Iterator[Case]:
        """What a baseline is measured on: each setting, and with its checksum where it has one."""
        slots = DEFAULT_RING_SLOTS if hashes else 1
        case = Case(name, "", BASELINE_BUFFER_BYTES, slots, framing="", checksum=False)
        checksums = self.checksums if hashes else (False,)
        product = itertools.product(self.sinks, self.zeros, self.devices, checksums)
        for sink, zeros, devices, checksum in product:
            yield replace(case, sink=sink, zeros=zeros, devices=devices, checksum=checksum)


def _check_list(
    option: str,
    values: Sequence[object],
    allowed: Iterable[object],
    spoken: str = "",
    also: object = ...,
) -> None:
    said = spoken or ", ".join(map(str, allowed))
    if not values:
        raise UsageError(f"{option} is empty: {said}")
    for value in values:
        # In this order: to look for None in a range is to walk through it.
        if value is not also and value not in allowed:
            raise UsageError(f"{option}: {value} is not possible: {said}")
    if len(set(values)) != len(values):
        raise UsageError(f"{option}: a value is there twice")
