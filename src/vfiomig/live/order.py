"""The order in which several devices come to run: nobody is written to before it can take it.

linux/vfio.h: all to RUNNING_P2P, then all to RUNNING; the other way round when they are stopped.
"""

from collections.abc import Callable, Sequence

from vfiomig.device import Device
from vfiomig.threads import together
from vfiomig.uapi import Capability, DeviceState

_QUIET = frozenset({DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.PRE_COPY_P2P})


def let_run(devices: Sequence[Device]) -> None:
    """Bring devices from STOP to RUNNING. Raises MigrationError: some may run then."""
    _each_of(_with_p2p(devices), lambda device: device.set_state(DeviceState.RUNNING_P2P))
    _each_of(devices, lambda device: device.set_state(DeviceState.RUNNING))


def bring_back(devices: Sequence[Device]) -> None:
    """Bring devices back to RUNNING, from wherever they are: by a reset, if it must be.

    Raises DeviceLostError, when all others are back.
    """
    half = [device for device in _with_p2p(devices) if device.state_or_none() in _QUIET]
    _each_of(half, lambda device: device.recover(DeviceState.RUNNING_P2P))
    _each_of(devices, lambda device: device.recover(DeviceState.RUNNING))


def leave(devices: Sequence[Device], *, resetting: bool) -> None:
    """Leave devices whose state runs elsewhere: in STOP, or reset. Raises MigrationError."""
    if resetting:
        _each_of(devices, lambda device: device.reset())
    else:
        _each_of(devices, lambda device: device.set_state(DeviceState.STOP))


def _with_p2p(devices: Sequence[Device]) -> list[Device]:
    if len(devices) == 1:  # set_state() passes the P2P states by itself
        return []
    return [device for device in devices if device.capabilities & Capability.P2P]


def _each_of(devices: Sequence[Device], work: Callable[[Device], object]) -> None:
    def job(device: Device) -> Callable[[], object]:
        return lambda: work(device)

    together([job(device) for device in reversed(devices)], lambda _: None)
