"""Rounds in which the device, or the whole module, goes away under its users."""

import os
import random
import time
import uuid
from contextlib import suppress
from errno import EAGAIN, EBUSY

from abuse import actions, calls
from abuse.actions import Victim
from abuse.children import END_S, Child, FoundError, Tell, Work, start
from abuse.fitness import check_fit, opened
from kernel import migtest
from kernel.migtest import MODULE, MigTest
from vfiomig.uapi import DeviceState

_NAME = "vfiomig_test"
_BUSY = (-EBUSY, -EAGAIN)
_SESSIONS = (DeviceState.PRE_COPY, DeviceState.STOP_COPY, DeviceState.RESUMING)


def removed(chance: random.Random) -> None:
    """It is removed while it is open; the owner goes on, and closes it or is killed."""
    device = migtest.create(chance.choice(("v2", "v2", "v1")))

    def own(tell: Tell) -> None:
        with opened(device) as device_fd:
            victim = Victim(device, "v2", device_fd, chance)
            actions.set_state(victim, chance.choice(list(DeviceState)))
            tell()
            ends = time.monotonic() + 1
            while time.monotonic() < ends:
                with suppress(OSError):
                    actions.act(victim)

    owner = start(own)
    owner.wait_for_word()
    remover = start(lambda _: device.remove())
    if chance.random() < 0.5:
        time.sleep(chance.random() / 2)
        owner.kill()
    else:
        owner.wait()
    remover.must_end("the removal of a device that nobody has open any more")
    if device.path.exists():
        raise FoundError("it is still there after its removal")


def outlived(chance: random.Random) -> None:
    """A data_fd outlives its device, and holds the module."""
    device = migtest.create()
    with opened(device) as device_fd:
        victim = Victim(device, "v2", device_fd, chance)
        actions.set_state(victim, chance.choice(_SESSIONS))
    device.remove()
    (data_fd,) = victim.data_fds
    if (done := actions.read_some(victim, 100)) >= 0:
        raise FoundError(f"a dead data_fd gave {done} bytes")
    if (done := calls.delete_module(_NAME)) not in _BUSY:
        raise FoundError(f"rmmod with a data_fd open: {done}")
    os.close(data_fd)


def unloaded(chance: random.Random) -> None:
    """The module is taken out: refused while a device is open, else with all its devices."""
    devices = [migtest.create(chance.choice(migtest.KINDS)) for _ in range(chance.randrange(1, 5))]

    def own(tell: Tell) -> None:
        with opened(devices[0]) as device_fd:
            actions.set_state(Victim(devices[0], "v2", device_fd, chance), DeviceState.PRE_COPY)
            tell()
            time.sleep(END_S)

    owner = start(own)
    owner.wait_for_word()
    for _ in range(3):
        if (done := calls.delete_module(_NAME)) not in _BUSY:
            raise FoundError(f"rmmod with a device open: {done}")
    owner.kill()
    lookers = [start(_looking_at(device)) for device in devices]
    if (done := calls.delete_module(_NAME)) != 0:
        raise FoundError(f"rmmod with no device open: {done}")
    for looker in lookers:
        looker.wait()
    if left := [device.uuid for device in devices if device.path.exists()]:
        raise FoundError(f"without its module there is still {left}")
    if (done := calls.load_module(str(MODULE))) != 0:
        raise FoundError(f"insmod: {done}")


def churn(chance: random.Random) -> None:
    """Devices come and go while others are looked at, opened and abused."""
    steady = migtest.create()
    contested = str(uuid.UUID(int=chance.getrandbits(128), version=4))

    def come_and_go(_tell: Tell) -> None:
        for _ in range(20):
            device = migtest.create(chance.choice(migtest.KINDS))
            if chance.random() < 0.5:
                _look_at(device)
            device.remove()

    def race(_tell: Tell) -> None:
        """Make and remove one of a name that another process makes and removes as well."""
        for _ in range(20):
            with suppress(OSError):
                migtest.create("v2", contested)
            with suppress(OSError):
                MigTest(contested).remove()

    def use(_tell: Tell) -> None:
        for _ in range(10):
            with opened(steady) as device_fd:
                victim = Victim(steady, "v2", device_fd, chance)
                for _ in range(10):
                    with suppress(OSError):
                        actions.act(victim)
                victim.close_all()

    children: list[Child] = [start(work) for work in (come_and_go, race, race, use)]
    for child in children:
        child.wait()
    # It may be there for good: what is removed before it is whole stays, and cannot be removed any
    # more but with its module (mdev_device_remove(), drivers/vfio/mdev/mdev_core.c of 6.12).
    MigTest(contested).remove()
    check_fit(steady, "v2")
    steady.remove()


def _looking_at(device: MigTest) -> Work:
    return lambda _: _look_at(device)


def _look_at(device: MigTest) -> None:
    with suppress(OSError):
        for file in device.path.iterdir():
            with suppress(OSError):
                file.read_text(errors="replace")
