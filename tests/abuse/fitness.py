"""Whether a device, and the kernel, are fit after what was done to them."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abuse import settings
from abuse.children import FoundError
from kernel import migtest
from kernel.migtest import MigTest
from vfiomig import LoadOptions, SaveOptions, ioctl, load, save
from vfiomig.backends import kernel
from vfiomig.fd import OwnedFd
from vfiomig.sysfs import find
from vfiomig.uapi import DeviceState
from vm.guest import REPORT

_KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
_NAME = "vfiomig_test"


@contextmanager
def made(chance: random.Random, kind: str, **fixed: int | str) -> Iterator[MigTest]:
    """Make a device of some shape; afterwards, check that it is fit, and remove it."""
    device = migtest.create(kind)
    for name, value in (settings.shape(chance, kind) | fixed).items():
        with suppress(OSError):  # some shapes exclude each other
            device.set(name, value)
    yield device
    check_fit(device, kind)
    device.remove()
    if device.path.exists():
        raise FoundError(f"{device.uuid} is still there after its removal")


@contextmanager
def opened(device: MigTest) -> Iterator[int]:
    """Open a device, whatever it can. Yields its descriptor."""
    ops = kernel.open_ops(find(device.uuid))
    try:
        yield ops.fileno()
    finally:
        ops.close()


def check_fit(device: MigTest, kind: str) -> None:
    """Check that it can be reset, saved and loaded, and that what is loaded is what was saved."""
    device.set("fault", "clear")
    device.set("deviation", "")
    with opened(device) as device_fd:
        reset(device_fd)
    if device.state is not DeviceState.RUNNING:
        raise FoundError(f"after a reset it is in {device.state.name}")
    _make_plain(device, kind)
    with OwnedFd(os.memfd_create("state")) as file:
        with device.opened() as source:
            save(source.device, file.fileno(), SaveOptions())
        wanted = device.contents
        device.set("seed", 99)
        if device.contents == wanted:
            raise FoundError("with another seed it holds the same")
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        with device.opened() as destination:
            load(file.fileno(), destination.device, LoadOptions())
            if device.contents != wanted:
                raise FoundError(f"loaded {device.contents}, saved {wanted}")


def reset(device_fd: int) -> None:
    """Reset a device by the bare ioctl."""
    ioctl.reset_device(device_fd)


def _make_plain(device: MigTest, kind: str) -> None:
    """Give it the shape of a new device, but for its size."""
    new = migtest.create(kind)
    plain = {name: new.get(name) for name in settings.shapes_of(kind)}
    new.remove()
    # Limits that exclude each other on the way are set in the second go.
    for _ in range(2):
        for name, value in plain.items():
            with suppress(OSError):
                device.set(name, value)
    for name, value in plain.items():
        if device.get(name) != value:
            raise FoundError(f"{name} says {device.get(name)!r} and not {value!r}")
    device.set("state_bytes", 20000)


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def check(self) -> None:
        """Raise FoundError when it has reported a bug."""
        found = [text for text in self._new() if REPORT.match(text)]
        if found:
            raise FoundError(f"the kernel says: {found[0]}")

    def _new(self) -> Iterator[str]:
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # EPIPE: overwritten before it was read; the console has it
            # priority, number, time and flags stand before the semicolon.
            yield record.decode(errors="replace").partition(";")[2]


def check_leaks() -> None:
    """Raise FoundError for memory of the driver that nobody can free any more."""
    if not _KMEMLEAK.exists():
        return
    # The first scan may take what is in a register or on a stack for lost.
    for _ in range(2):
        _KMEMLEAK.write_text("scan")
    leaks = _KMEMLEAK.read_text(errors="replace").split("unreferenced object")
    if ours := [leak for leak in leaks if _NAME in leak]:
        raise FoundError(f"{len(ours)} allocations are lost, as this one:{ours[0]}")
