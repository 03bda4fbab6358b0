"""What one thread does to an open test device: one careless or hostile call after the other.

Nothing here looks at the outcome: the kernel must survive it, and the device be fit afterwards.
"""

import errno
import os
import random
import select
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from abuse import calls, settings
from abuse.calls import Memory
from kernel.migtest import MigTest
from vfiomig import uapi
from vfiomig.uapi import DeviceState, Feature

_VFIO_LAST, _IOMMU_LAST = uapi.VFIO_GET_API_VERSION + 30, uapi.VFIO_GET_API_VERSION + 50
_MOST_DATA_FDS = 8
# SET_IRQS and its relatives take lengths from their payload; BIND and others, descriptors.
_ODD_WORDS = (0, 1, 2, 4, 7, 8, 16, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_ODD_LONGS = (0, 1, 4096, 8192, 1 << 20, 1 << 32, 1 << 52, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
_LENGTHS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 4095, 4096, 4097, 70000, 200000)
_FEATURES = (*range(15), 0xFFFF)
_LEGACY_REGION = 9


@dataclass
class Victim:
    """A device that is open, for one thread. data_fds is shared with the other threads."""

    device: MigTest
    kind: str
    device_fd: int
    chance: random.Random
    memory: Memory = field(default_factory=Memory)
    data_fds: list[int] = field(default_factory=list)
    # What a read gave last, for writes that are not all rubbish.
    stream: bytes = b""

    def any_data_fd(self) -> int:
        """Return mostly that of the present session, sometimes a dead one, or no data_fd at all."""
        known = list(self.data_fds)
        if not known:
            return self.device_fd
        return known[-1] if self.chance.random() < 0.8 else self.chance.choice(known)

    def close_all(self) -> None:
        with suppress(IndexError):
            while True:
                _close(self.data_fds.pop())


def act(victim: Victim) -> None:
    """Do one thing."""
    known = _ACTIONS | (_ACTIONS_OF_V1 if victim.kind == "v1" else _ACTIONS_OF_V2)
    victim.chance.choices(list(known), list(known.values()))[0](victim)


def set_state(victim: Victim, state: int) -> int:
    """Ask for a state, and keep the data_fd if there is one. Returns the outcome."""
    arg = _feature(Feature.SET | Feature.MIG_DEVICE_STATE, struct.pack("=Ii", state, -1))
    at = victim.memory.good(arg)
    done = calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, at)
    if done == 0:
        _, data_fd = struct.unpack("=Ii", victim.memory.bytes_at(at + uapi.FEATURE.size, 8))
        if data_fd != -1:
            victim.data_fds.append(data_fd)
    return done


def read_some(victim: Victim, size: int) -> int:
    """Read from a data_fd into memory that can take it."""
    at = victim.memory.room(size)
    done = calls.read(victim.any_data_fd(), at, size)
    if done > 0:
        victim.stream = (victim.stream + victim.memory.bytes_at(at, done))[-400_000:]
    return done


def _feature(flags: int, payload: bytes, argsz: int | None = None) -> bytes:
    size = uapi.FEATURE.size + len(payload) if argsz is None else argsz
    return uapi.FEATURE.pack(size, flags) + payload


def _save(victim: Victim) -> None:
    """Save in pieces, as far as that goes in a second."""
    victim.stream, ends = b"", time.monotonic() + 1
    if victim.chance.random() < 0.5:
        set_state(victim, DeviceState.PRE_COPY)
        while read_some(victim, victim.chance.choice(_LENGTHS)) > 0 and time.monotonic() < ends:
            pass
    set_state(victim, DeviceState.STOP_COPY)
    while read_some(victim, 50_000) > 0 and time.monotonic() < ends:
        pass


def _load(victim: Victim) -> None:
    """Load what was saved last, in pieces, and commit it."""
    set_state(victim, DeviceState.RESUMING)
    stream, ends = victim.stream, time.monotonic() + 1
    while stream and time.monotonic() < ends:
        piece = stream[: victim.chance.choice((100, 4096, 50_000))]
        done = calls.write(victim.any_data_fd(), victim.memory.good(piece), len(piece))
        if done <= 0:
            break
        stream = stream[done:]
    set_state(victim, victim.chance.choice((DeviceState.STOP, DeviceState.RUNNING)))


def _drive_region(victim: Victim) -> None:
    """Use the legacy migration region as it is meant, though not in that order."""
    chance, memory, region = victim.chance, victim.memory, _LEGACY_REGION << 40
    size = chance.choice((0, 8, 16, 4096, 65536, 1 << 32))
    chance.choice(
        (
            lambda: _write_at(victim, region, chance.randrange(8), 4),
            lambda: calls.pread(victim.device_fd, memory.room(4), 4, region),
            lambda: [
                calls.pread(victim.device_fd, memory.room(8), 8, region + at) for at in (8, 16, 24)
            ],
            lambda: calls.pread(victim.device_fd, memory.room(65536), 65536, region + 4096),
            lambda: calls.pwrite(victim.device_fd, memory.room(65536), 65536, region + 4096),
            lambda: _write_at(victim, region + 24, size, 8),
        )
    )()


def _write_at(victim: Victim, offset: int, value: int, size: int) -> int:
    at = victim.memory.good(value.to_bytes(size, "little"))
    return calls.pwrite(victim.device_fd, at, size, offset)


def _change_state(victim: Victim) -> None:
    states = [*DeviceState, DeviceState.RUNNING, DeviceState.STOP_COPY, DeviceState.RESUMING]
    set_state(victim, victim.chance.choice(states))
    with suppress(IndexError):  # another thread was faster
        while len(victim.data_fds) > _MOST_DATA_FDS:
            _close(victim.data_fds.pop(0))


def _change_state_undeliverably(victim: Victim) -> None:
    """Ask for a state with memory that cannot take the answer."""
    payload = struct.pack("=Ii", victim.chance.randrange(10), -1)
    arg = _feature(Feature.SET | Feature.MIG_DEVICE_STATE, payload)
    at = victim.memory.cut(arg, victim.chance.randrange(len(arg)))
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, at)


def _any_feature(victim: Victim) -> None:
    chance = victim.chance
    direction = chance.choice((0, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x90000))
    payload = chance.randbytes(chance.choice((0, 4, 7, 8, 16, 24, 32, 64)))
    argsz = chance.choice((None, None, 0, 4, 8, 15, 16, 24, 40, 4096, (1 << 32) - 1))
    arg = _feature(chance.choice(_FEATURES) | direction, payload, argsz)
    calls.ioctl(_some_fd(victim), uapi.VFIO_DEVICE_FEATURE, _pointer(victim, arg))


def _any_vfio_ioctl(victim: Victim) -> None:
    chance = victim.chance
    request = chance.choice(
        (
            chance.randrange(uapi.VFIO_GET_API_VERSION, _VFIO_LAST),
            chance.randrange(uapi.VFIO_GET_API_VERSION, _IOMMU_LAST),
            chance.getrandbits(32),
        )
    )
    words = [chance.choice(_ODD_WORDS) for _ in range(16)]
    arg = struct.pack("=16I", *words)[: chance.choice((4, 8, 16, 24, 32, 64))]
    calls.ioctl(_some_fd(victim), request, _pointer(victim, arg))


def _ask_info(victim: Victim) -> None:
    """GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, with sizes and indexes that are odd or not."""
    chance = victim.chance
    request = chance.choice(range(uapi.VFIO_DEVICE_GET_INFO, uapi.VFIO_DEVICE_GET_INFO + 3))
    argsz = chance.choice((0, 15, 16, 24, 32, 33, 64, 4096, (1 << 32) - 1))
    index = chance.choice((0, 1, 7, 8, 9, 10, 255, (1 << 32) - 1))
    arg = struct.pack("=IIIIQQ", argsz, chance.choice(_ODD_WORDS), index, 0, 0, 0)
    calls.ioctl(victim.device_fd, request, _pointer(victim, arg))


def _set_irqs(victim: Victim) -> None:
    """VFIO_DEVICE_SET_IRQS: argsz, flags, index, start, count, then data."""
    words = [victim.chance.choice(_ODD_WORDS) for _ in range(5)]
    words[0] = victim.chance.choice((20, 24, 28, words[0]))
    arg = struct.pack("=5I", *words) + struct.pack("=3i", -1, 0, 10000)
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_GET_INFO + 3, _pointer(victim, arg))


def _reset(victim: Victim) -> None:
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_RESET, victim.chance.choice(_ODD_LONGS))


def _precopy_info(victim: Victim) -> None:
    chance = victim.chance
    argsz = chance.choice((24, 24, 24, 0, 23, 25, 4096, (1 << 32) - 1))
    arg = struct.pack("=IIQQ", argsz, chance.choice(_ODD_WORDS), 1, 2)
    at = _pointer(victim, arg)
    calls.ioctl(victim.any_data_fd(), uapi.VFIO_MIG_GET_PRECOPY_INFO, at)


def _read(victim: Victim) -> None:
    for _ in range(victim.chance.choice((1, 1, 5))):
        if read_some(victim, victim.chance.choice(_LENGTHS)) <= 0:
            return


def _read_badly(victim: Victim) -> None:
    size = victim.chance.choice(_LENGTHS)
    at = victim.chance.choice((victim.memory.bad(victim.chance), victim.memory.cut(b"x" * 99, 50)))
    calls.read(victim.any_data_fd(), at, size)
    if victim.chance.random() < 0.2:
        calls.read(victim.any_data_fd(), victim.memory.room(8), (1 << 63) - 1)


def _write(victim: Victim) -> None:
    chance = victim.chance
    size = chance.choice(_LENGTHS)
    data = victim.stream[:size] if chance.random() < 0.7 else chance.randbytes(size)
    if data and chance.random() < 0.2:
        at = chance.randrange(len(data))
        data = data[:at] + chance.randbytes(1) + data[at + 1 :]
    calls.write(victim.any_data_fd(), victim.memory.good(data), len(data))
    victim.stream = victim.stream[size:] if chance.random() < 0.7 else victim.stream


def _write_badly(victim: Victim) -> None:
    at = victim.chance.choice((victim.memory.bad(victim.chance), victim.memory.cut(b"x" * 99, 50)))
    calls.write(victim.any_data_fd(), at, victim.chance.choice(_LENGTHS))


def _misuse_file(victim: Victim) -> None:
    """Treat a data_fd, or the device, as a file of another kind."""
    fd, chance = _some_fd(victim), victim.chance
    chance.choice(
        (
            lambda: os.lseek(fd, chance.choice((0, 1, 4096, 1 << 40)), chance.randrange(5)),
            lambda: os.pread(fd, 100, chance.choice((0, 1 << 40))),
            lambda: os.pwrite(fd, b"x" * 100, chance.choice((0, 1 << 40))),
            lambda: os.readv(fd, [bytearray(3), bytearray(0), bytearray(5000)]),
            lambda: os.writev(fd, [b"x" * 3, b"", b"y" * 100]),
            lambda: os.ftruncate(fd, 0),
            lambda: os.fsync(fd),
            lambda: os.fchmod(fd, 0o777),
            lambda: os.stat(f"/proc/self/fd/{fd}"),
            lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)),
            lambda: os.read(_fdinfo(fd), 4096),
        )
    )()


def _move(victim: Victim) -> None:
    """Splice and its relatives, from and to a data_fd or the device."""
    fd, chance = _some_fd(victim), victim.chance
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        os.write(write_end, b"x" * 1000)
        chance.choice(
            (
                lambda: os.splice(fd, write_end, 4096),
                lambda: os.splice(read_end, fd, 4096),
                lambda: os.sendfile(write_end, fd, None, 4096),
                lambda: os.sendfile(fd, read_end, None, 4096),
                lambda: os.copy_file_range(fd, fd, 4096),
            )
        )()
    finally:
        os.close(read_end)
        os.close(write_end)


def _wait_for(victim: Victim) -> None:
    fd = _some_fd(victim)
    poll = select.poll()
    poll.register(fd, victim.chance.choice((select.POLLIN, select.POLLOUT, 0x3FFF)))
    poll.poll(1)
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        epoll.poll(0.001)


def _change_flags(victim: Victim) -> None:
    os.set_blocking(_some_fd(victim), victim.chance.random() < 0.5)


def _map(victim: Victim) -> None:
    chance = victim.chance
    region = chance.choice((0, 0, 1, 7, 9, 9, 10))
    offset = (region << 40) + chance.choice((0, 4096, 4096, 65536, 1 << 30))
    size = chance.choice((4096, 8192, 65536, 1 << 24))
    calls.map_and_touch(_some_fd(victim), size, offset, write=chance.random() < 0.5)


def _access_region(victim: Victim) -> None:
    """Read or write a region: odd sizes, odd offsets, and the registers of the legacy protocol."""
    chance = victim.chance
    region = chance.choice((0, 0, 0, 1, 7, 8, 9, 9, 9, 10, 255))
    within = chance.choice((0, 0, 1, 4, 8, 16, 24, 0x20, 0x28, 0x30, 4088, 4095, 4096, 8192, -8))
    size = chance.choice((1, 2, 3, 4, 8, 8, 8, 16, 4096, 65536))
    offset = min((region << 40) + within, (1 << 63) - 1)
    if chance.random() < 0.5:
        at = _pointer(victim, b"", size)
        calls.pread(victim.device_fd, at, size, offset)
    else:
        word = chance.choice((0, 1, 2, 3, 4, 6, 7, *_ODD_LONGS))
        data = word.to_bytes(8, "little").ljust(size, b"\x5a")[:size]
        calls.pwrite(victim.device_fd, _pointer(victim, data), size, offset)


def _log_start(victim: Victim) -> None:
    chance = victim.chance
    count = chance.choice((0, 1, 2, 3, 17, 256, 257))
    ranges = b"".join(struct.pack("=QQ", *_range(chance, number)) for number in range(count))
    memory = victim.memory
    # The ranges far from the request, which is put at the begin of the same room.
    at = memory.room(calls.PAGE * 32) if chance.random() < 0.9 else memory.bad(chance)
    if at != 0 and at == memory.room(calls.PAGE * 32):
        memory.put(at, ranges)
    page_size = chance.choice((4096, 4096, 65536, 0, 1, 3, 1 << 30, 1 << 63))
    number = chance.choice((count, count, count, (1 << 32) - 1))
    payload = struct.pack("=QIIQ", page_size, number, chance.choice((0, 0, 1)), at)
    arg = _feature(Feature.SET | 6, payload)
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, _pointer(victim, arg))


def _log_stop(victim: Victim) -> None:
    arg = _feature(Feature.SET | 7, b"")
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, _pointer(victim, arg))


def _log_report(victim: Victim) -> None:
    chance = victim.chance
    iova, length = _range(chance, 0)
    page_size = chance.choice((4096, 4096, 65536, 0, 3, 1 << 30))
    # A bitmap of at most 248 KiB, or one that ends too early.
    at = victim.memory.room(calls.PAGE * 32) if chance.random() < 0.8 else 0
    payload = struct.pack("=QQQQ", iova, length, page_size, at or victim.memory.bad(chance))
    arg = _feature(Feature.GET | 8, payload)
    calls.ioctl(victim.device_fd, uapi.VFIO_DEVICE_FEATURE, _pointer(victim, arg))


def _range(chance: random.Random, number: int) -> tuple[int, int]:
    if chance.random() < 0.7:
        return (number * 4 + chance.randrange(4)) << 16, chance.choice((4096, 1 << 16, 3 << 16))
    return chance.choice(_ODD_LONGS), chance.choice(_ODD_LONGS)


def _mark_dirty(victim: Victim) -> None:
    iova, length = _range(victim.chance, 0)
    victim.device.set("dirty", f"{iova:#x} {length:#x}")


def _look(victim: Victim) -> None:
    names = [*settings.READABLE, *settings.shapes_of(victim.kind)]
    victim.device.get(victim.chance.choice(names))


def _set_something(victim: Victim) -> None:
    """Set what may be set while it is open, or what may not, or nonsense."""
    chance, device = victim.chance, victim.device
    names = sorted(settings.shapes_of(victim.kind))
    name = chance.choice(names)
    chance.choice(
        (
            lambda: device.set("fault", settings.fault(chance)),
            lambda: device.set("fault", "clear"),
            lambda: device.set("deviation", settings.deviations(chance)),
            lambda: device.set("deviation", ""),
            lambda: device.set(name, chance.choice(settings.shapes_of(victim.kind)[name])),
            lambda: write_rubbish(device, victim.kind, chance),
        )
    )()


def write_rubbish(device: MigTest, kind: str, chance: random.Random) -> None:
    """Write into a setting what it does not mean."""
    names = sorted([*settings.shapes_of(kind), "fault", "deviation", "dirty", "digest", "state"])
    file = device.path / chance.choice(names)
    fd = os.open(file, os.O_WRONLY)
    try:
        os.write(fd, settings.rubbish(chance))
    finally:
        os.close(fd)


def _close_one(victim: Victim) -> None:
    with suppress(IndexError):
        _close(victim.data_fds.pop(victim.chance.randrange(_MOST_DATA_FDS)))


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as err:
        # Another thread was faster.
        if err.errno != errno.EBADF:
            raise


def _fdinfo(fd: int) -> int:
    return os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY)


def _some_fd(victim: Victim) -> int:
    return victim.chance.choice((victim.device_fd, victim.any_data_fd()))


def _pointer(victim: Victim, arg: bytes, size: int = 0) -> int:
    """Return a pointer to arg: mostly good, sometimes to a part of it, sometimes not at all."""
    where = victim.chance.random()
    if where < 0.8:
        return victim.memory.good(arg.ljust(size, b"\0"))
    if where < 0.9:
        return victim.memory.cut(arg, victim.chance.randrange(len(arg) + 1))
    return victim.memory.bad(victim.chance)


_ACTIONS: dict[Callable[[Victim], None], int] = {
    _any_feature: 8,
    _any_vfio_ioctl: 8,
    _ask_info: 5,
    _set_irqs: 2,
    _reset: 4,
    _misuse_file: 5,
    _move: 3,
    _wait_for: 3,
    _change_flags: 1,
    _map: 3,
    _access_region: 15,
    _log_start: 5,
    _log_stop: 2,
    _log_report: 5,
    _mark_dirty: 3,
    _look: 6,
    _set_something: 6,
    _close_one: 3,
}
_ACTIONS_OF_V2: dict[Callable[[Victim], None], int] = {
    _save: 10,
    _load: 10,
    _change_state: 25,
    _change_state_undeliverably: 2,
    _precopy_info: 8,
    _read: 20,
    _read_badly: 4,
    _write: 20,
    _write_badly: 4,
}
_ACTIONS_OF_V1: dict[Callable[[Victim], None], int] = {
    _drive_region: 60,
    _change_state: 2,
    _read_badly: 1,
}
