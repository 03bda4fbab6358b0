"""A whole live migration beside a plain save into a socket that is loaded at its other end.

One process for each end; the ways take turns, so that what else the machine does meets all alike.
Everything is on: checksums, acknowledgements, journals on disk. Run: make bench, or with --state.
"""

import os
import random
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import vfiomig
from benchmarks.conftest import Scale
from vfiomig import Capability, DeviceState, ReceiveOptions, SendOptions, TlsFiles
from vfiomig.channel import FdChannel

Sockets = tuple[socket.socket, socket.socket]
LONG_NS = 10**12


class Dropping:
    """DeviceOps of a device that forgets what is loaded: new memory would cost more than the rest.

    Under a hypervisor, first touch of a page is ten times slower than all else here.
    """

    protocol = "v2"
    region_bytes = 0

    def __init__(self) -> None:
        self._state = DeviceState.RUNNING

    def get_migration_flags(self) -> int:
        return Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def get_device_state(self) -> DeviceState:
        return self._state

    def set_device_state(self, state: DeviceState) -> FdChannel | None:
        self._state = state
        if state is not DeviceState.RESUMING:
            return None
        return FdChannel("dropping", os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))

    def get_data_size(self) -> int:
        return 0

    def set_precopy_info_v2(self) -> bool:
        return False

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        return page_size_bytes

    def stop_dma_logging(self) -> None:
        pass

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        pass

    def reset_device(self) -> None:
        self._state = DeviceState.RUNNING

    def close(self) -> None:
        pass


def tcp() -> Sockets:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def in_two_processes(
    scale: Scale, source: Callable[[vfiomig.Device], object], destination: Callable[..., object]
) -> int:
    """Run both ends, each with its own device, and return how long the source's took, in ns."""
    ready_fd, tell_fd = os.pipe()
    child = os.fork()
    if not child:
        identity = vfiomig.Identity("sim:generic")
        with vfiomig.Device("dropping", identity, Dropping()) as device:
            os.write(tell_fd, b"x")
            destination(device)
        os._exit(0)
    with vfiomig.open_device(f"sim:?size={scale.state_bytes}") as device:
        os.read(ready_fd, 1)
        started_ns = time.monotonic_ns()
        source(device)
        _, status = os.waitpid(child, 0)
        took_ns = time.monotonic_ns() - started_ns
    os.close(ready_fd)
    os.close(tell_fd)
    assert status == 0
    return took_ns


def session(scale: Scale, journal: Path, sockets: Sockets) -> int:
    near, far = sockets
    with near, far:
        return in_two_processes(
            scale,
            lambda device: vfiomig.send(
                [device],
                f"fd:{near.fileno()}",
                SendOptions(pre_copy=None, downtime_limit_ns=LONG_NS, journal=journal / "here"),
            ),
            lambda device: vfiomig.receive(
                [device], f"fd:{far.fileno()}", ReceiveOptions(journal=journal / "there")
            ),
        )


def session_by_tls(scale: Scale, journal: Path, files: TlsFiles) -> int:
    url = f"tcp:localhost:{_free_port()}"

    def send(device: vfiomig.Device) -> None:
        options = SendOptions(
            pre_copy=None, downtime_limit_ns=LONG_NS, journal=journal / "here", tls=files
        )
        while True:  # the receiver may not listen yet
            try:
                vfiomig.send([device], url, options)
            except vfiomig.PeerError as err:
                if err.errno is None or err.phase != "hello":
                    raise
            else:
                return

    return in_two_processes(
        scale,
        send,
        lambda device: vfiomig.receive(
            [device], url, ReceiveOptions(journal=journal / "there", tls=files)
        ),
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def saved_and_loaded(scale: Scale, sockets: Sockets) -> int:
    near, far = sockets

    def save(device: vfiomig.Device) -> None:
        vfiomig.save(device, near)
        near.shutdown(socket.SHUT_WR)

    with near, far:
        return in_two_processes(scale, save, lambda device: vfiomig.load(far, device))


def saved_and_dropped(scale: Scale, sockets: Sockets) -> int:
    near, far = sockets

    def drop(_: vfiomig.Device) -> None:
        buffer = bytearray(1 << 20)
        while far.recv_into(buffer):
            pass

    def save(device: vfiomig.Device) -> None:
        vfiomig.save(device, near)
        near.shutdown(socket.SHUT_WR)

    with near, far:
        return in_two_processes(scale, save, drop)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    place = tmp_path_factory.mktemp("pki")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    words = ["openssl", "req", "-x509", *key, "-subj", "/CN=localhost", "-days", "2"]
    words += ["-addext", "subjectAltName=DNS:localhost"]
    pair = ["-keyout", str(place / "server-key.pem"), "-out", str(place / "server-cert.pem")]
    subprocess.run([*words, *pair], check=True, capture_output=True)
    for name in ("client-key.pem", "client-cert.pem", "ca-cert.pem"):
        source = "server-key.pem" if "key" in name else "server-cert.pem"
        (place / name).write_bytes((place / source).read_bytes())
        (place / name).chmod(0o600)
    return TlsFiles(place)


def test_a_session_beside_a_save_into_a_socket(
    benchmark: BenchmarkFixture, scale: Scale, tmp_path: Path, files: TlsFiles
) -> None:
    took: dict[str, list[int]] = {}

    def each_once() -> None:
        ways: dict[str, Callable[[], int]] = {
            "save, tcp": lambda: saved_and_dropped(scale, tcp()),
            "save | load, tcp": lambda: saved_and_loaded(scale, tcp()),
            "session, tcp": lambda: session(scale, tmp_path, tcp()),
            "save, unix": lambda: saved_and_dropped(scale, socket.socketpair()),
            "save | load, unix": lambda: saved_and_loaded(scale, socket.socketpair()),
            "session, unix": lambda: session(scale, tmp_path, socket.socketpair()),
            "session, tls": lambda: session_by_tls(scale, tmp_path, files),
        }
        for name, run in random.sample(list(ways.items()), len(ways)):
            took.setdefault(name, []).append(run())

    benchmark.pedantic(each_once, rounds=scale.rounds, warmup_rounds=1)
    for name in sorted(took):
        baseline = took[f"save, {'unix' if 'unix' in name else 'tcp'}"][1:]
        ratios = [b / a for a, b in zip(took[name][1:], baseline, strict=True)]
        rates = [scale.state_bytes / ns for ns in took[name][1:]]
        benchmark.extra_info[name] = (
            f"{statistics.median(rates):.2f} GB/s ({min(rates):.2f} to {max(rates):.2f}),"
            f" {statistics.median(ratios):.2f} times the save alone"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
