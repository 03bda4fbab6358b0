"""Simulated devices for the end-to-end tests, and what must be true after each of them."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vfiomig
from vfiomig import MigrationError
from vfiomig.report import Event
from vfiomig.simulator.device import SimulatedOps, by_protocol
from vfiomig.simulator.url import parse_url

# Every profile there is, with a state that is no multiple of anything where its size is free.
URLS = {
    "generic": "sim:?size=300001",
    "generic-no-p2p": "sim:?size=300001&capabilities=stop_copy,pre_copy",
    "generic-chunks": "sim:?size=300001&chunk=1000",
    "generic-zeros": "sim:?size=3000001&zeros=50",
    "mlx5": "sim:?profile=mlx5&size=300001",
    "virtio": "sim:?profile=virtio&size=300001",
    "hisi": "sim:?profile=hisi",
    "qat": "sim:?profile=qat",
    "pds": "sim:?profile=pds",
    "xe": "sim:?profile=xe&size=300001",
    "mtty-1": "sim:?profile=mtty-1",
    "mtty-2": "sim:?profile=mtty-2",
}
# By the legacy protocol, which can be saved and loaded, and not sent.
V1_URL = "sim:?protocol=v1&size=300001&region=50001"
WITHOUT_PRE_COPY = {"pds", "xe"}


def seeded(url: str, seed: int) -> str:
    """Return a device of the same kind with other contents."""
    return f"{url}{'&' if '?' in url else '?'}seed={seed}"


class Simulated(vfiomig.Device):
    """A simulated device whose state can be looked at from behind."""

    def __init__(self, url: str) -> None:
        self._simulator = SimulatedOps.open(url)
        ops = by_protocol(self._simulator)
        super().__init__(self._simulator.name, self._simulator.identity, ops)

    def content(self) -> bytes:
        return self._simulator.read_state()

    @property
    def history(self) -> list[tuple[int, vfiomig.DeviceState]]:
        """The states it has entered, and when (CLOCK_MONOTONIC)."""
        return self._simulator.history

    def set_faults(self, *faults: str) -> None:
        """Let it fail so from now on."""
        self._simulator._opening = parse_url(
            "sim:?" + "&".join(f"fault={x}" for x in faults)
        ).opening


@contextmanager
def no_leak() -> Iterator[None]:
    """No descriptor and no thread is left of what happened within."""
    before = _descriptors(), set(threading.enumerate())
    yield
    after = _descriptors(), set(threading.enumerate())
    assert after == before, f"{before} became {after}"


def _descriptors() -> dict[str, str]:
    names = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            names[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return names


def failure_of(job: Callable[[], object]) -> MigrationError:
    """Return the error that a job must end with."""
    with pytest.raises(MigrationError) as caught:
        job()
    return caught.value


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Trigger:
    """An on_event that does something in another thread at the first event that is wanted."""

    def __init__(self, wanted: Callable[[Event], bool], action: Callable[[], object]) -> None:
        self._wanted, self._action = wanted, action
        self.events: list[Event] = []
        self.fired = False

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not self.fired and self._wanted(event):
            self.fired = True
            thread = threading.Thread(target=self._action)
            thread.start()
            thread.join()


def entered(state: vfiomig.DeviceState) -> Callable[[Event], bool]:
    """Whether an event says that the device has entered state."""
    return lambda event: (
        isinstance(event, vfiomig.StateChange) and event.actual is state and event.errno is None
    )


def into_pipe(job: Callable[[int], object], *, nonblocking: bool = False) -> bytes:
    """Return what a job writes into a pipe, which is read at the same time."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, not nonblocking)
    return drained(read_fd, lambda: job(write_fd), lambda: os.close(write_fd))


def drained(source: int | Path, job: Callable[[], object], close: Callable[[], None]) -> bytes:
    """Return what is read from a descriptor, or a fifo, while a job runs."""
    found: list[bytes] = []

    def read() -> None:
        with open(source, "rb") as file:
            found.append(file.read())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        job()
    finally:
        close()
        thread.join()
    return found[0]
