"""The devices that must keep the contract. A kernel device joins by a line in SUBJECTS."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from contract.driving import DeviceFactory
from vfiomig.device import DeviceOps
from vfiomig.simulator.device import SimulatedOps

SUBJECTS = {
    "sim-generic": "sim:?size=300000",
    "sim-shaped": "sim:?size=300000&chunk=10000&bandwidth=1G&latency=1us",
    "sim-dirty": "sim:?size=300000&dirty=64M&initial=100000",
    "sim-no-p2p": "sim:?size=300000&capabilities=stop_copy,pre_copy",
    "sim-stop-copy-only": "sim:?size=300000&capabilities=stop_copy",
    "sim-empty": "sim:?size=0",
    "sim-mlx5": "sim:?profile=mlx5&size=300000",
    "sim-virtio": "sim:?profile=virtio&size=300000",
    "sim-hisi": "sim:?profile=hisi",
    "sim-qat": "sim:?profile=qat",
    "sim-pds": "sim:?profile=pds",
    "sim-xe": "sim:?profile=xe&size=300000",
    "sim-mtty-1": "sim:?profile=mtty-1",
    "sim-mtty-2": "sim:?profile=mtty-2",
}


@pytest.fixture(params=SUBJECTS)
def device_factory(request: pytest.FixtureRequest) -> Iterator[DeviceFactory]:
    """Opens a RUNNING device of the kind under test; two calls give two devices."""
    with ExitStack() as stack:

        def open_one() -> DeviceOps:
            return stack.enter_context(closing(SimulatedOps.open(SUBJECTS[request.param])))

        yield open_one


@pytest.fixture
def ops(device_factory: DeviceFactory) -> DeviceOps:
    return device_factory()
