"""The path between two states, and a whole save of a small state. Run: make bench."""

import os

from pytest_benchmark.fixture import BenchmarkFixture

import vfiomig
from vfiomig import states
from vfiomig.fd import OwnedFd
from vfiomig.uapi import Capability, DeviceState


def test_path_of_all_pairs_without_the_cache(benchmark: BenchmarkFixture) -> None:
    def walk() -> int:
        states.path.cache_clear()
        pairs = ((at, to) for at in DeviceState for to in DeviceState)
        return sum(states.path(Capability(7), at, to) is not None for at, to in pairs)

    # 8 times "already there", and the pairs of a device with everything that the kernel allows.
    assert benchmark(walk) == 48


def test_save_4_kib(benchmark: BenchmarkFixture) -> None:
    with (
        vfiomig.open_device("sim:?size=4K") as device,
        OwnedFd(os.open("/dev/null", os.O_WRONLY)) as sink,
    ):
        report = benchmark(vfiomig.save, device, sink.fileno())
    assert report.device_bytes == 4096
