"""The devices that an ended session has left on this host: what is there, what is done to it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from vfiomig.backends import open_device, opens_by_name
from vfiomig.device import Device
from vfiomig.errors import (
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceStateError,
    NoSuchDeviceError,
)
from vfiomig.live.journal import sessions
from vfiomig.live.record import Record
from vfiomig.live.verdict import Left, Role
from vfiomig.report import Event, OnEvent, StateChange
from vfiomig.simulator.url import parse_url
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

_QUIET = {S.STOP, S.STOP_COPY, S.PRE_COPY_P2P}
# What a hand-over leaves devices in; in any other, somebody else is at work on them.
_LEAVES = {
    Role.SOURCE: set(S) - {S.RESUMING},
    Role.DESTINATION: {S.RUNNING, S.RUNNING_P2P, S.STOP, S.RESUMING, S.ERROR},
}
_RESET_BY_KERNEL = (
    "was opened by name, and is RUNNING: a vfio-pci device is reset when the last process that has"
    " it open ends, and what it held is gone"
)


class Remnant(NamedTuple):
    """A device of the session. device: None when it is its no more, and why: a clause."""

    name: str
    device: Device | None
    why: str = ""

    @property
    def state(self) -> S | None:
        """The state it is in; None when nobody looked."""
        return self.device.state() if self.device is not None else None

    @property
    def is_kept(self) -> bool:
        """Whether it is as the process left it."""
        is_blank = opens_by_name(self.name) and self.state is S.RUNNING
        return self.device is not None and not is_blank

    def look(self) -> str:
        """Return a clause on what it is like."""
        state = self.state
        if state is None:
            return f"{self.name}: {self.why}"
        return f"{self.name} is in {state.name}" if self.is_kept else self.reset_by_kernel()

    def reset_by_kernel(self) -> str:
        """Return a clause on what became of a device that nobody kept."""
        return f"{self.name} {_RESET_BY_KERNEL}"


class Remains:
    """The devices of a session, open. notes: clauses on what was out of the ordinary.

    Enter it with with: it closes the devices. Runs in one thread.
    """

    def __init__(self, record: Record, on_event: OnEvent | None, *, dry_run: bool) -> None:
        self._record, self._on_event, self._is_dry_run = record, on_event, dry_run
        self._stack = ExitStack()
        self._all: list[Remnant] = []
        self.notes: list[str] = []

    def open(self, *, needed: bool) -> None:
        """Open what is there. needed: DeviceBusyError if any is not the session's any more.

        Raises DeviceBusyError when somebody else is at work on one, and what opening raises.
        """
        later = _later_sessions(self._record)
        for name in self._record.devices:
            found = self._opened(name, later.get(_key(name)))
            if found.device is not None:
                self._stack.enter_context(found.device)
                self._stack.enter_context(found.device.observed(self._observe))
                self._check(found.device)
            elif needed and not self._spares(name):
                raise _not_there(name, f"{name}: {found.why}")
            self._all.append(found)

    def __iter__(self) -> Iterator[Remnant]:
        return iter(self._all)

    @property
    def left(self) -> Left:
        """What a destination's are in, all together."""
        states = {found.state for found in self._all}
        if not self._all or not all(found.is_kept for found in self._all):
            return Left.UNCLEAR
        if states == {S.RUNNING}:
            return Left.RUNNING
        if states <= {S.RUNNING, S.RUNNING_P2P, S.STOP}:
            return Left.STOPPED
        if S.ERROR in states and states <= {S.RUNNING_P2P, S.STOP, S.ERROR}:
            return Left.FAILED
        return Left.UNCLEAR

    def bring_back(self) -> None:
        """Let a source run again, whatever becomes of one device. Raises DeviceLostError."""
        self.notes += [found.reset_by_kernel() for found in self._all if not found.is_kept]
        lost: list[DeviceLostError] = []

        def recover(device: Device, state: S) -> None:
            try:
                device.recover(state)
            except DeviceLostError as err:
                lost.append(err)

        self._in_stages(recover, _QUIET)
        if lost:
            raise lost[0]

    def let_run(self) -> None:
        """Let a destination run. Raises DeviceStateError, DeviceIOError."""
        self._in_stages(Device.set_state, {S.STOP})

    def hold(self) -> None:
        """Leave a source stopped, in STOP where it can be."""
        for name, device, _ in self._all:
            state = device.state() if device is not None else None
            if state is S.RUNNING and not opens_by_name(name):
                self.notes.append(f"{name} is RUNNING: somebody has reset or started it")
            elif device is not None and state is S.STOP_COPY:
                try:
                    device.set_state(S.STOP)
                except (DeviceStateError, DeviceIOError) as err:
                    self.notes.append(str(err))  # it does not run, and that is what counts

    def reset(self, *, running: bool) -> None:
        """Reset a destination's; those that run only if running. Raises DeviceLostError."""
        for device in self._devices():
            if running or device.state_or_none() is not S.RUNNING:
                device.reset()

    def close(self) -> None:
        """Close the devices."""
        self._stack.close()

    def _devices(self) -> list[Device]:
        return [found.device for found in self._all if found.device is not None]

    def _in_stages(self, act: Callable[[Device, S], object], quiet: set[S]) -> None:
        """Of several, all to RUNNING_P2P first, as they were stopped."""
        devices = self._devices()
        for device in reversed(devices if len(devices) > 1 else []):
            if device.capabilities & Capability.P2P and device.state_or_none() in quiet:
                act(device, S.RUNNING_P2P)
        for device in reversed(devices):
            act(device, S.RUNNING)

    def _opened(self, name: str, later: Record | None) -> Remnant:
        if later is not None:
            return Remnant(name, None, f"session {later.session} had it afterwards")
        if name.startswith("sim:"):
            path = parse_url(name).path
            if not path or not os.path.exists(path):
                return Remnant(name, None, "it is gone: nobody has kept it")
        if self._spares(name):
            return Remnant(name, None, "opening it by name might reset it")
        try:
            return Remnant(name, open_device(name))
        except NoSuchDeviceError as err:
            return Remnant(name, None, f"it is gone: {err}")
        except DeviceBusyError as err:
            if not opens_by_name(name):
                raise
            return Remnant(name, None, f"it was reset when the process ended, and is used: {err}")

    def _spares(self, name: str) -> bool:
        return self._is_dry_run and opens_by_name(name)

    def _check(self, device: Device) -> None:
        role, state = self._record.role, device.state()
        if state not in _LEAVES[role]:
            what = f"{device.name} is in {state.name}, in which no {role} leaves a device"
            raise _not_there(device.name, f"{what}: somebody else is at work on it")

    def _observe(self, event: Event) -> None:
        reset = event if isinstance(event, StateChange) and event.by == "reset" else None
        if reset is not None and self._record.role is Role.SOURCE:
            self.notes.append(f"{reset.device} had to be reset: its state is lost")
        if self._on_event is not None:
            self._on_event(event)


def _not_there(name: str, text: str) -> DeviceBusyError:
    hint = "what this session left in it is not there any more"
    return DeviceBusyError(text, device=name, hint=hint)


def _key(name: str) -> str:
    """Return what two names of one device have in common."""
    if not name.startswith("sim:"):
        return name
    path = parse_url(name).path
    return f"sim:{os.path.realpath(path)}" if path else ""


def _later_sessions(record: Record) -> Mapping[str, Record]:
    """Return which later session, or living one, each device has been in."""
    found: dict[str, Record] = {}
    for one in sessions(record.path.parent):
        is_later = one.is_live or one.begun_at > record.begun_at
        if one.session != record.session and is_later:
            found |= {key: one for name in one.devices if (key := _key(name))}
    return found
