"""What is asked of save() for speed: the ring, the buffer, a rate, durable files, wide sockets."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stream_oracle
from cli_runner import run
from devices import Simulated, drained, failure_of, names_in, no_leak
from vfiomig import QemuFraming, SaveOptions, UsageError, inspect, save
from vfiomig.options import DEFAULT_BUFFER_BYTES, GROWN_BUFFER_BYTES


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


def refusal(options: SaveOptions) -> str:
    with Simulated("sim:?size=5000") as device:
        err = failure_of(lambda: save(device, "/dev/null", options))
        assert device.state().name == "RUNNING"
    assert isinstance(err, UsageError)
    return str(err)


@pytest.mark.parametrize("slots", [-1, 0, 65, 1 << 40])
def test_a_ring_has_one_to_64_slots(slots: int) -> None:
    assert refusal(SaveOptions(ring_slots=slots)) == f"a ring of {slots} slots: 1 to 64"


def test_a_rate_is_not_negative() -> None:
    assert refusal(SaveOptions(bytes_per_s=-1)) == "a rate of -1 bytes per second"


@pytest.mark.parametrize("size", [0, -1, 4095, (128 << 20) + 1])
def test_a_buffer_has_4_kib_to_128_mib(size: int) -> None:
    said = refusal(SaveOptions(buffer_bytes=size))
    assert said == f"a buffer of {size} bytes: 4 KiB to 128 MiB"


@pytest.mark.parametrize("slots", [1, 2, 4, 64])
def test_a_ring_of_any_size_saves_the_same_state(tmp_path: Path, slots: int) -> None:
    with Simulated("sim:?size=6000001&zeros=20") as device:
        options = SaveOptions(ring_slots=slots, buffer_bytes=100_000)
        report = save(device, tmp_path / "out", options)
        stream = stream_oracle.read((tmp_path / "out").read_bytes())
        assert stream.states == [device.content()]
    assert report.stream_bytes == (tmp_path / "out").stat().st_size
    assert report.buffer_bytes == 100_000


def test_the_report_says_what_the_buffer_was(tmp_path: Path) -> None:
    with Simulated("sim:?size=300001") as device:
        assert save(device, "/dev/null").buffer_bytes in (DEFAULT_BUFFER_BYTES, GROWN_BUFFER_BYTES)
        assert save(device, "/dev/null", SaveOptions(buffer_bytes=4096)).buffer_bytes == 4096
        # QEMU's rule: its buffer is no larger than 64 KiB, or what the device reports.
        options = SaveOptions(framing=QemuFraming())
        assert 65536 <= save(device, "/dev/null", options).buffer_bytes < DEFAULT_BUFFER_BYTES


# Sockets.


def send_buffer(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def save_into(near: socket.socket, far: socket.socket) -> None:
    def job() -> None:
        save(device, near)
        near.shutdown(socket.SHUT_WR)

    with Simulated("sim:?size=300001") as device:
        stream = drained(far.detach(), job, lambda: None)
        assert stream_oracle.read(stream).states == [device.content()]


def test_a_unix_socket_is_widened() -> None:
    near, far = socket.socketpair()
    with near, far:
        before = send_buffer(near)
        save_into(near, far)
        # The kernel doubles what it is told, and net.core.wmem_max is the most it takes.
        most = int(Path("/proc/sys/net/core/wmem_max").read_text())
        assert send_buffer(near) == 2 * min(4 << 20, most) > before
        assert os.get_blocking(near.fileno())


def test_a_tcp_socket_is_left_to_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)  # else it grows by itself
            before = send_buffer(near)
            save_into(near, far)
            assert send_buffer(near) == before


# The command.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOURCE = "sim:source?size=3000001&zeros=50&seed=1"


def saved(*words: object) -> dict[str, Any]:
    found = run("save", SOURCE, "out", "--json", *words)
    assert (found.code, found.err) == (0, "")
    return found.last


def test_every_option_for_speed_keeps_the_state(here: Path) -> None:
    digests = set()
    for words in (
        "--ring 1 --buffer 64K",
        "--ring 64 --buffer auto",
        "--bandwidth 100Gbit",
        "--durable --ring 2",
        "--keep-zeros",
        "--framing qemu",
    ):
        report = saved("--force", *words.split())
        digests.add(report["digest"])
        assert inspect(here / "out").digest == report["digest"]
    assert len(digests) == 1


def test_a_buffer_is_a_size_or_auto(here: Path) -> None:
    assert saved("--buffer", "64K")["buffer_bytes"] == 65536
    sizes = (DEFAULT_BUFFER_BYTES, GROWN_BUFFER_BYTES)
    assert saved("--buffer", "auto", "--force")["buffer_bytes"] in sizes


def test_zeros_are_left_out_unless_they_are_to_be_kept(here: Path) -> None:
    assert saved()["zero_bytes"] > 1_000_000
    small = (here / "out").stat().st_size
    assert saved("--keep-zeros", "--force")["zero_bytes"] == 0
    assert (here / "out").stat().st_size > 3_000_001 > small


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ring 0", "a ring of 0 slots: 1 to 64"),
        ("--ring 65", "a ring of 65 slots: 1 to 64"),
        ("--ring many", "invalid int value: 'many'"),
        ("--buffer 0", "a buffer of 0 bytes"),
        ("--buffer 4095", "a buffer of 4095 bytes"),
        ("--buffer large", "'large' is not a size"),
        ("--bandwidth fast", "'fast' is not a rate"),
        ("--keep-zeros --framing qemu", "--keep-zeros belongs to --framing native"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(here: Path, words: str, said: str) -> None:
    found = run("save", "sim:", "out", *words.split())
    assert (found.code, said in re.sub(r"\s+", " ", found.err), names_in(here)) == (2, True, [])


def test_only_a_new_file_is_durable(here: Path) -> None:
    found = run("save", "sim:", "/dev/null", "--durable")
    assert (found.code, "only such can be durable" in found.err) == (2, True)


def test_the_environment_has_their_twins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOMIG_BUFFER", "64K")
    monkeypatch.setenv("VFIOMIG_RING", "1")
    monkeypatch.setenv("VFIOMIG_KEEP_ZEROS", "1")
    monkeypatch.setenv("VFIOMIG_DURABLE", "1")
    monkeypatch.setenv("VFIOMIG_BANDWIDTH", "100Gbit")
    report = saved()
    assert (report["buffer_bytes"], report["zero_bytes"]) == (65536, 0)
    found = run("save", "sim:", "/dev/null")
    assert "only such can be durable" in found.err
    for name, text in (("RING", "65"), ("BUFFER", "large"), ("DURABLE", "yes")):
        monkeypatch.setenv(f"VFIOMIG_{name}", text)
        assert run("save", "sim:", "another").code == 2
        assert not (here / "another").exists()
        monkeypatch.delenv(f"VFIOMIG_{name}")


@pytest.mark.parametrize(
    ("framing", "said"),
    [("native", "not carried along"), ("qemu", "holes in the file")],
)
def test_zeros_that_were_left_out_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framing: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("save", "sim:?size=1M&zeros=50", "out", "--framing", framing)
    assert f"zeros    512 KiB of the state, {said}" in done.out
