"""Where a simulated device lives: in memory, or in FILE with FILE.sim beside it."""

import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from vfiomig.errors import LocalIOError, UsageError, opening_failed
from vfiomig.fd import OwnedFd
from vfiomig.simulator.file import Sidecar
from vfiomig.simulator.storage import FileStorage, MemoryStorage, SimState
from vfiomig.simulator.url import Parameters, SimUrl, agree, parse_parameters
from vfiomig.uapi import DeviceState

# Ours: more than any test needs, and little enough for a device that is open for years.
_KEPT_STATES = 1024


def _new_history() -> deque[tuple[int, DeviceState]]:
    return deque(maxlen=_KEPT_STATES)


@dataclass(slots=True)
class Home:
    """Owns what is left of a device while it is not open, and the lock on it.

    entered: when (CLOCK_MONOTONIC, ns) it came into which state since then, the last 1024.
    """

    parameters: Parameters
    state: SimState
    device_state: DeviceState
    sidecar: Sidecar | None
    entered: deque[tuple[int, DeviceState]] = field(default_factory=_new_history)

    def record(self, device_state: DeviceState) -> None:
        """Keep the state the device is in. Raises OSError."""
        if self.sidecar is not None and device_state is not self.device_state:
            self.sidecar.write(self.parameters.as_texts(), device_state)
        self.device_state = device_state
        self.entered.append((time.monotonic_ns(), device_state))

    def close(self) -> None:
        """Close the files and give up the lock. What is in a file stays."""
        self.state.close()
        if self.sidecar is not None:
            self.sidecar.close()


def open_home(url: SimUrl) -> Home:
    """Open or create the device. Raises UsageError, DeviceBusyError, or what opening raises."""
    if not url.path:
        parameters = parse_parameters(url.given)
        try:
            state = SimState.fill_new(MemoryStorage(), parameters)
        except OSError as err:
            raise opening_failed(url.name, err) from err
        return Home(parameters, state, DeviceState.RUNNING, None)
    # Of two links to one file, both are the same device, and a commit replaces the file.
    path = os.path.realpath(url.path)
    sidecar = Sidecar(url.name, path)
    try:
        return _open_file(url, path, sidecar)
    except BaseException as err:
        sidecar.remove_if_new()
        sidecar.close()
        if isinstance(err, OSError):
            raise opening_failed(url.name, err) from err
        raise


def _open_file(url: SimUrl, path: str, sidecar: Sidecar) -> Home:
    storage = FileStorage(path)
    found = sidecar.read()
    if not os.path.lexists(path):
        # Whatever FILE.sim says: what it was about is gone.
        return _create(url, storage, sidecar)
    if not os.path.isfile(path):
        raise LocalIOError(f"{url.name}: not a regular file", device=url.name)
    with OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as state_fd:
        if found is None:
            parameters = _adopt(url, os.fstat(state_fd.fileno()).st_size)
            device_state = DeviceState.RUNNING
            sidecar.write(parameters.as_texts(), device_state)
        else:
            parameters, device_state = agree(found[0], url.given, url.name), found[1]
        with ExitStack() as stack:
            state = stack.enter_context(closing(SimState(storage, state_fd.detach())))
            if device_state is DeviceState.RESUMING:
                state.reopen_staging()
            stack.pop_all()
    return Home(parameters, state, device_state, sidecar)


def _create(url: SimUrl, storage: FileStorage, sidecar: Sidecar) -> Home:
    parameters = parse_parameters(url.given)
    storage.discard("resuming")
    with ExitStack() as stack:
        state = stack.enter_context(closing(SimState.fill_new(storage, parameters)))
        sidecar.write(parameters.as_texts(), DeviceState.RUNNING)
        stack.pop_all()
    return Home(parameters, state, DeviceState.RUNNING, sidecar)


def _adopt(url: SimUrl, size_bytes: int) -> Parameters:
    """Make a file that was there before a device, whose state is what the file contains."""
    given: Mapping[str, str] = {**url.given, "size": str(size_bytes)}
    if "size" in url.given:
        return agree(given, url.given, url.name)
    return parse_parameters(given)


def state_bytes_of(url: SimUrl) -> bytes:
    """Return the bytes of a device's file, whoever has it open. Raises UsageError, OSError."""
    if not url.path:
        raise UsageError(f"{url.name}: a device in memory can only be read by who has it open")
    with open(url.path, "rb") as file:
        return file.read()
