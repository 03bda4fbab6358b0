"""save() and load() of a simulated device, file and socket. Run: make bench."""

import os
import socket
import threading
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import vfiomig
from vfiomig import QemuFraming, SaveOptions, TransferReport

STATE = "sim:?size=256M"
FRAMINGS: dict[str, str | QemuFraming] = {"native": "native", "qemu": QemuFraming()}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_save_to_file(benchmark: BenchmarkFixture, tmp_path: Path, framing: str) -> None:
    options = SaveOptions(framing=FRAMINGS[framing], force=True)
    with vfiomig.open_device(STATE) as device:
        report = benchmark.pedantic(
            vfiomig.save, (device, tmp_path / "state", options), rounds=5, warmup_rounds=1
        )
    assert vfiomig.inspect(tmp_path / "state").digest == report.digest


@pytest.mark.parametrize("framing", FRAMINGS)
def test_save_through_a_socket_and_load(benchmark: BenchmarkFixture, framing: str) -> None:
    options = SaveOptions(framing=FRAMINGS[framing])
    with vfiomig.open_device(STATE) as source, vfiomig.open_device(STATE) as dest:

        def move() -> tuple[str, str]:
            near, far = socket.socketpair()
            loaded: list[TransferReport] = []
            with far:
                thread = threading.Thread(target=lambda: loaded.append(vfiomig.load(far, dest)))
                thread.start()
                with near:
                    saved = vfiomig.save(source, near, options)
                thread.join()
            return saved.digest, loaded[0].digest

        saved, loaded = benchmark.pedantic(move, rounds=5, warmup_rounds=1)
    assert saved == loaded


def test_load_from_file(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    with vfiomig.open_device(STATE) as device:
        saved = vfiomig.save(device, tmp_path / "state")
        report = benchmark.pedantic(
            vfiomig.load, (tmp_path / "state", device), rounds=5, warmup_rounds=1
        )
    assert report.digest == saved.digest
    assert os.stat(tmp_path / "state").st_size == saved.stream_bytes
