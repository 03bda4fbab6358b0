"""save(), load() and inspect() of a simulated device: files, pipes, sockets. Run: make bench.

Both ends are threads of one process here; vfiomig bench has a process for each.
"""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import vfiomig
from benchmarks.conftest import Scale
from vfiomig import Device, DeviceState, QemuFraming, SaveOptions

FRAMINGS: dict[str, str | QemuFraming] = {"native": "native", "qemu": QemuFraming()}
Socket = socket.socket
Ends = Callable[[], tuple[Socket, Socket]]


@pytest.fixture(scope="module")
def device(scale: Scale) -> Iterator[Device]:
    with vfiomig.open_device(f"sim:?size={scale.state_bytes}") as device:
        yield device


def tcp() -> tuple[Socket, Socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


@pytest.mark.parametrize("way", ["native", "qemu", "native durable"])
def test_save_to_file(
    benchmark: BenchmarkFixture, scale: Scale, device: Device, tmp_path: Path, way: str
) -> None:
    framing, _, durable = way.partition(" ")
    options = SaveOptions(framing=FRAMINGS[framing], durable=bool(durable), force=True)
    report = benchmark.pedantic(
        vfiomig.save,
        (device, tmp_path / "state", options),
        rounds=scale.rounds,
        warmup_rounds=1,
    )
    assert vfiomig.inspect(tmp_path / "state").digest == report.digest


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("ends", [socket.socketpair, tcp], ids=["unix", "tcp"])
def test_save_through_a_socket_and_check(
    benchmark: BenchmarkFixture, scale: Scale, device: Device, framing: str, ends: Ends
) -> None:
    options = SaveOptions(framing=FRAMINGS[framing])

    def move() -> tuple[str, str]:
        near, far = ends()
        found: list[vfiomig.Inspection] = []
        with far:
            thread = threading.Thread(target=lambda: found.append(vfiomig.inspect(far)))
            thread.start()
            with near:
                saved = vfiomig.save(device, near, options)
            thread.join()
        return saved.digest, found[0].digest

    saved, checked = benchmark.pedantic(move, rounds=scale.rounds, warmup_rounds=1)
    assert saved == checked


def test_load_from_file(
    benchmark: BenchmarkFixture, scale: Scale, device: Device, tmp_path: Path
) -> None:
    saved = vfiomig.save(device, tmp_path / "state")
    with vfiomig.open_device(f"sim:?size={scale.state_bytes}") as dest:
        report = benchmark.pedantic(
            vfiomig.load, (tmp_path / "state", dest), rounds=scale.rounds, warmup_rounds=1
        )
    assert report.digest == saved.digest


def test_baseline_dd_to_file(
    benchmark: BenchmarkFixture, scale: Scale, device: Device, tmp_path: Path
) -> None:
    dd = shutil.which("dd")
    if dd is None:
        pytest.skip("no dd on this machine")

    def copy() -> None:
        channel = device.start_session(DeviceState.STOP_COPY)
        with open(tmp_path / "raw", "wb") as sink:
            words = [dd, "bs=1M", "status=none", "conv=fdatasync"]
            subprocess.run(words, stdin=channel.fileno(), stdout=sink, check=True)
        device.set_state(DeviceState.RUNNING)

    benchmark.pedantic(copy, rounds=scale.rounds, warmup_rounds=1)
    assert os.stat(tmp_path / "raw").st_size == scale.state_bytes
    digest = vfiomig.save(device, tmp_path / "state").digest
    assert vfiomig.inspect(tmp_path / "state").digest == digest
