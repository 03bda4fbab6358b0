"""Rounds in which, at every point in turn, an allocation or a copy of user memory fails.

Only those of the driver have their turn. Documentation/fault-injection: the n-th such point after a
write of n to fail-nth fails, once, and in this thread only; a read tells what is left, so nothing
left means that it came to that.
"""

import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from abuse import actions, calls
from abuse.actions import Victim
from abuse.children import FoundError, Tell, start
from abuse.fitness import check_fit, made, opened, reset
from kernel import migtest
from kernel.migtest import DEVICES, PARENT, MigTest
from vfiomig import MigrationError, uapi
from vfiomig.uapi import DeviceState, Feature

_POINTS_MOST = 150
_DEBUGFS = Path("/sys/kernel/debug")
_UUID = "5a5a0000-0000-4000-8000-00000000fa11"


def is_possible() -> bool:
    """Whether this kernel can let them fail."""
    return (_DEBUGFS / "failslab").exists() and (_DEBUGFS / "fail_usercopy").exists()


def _prepare() -> None:
    """Let fail what the driver itself asks for, and say nothing about it.

    Not what makes a group: there vfio_group_release() warns of itself (drivers/vfio/group.c, 6.12).
    """
    (line,) = re.findall(r"^vfiomig_test (\d+) .* (0x[0-9a-f]+)", _read("/proc/modules"), re.M)
    size, base = int(line[0]), int(line[1], 16)
    symbols = re.findall(r"^([0-9a-f]+) [tT] (\w+)$", _read("/proc/kallsyms"), re.M)
    (group,) = (int(at, 16) for at, name in symbols if name == "vfio_create_group")
    behind = min(int(at, 16) for at, _ in symbols if int(at, 16) > group)
    for kind in ("failslab", "fail_usercopy"):
        for name, address in (
            ("require-start", base),
            ("require-end", base + size),
            ("reject-start", group),
            ("reject-end", behind),
        ):
            (_DEBUGFS / kind / name).write_text(f"{address:#x}")
        (_DEBUGFS / kind / "verbose").write_text("0")
    # Nearly all allocations may wait; by default those do not fail.
    (_DEBUGFS / "failslab/ignore-gfp-wait").write_text("N")


def _read(file: str) -> str:
    return Path(file).read_text()


def starved(chance: random.Random) -> None:
    """One request fails at each point it has, and the device is fit after each of them."""
    _prepare()
    with made(chance, kind := chance.choice(("v2", "v2", "v1"))) as device:

        def work(_tell: Tell) -> None:
            with opened(device) as device_fd:
                victim = Victim(device, kind, device_fd, chance)
                for request in chance.sample(_REQUESTS, 4):
                    _starve(request, victim)

        start(work).wait()


def stillborn(chance: random.Random) -> None:
    """The making of a device fails at each point it has; and so does its opening."""
    _prepare()
    device = MigTest(_UUID)
    kind = chance.choice(migtest.KINDS)
    create = PARENT / f"mdev_supported_types/vfiomig_test-{kind}/create"

    def work(_tell: Tell) -> None:
        fd = os.open(create, os.O_WRONLY)
        for _ in _failing(lambda: os.write(fd, _UUID.encode())):
            # Some points are of no consequence.
            if (DEVICES / _UUID).exists():
                _check_alive(device)
                device.remove()
        os.close(fd)
        device.remove()
        migtest.create(kind, _UUID)

        def open_it() -> None:
            with opened(device):
                pass

        for _ in _failing(open_it):
            pass
        check_fit(device, kind)

    start(work).wait(120)
    device.remove()


def _check_alive(device: MigTest) -> None:
    with opened(device) as device_fd:
        reset(device_fd)
    if device.state is not DeviceState.RUNNING or int(device.digest, 16) == 0:
        raise FoundError("a device that was made is not there")


def _starve(request: Callable[[Victim], Callable[[], object]], victim: Victim) -> None:
    call = request(victim)
    for _ in _failing(call):
        victim.close_all()
        reset(victim.device_fd)
        if (state := victim.device.state) is not DeviceState.RUNNING:
            raise FoundError(f"after a reset it is in {state.name}")
        call = request(victim)


def _failing(call: Callable[[], object]) -> Iterator[int]:
    """Make the call with its n-th point failing, and yield n, until it has none left."""
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    try:
        for number in range(1, _POINTS_MOST):
            os.write(fd, b"%d" % number)
            with suppress(OSError, MemoryError, MigrationError):
                call()
            came_to_it = _left(fd) == 0
            yield number
            if not came_to_it:
                return
    finally:
        os.close(fd)


def _left(fd: int) -> int:
    """Return what is left, and have nothing fail any more."""
    try:
        left = int(os.pread(fd, 32, 0))
    except OSError:
        return 1  # this very copy was the point
    while True:
        with suppress(OSError):
            os.write(fd, b"0")
            return left


def _enter(state: DeviceState) -> Callable[[Victim], Callable[[], object]]:
    return lambda victim: lambda: actions.set_state(victim, state)


def _get(name: str) -> Callable[[Victim], Callable[[], object]]:
    return lambda victim: lambda: victim.device.get(name)


def _set(name: str, value: str) -> Callable[[Victim], Callable[[], object]]:
    return lambda victim: lambda: victim.device.set(name, value)


def _reading(victim: Victim) -> Callable[[], object]:
    actions.set_state(victim, DeviceState.STOP_COPY)
    return lambda: actions.read_some(victim, 20000)


def _writing(victim: Victim) -> Callable[[], object]:
    actions.set_state(victim, DeviceState.STOP_COPY)
    victim.stream = b""
    while actions.read_some(victim, 20000) > 0:
        pass
    victim.close_all()
    actions.set_state(victim, DeviceState.RESUMING)
    at = victim.memory.good(victim.stream)
    return lambda: calls.write(victim.any_data_fd(), at, len(victim.stream))


def _committing(victim: Victim) -> Callable[[], object]:
    _writing(victim)()
    return lambda: actions.set_state(victim, DeviceState.RUNNING)


def _asking(victim: Victim) -> Callable[[], object]:
    actions.set_state(victim, DeviceState.PRE_COPY)
    arg = victim.memory.good(uapi.PRECOPY_INFO.pack(uapi.PRECOPY_INFO.size, 0, 0, 0))
    return lambda: calls.ioctl(victim.any_data_fd(), uapi.VFIO_MIG_GET_PRECOPY_INFO, arg)


def _logging(victim: Victim) -> Callable[[], object]:
    """Start the log, mark something, have it reported, and stop."""
    memory = victim.memory
    ranges = memory.room(calls.PAGE * 33)
    memory.put(ranges, struct.pack("=4Q", 0, 1 << 20, 1 << 30, 1 << 20))
    start_log = struct.pack("=QIIQ", 4096, 2, 0, ranges)
    report = struct.pack("=QQQQ", 0, 1 << 20, 4096, memory.room(calls.PAGE * 33))

    def log() -> None:
        for flags, payload in (
            (Feature.SET | 6, start_log),
            (None, b""),
            (Feature.GET | 8, report),
            (Feature.SET | 7, b""),
        ):
            if flags is None:
                with suppress(OSError):
                    victim.device.set("dirty", "0x3000 0x9000")
            else:
                arg = uapi.FEATURE.pack(uapi.FEATURE.size + len(payload), flags) + payload
                calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, memory.good(arg))

    return log


def _region(victim: Victim) -> Callable[[], object]:
    at = victim.memory.room(4096)
    offset = (9 << 40) if victim.kind == "v1" else 0
    return lambda: [calls.pread(victim.device_fd, at, 8, offset + n) for n in (0, 8, 16, 24)]


_REQUESTS: list[Callable[[Victim], Callable[[], object]]] = [
    *(_enter(state) for state in DeviceState),
    *map(_get, ("digest", "held_bytes", "fault", "deviation", "state")),
    _set("fault", "read 5 errno 5"),
    _set("deviation", "no-fd sticky-log"),
    _reading,
    _writing,
    _committing,
    _asking,
    _logging,
    _region,
]
