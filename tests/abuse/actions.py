"""What one thread does to an open test device: one careless or hostile call after the other.

Nothing here looks at the outcome: the kernel must survive it, and the device be fit afterwards.
"""

import os
import random
from collections.abc import Callable
from contextlib import suppress

from abuse import requests, settings, transfers
from abuse.victim import MOST_DATA_FDS, Victim, close
from kernel.migtest import MigTest


def act(victim: Victim) -> None:
    """Do one thing."""
    known = _ACTIONS | (_ACTIONS_OF_V1 if victim.kind == "v1" else _ACTIONS_OF_V2)
    victim.chance.choices(list(known), list(known.values()))[0](victim)


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
        close(victim.data_fds.pop(victim.chance.randrange(MOST_DATA_FDS)))


_ACTIONS: dict[Callable[[Victim], None], int] = {
    requests.any_feature: 8,
    requests.any_vfio_ioctl: 8,
    requests.ask_info: 5,
    requests.set_irqs: 2,
    requests.reset: 4,
    transfers.misuse_file: 5,
    transfers.move: 3,
    transfers.wait_for: 3,
    transfers.change_flags: 1,
    transfers.map: 3,
    transfers.access_region: 15,
    requests.log_start: 5,
    requests.log_stop: 2,
    requests.log_report: 5,
    requests.mark_dirty: 3,
    _look: 6,
    _set_something: 6,
    _close_one: 3,
}
_ACTIONS_OF_V2: dict[Callable[[Victim], None], int] = {
    transfers.save: 10,
    transfers.load: 10,
    requests.change_state: 25,
    requests.change_state_undeliverably: 2,
    requests.precopy_info: 8,
    transfers.read: 20,
    transfers.read_badly: 4,
    transfers.write: 20,
    transfers.write_badly: 4,
}
_ACTIONS_OF_V1: dict[Callable[[Victim], None], int] = {
    transfers.drive_region: 60,
    requests.change_state: 2,
    transfers.read_badly: 1,
}
