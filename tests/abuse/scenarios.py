"""Rounds of abuse: one device or a few, and who is at work on them at the same time."""

import os
import random
import threading
import time
from contextlib import suppress

from abuse import actions
from abuse.actions import Victim
from abuse.calls import LeakedErrnoError
from abuse.children import Tell, Work, start
from abuse.fitness import made, opened
from vfiomig.uapi import DeviceState

_KINDS = ("v2", "v2", "v2", "v1")
_ACTIONS = 120
_HANG_MS = 600_000


def storm(chance: random.Random) -> None:
    """One thread does whatever comes to its mind."""
    with made(chance, kind := chance.choice(_KINDS)) as device:

        def work(_tell: Tell) -> None:
            with opened(device) as device_fd:
                _act(Victim(device, kind, device_fd, chance), _ACTIONS)

        start(work).wait()


def crowd(chance: random.Random) -> None:
    """Three threads do so at once, with the same descriptors."""
    with made(chance, kind := chance.choice(_KINDS)) as device:

        def work(_tell: Tell) -> None:
            with opened(device) as device_fd:
                shared: list[int] = []
                found: list[BaseException] = []
                victims = [
                    Victim(device, kind, device_fd, random.Random(chance.random()), data_fds=shared)
                    for _ in range(3)
                ]
                threads = [threading.Thread(target=_act_in, args=(v, found)) for v in victims]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if found:
                    raise found[0]

        start(work).wait()


def heirs(chance: random.Random) -> None:
    """Processes that inherit the device do so at once, and one of them is killed."""
    kind = chance.choice(_KINDS)
    with made(chance, kind) as device, opened(device) as device_fd:
        victims = [
            Victim(device, kind, device_fd, random.Random(chance.random())) for _ in range(3)
        ]
        family = [start(_acting(victim)) for victim in victims]
        time.sleep(chance.random())
        family[0].kill()
        for child in family[1:]:
            child.wait()


def killed(chance: random.Random) -> None:
    """The owner is killed: in some state, and perhaps in the middle of a call that waits."""
    where = chance.choice(_WAITING)
    shape: dict[str, int | str] = {"capabilities": 7, "state_bytes": 300001}
    shape |= chance.choice(({}, {}, {"bytes_per_s": 1000}, {"latency_us": 10_000_000}))
    with made(chance, "v2", **shape) as device:

        def work(tell: Tell) -> None:
            with opened(device) as device_fd:
                where(Victim(device, "v2", device_fd, chance), tell)
                tell()
                time.sleep(_HANG_MS / 1000)

        child = start(work)
        child.wait_for_word()
        time.sleep(chance.choice((0, 0.001, 0.02, 0.1)))
        child.kill()


def rubbish(chance: random.Random) -> None:
    """Settings are written, with rubbish too, while others read them and the device is at work."""
    with made(chance, kind := chance.choice(_KINDS)) as device:

        def write(_tell: Tell) -> None:
            for _ in range(_ACTIONS):
                with suppress(OSError):
                    actions.write_rubbish(device, kind, chance)

        def look(_tell: Tell) -> None:
            for _ in range(10):
                for file in device.path.iterdir():
                    with suppress(OSError):
                        file.read_text(errors="replace")

        def use(_tell: Tell) -> None:
            with opened(device) as device_fd:
                _act(Victim(device, kind, device_fd, chance), _ACTIONS // 2)

        for child in [start(work) for work in (write, look, use)]:
            child.wait()


def _act(victim: Victim, times: int) -> None:
    for _ in range(times):
        with suppress(OSError, BlockingIOError):
            actions.act(victim)
    victim.close_all()


def _acting(victim: Victim) -> Work:
    return lambda _: _act(victim, _ACTIONS // 2)


def _act_in(victim: Victim, found: list[BaseException]) -> None:
    try:
        _act(victim, _ACTIONS // 2)
    except LeakedErrnoError as err:
        found.append(err)


def _idle(victim: Victim, _tell: Tell) -> None:
    actions.set_state(victim, victim.chance.choice(list(DeviceState)))
    actions.read_some(victim, victim.chance.choice((1, 5000, 400_000)))


def _reading(victim: Victim, tell: Tell) -> None:
    victim.device.set("fault", f"read {victim.chance.choice((0, 1, 5000))} hang {_HANG_MS}")
    actions.set_state(victim, victim.chance.choice((DeviceState.STOP_COPY, DeviceState.PRE_COPY)))
    tell()
    while actions.read_some(victim, 4096) > 0:
        pass


def _writing(victim: Victim, tell: Tell) -> None:
    actions.set_state(victim, DeviceState.STOP_COPY)
    while actions.read_some(victim, 200_000) > 0:
        pass
    victim.device.set("fault", f"write {victim.chance.choice((0, 1, 64, 5000))} hang {_HANG_MS}")
    actions.set_state(victim, DeviceState.RESUMING)
    tell()
    for at in range(0, len(victim.stream), 4096):
        piece = victim.stream[at : at + 4096]
        os.write(victim.data_fds[-1], piece)


def _changing(victim: Victim, tell: Tell) -> None:
    states = [state for state in DeviceState if state is not DeviceState.ERROR]
    hook = victim.chance.choice(("enter", "entered"))
    victim.device.set("fault", f"{hook} {victim.chance.choice(states)} hang {_HANG_MS}")
    tell()
    for _ in range(20):
        actions.set_state(victim, victim.chance.choice(states))


def _asking(victim: Victim, tell: Tell) -> None:
    hook = victim.chance.choice(("get", "size", "info", "reset", "log_start", "log_report"))
    victim.device.set("fault", f"{hook} 0 hang {_HANG_MS}")
    actions.set_state(victim, DeviceState.PRE_COPY)
    tell()
    _act(victim, _ACTIONS)


_WAITING = (_idle, _reading, _writing, _changing, _asking)
