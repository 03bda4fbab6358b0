"""The settings of the test device (driver/README.md): values that are meant, and rubbish."""

import random

from kernel.migtest import KINDS


def _words(text: str) -> list[str]:
    return text.split()


# What is answered, to a read at any time.
READABLE = ("digest", "held_bytes", "opens", "arcs", "state", "fault", "deviation")
DEVIATIONS = _words(
    "no-fd second-fd precopy-fd illegal-accepted error-settable restless forgetful eof-again"
    " early-eof info-anywhere reinit-unasked undead-fd reset-no-run reset-keeps-fd seekable"
    " overwrite lost-write write-after-error sticky-log log-twice log-overlap"
)
SIZES = (0, 1, 63, 64, 65, 4095, 4096, 4097, 70000, 300001)
SHAPES: dict[str, tuple[int | str, ...]] = {
    "capabilities": (7, 7, 7, 5, 3, 1, 0),
    "state_bytes": SIZES,
    "seed": (0, 1, (1 << 64) - 1),
    "zero_percent": (0, 50, 100),
    "initial_bytes": (0, 1, 4096, 50000),
    "dirty_bytes_per_s": (0, 4096, 1 << 20, 1 << 40),
    "drained": ("ENOMSG", "0"),
    "reinit_at": (0, 1, 2),
    "bytes_per_s": (0, 0, 1 << 20, 1 << 16),
    "latency_us": (0, 0, 500, 20000),
    "read_most": (0, 0, 1, 1000),
    "write_most": (0, 0, 1, 1000),
    "poll": (0, 1),
    "nonblock": (0, 1),
    "reported_bytes": ("true", 0, (1 << 64) - 1),
    "check": ("none", "write", "commit"),
    "keeps_state": (0, 1),
    "reset_flag": (0, 1),
    "log_ranges_most": (1, 16),
    "log_page_min": (4096, 65536),
    "log_page_max": (65536, 1 << 21),
}
SHAPES_OF_V1: dict[str, tuple[int | str, ...]] = {
    "region_data_bytes": (4096, 65536),
    "region_mmap": (0, 1),
}
HOOKS = _words("read write arc enter entered get size info reset log_start log_report log_stop")
RUBBISH = (
    "",
    "\n",
    " ",
    "-1",
    "0x",
    "abc",
    "1 2 3",
    "99999999999999999999",
    "18446744073709551616",
    "\0\0\0",
    "\xff\xfe",
    "read",
    "read 0",
    "read 0 errno",
    "read 0 errno 99999",
    "read 0 errno -5",
    "arc 1 hang 99999999999999",
    "nowhere 0 errno 5",
    "clear clear",
    "x" * 4095,
    "no-fd " * 600,
    "%s%n%p",
)


def shapes_of(kind: str) -> dict[str, tuple[int | str, ...]]:
    assert kind in KINDS
    return SHAPES | (SHAPES_OF_V1 if kind == "v1" else {})


def fault(chance: random.Random) -> str:
    """Return a fault that the driver takes. Nothing hangs for longer than a second."""
    hook = chance.choice(HOOKS)
    at = {"read": SIZES, "write": SIZES, "arc": range(1, 9), "enter": range(8), "entered": range(8)}
    argument = chance.choice(at.get(hook, (0,)))
    action, value = chance.choice(
        (
            ("errno", chance.choice((1, 4, 5, 11, 12, 16, 22, 42, 110, 133))),
            ("error", 5),
            ("reset", 0),
            ("hang", chance.choice((1, 50, 1000))),
        )
    )
    count = chance.choice(("", " 1", " 3"))
    return f"{hook} {argument} {action} {value}{count}"


def deviations(chance: random.Random) -> str:
    """Return some rules to break."""
    return " ".join(chance.sample(DEVIATIONS, chance.randint(1, 4)))


def shape(chance: random.Random, kind: str) -> dict[str, int | str]:
    """Return a few settings to make a device with."""
    shapes = shapes_of(kind)
    names = chance.sample(sorted(shapes), chance.randint(0, 6))
    return {name: chance.choice(shapes[name]) for name in names}


def rubbish(chance: random.Random) -> bytes:
    """Return what no setting means."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.choice((1, 7, 100, 4000)))
    return chance.choice(RUBBISH).encode("latin-1")
