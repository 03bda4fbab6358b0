"""The C programs that the bench compares with: built without warnings, right to the last byte."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli_runner import run
from vfiomig.fd import OwnedFd

PROGRAMS = Path(__file__).parent.parent / "benchmarks" / "programs"
NAMES = ("qemu_like", "plain_ring")
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
# Not a multiple of anything, and more than the ring holds of the small buffers below.
STATE = os.urandom(1 << 20) * 3 + b"the end"
PAGE_BYTES = 4096


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    place = tmp_path_factory.mktemp("programs")
    for name in NAMES:
        words = [compiler, *FLAGS, "-o", str(place / name), str(PROGRAMS / f"{name}.c")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    return place


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_bytes(STATE)
    return path


def call(program: Path, *words: str) -> dict[str, str]:
    """Run a program to its end; return its figures."""
    line = [str(program), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    figures = dict(word.split("=") for word in done.stdout.split())
    assert int(figures["end_ns"]) > int(figures["start_ns"])
    assert int(figures["peak_kib"]) > 0
    return figures


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [(), ("--checksum",), ("--buffer", "4K", "--slots", "1")])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_state_arrives_through_a_socket(
    built: Path, state: Path, tmp_path: Path, name: str, more: tuple[str, ...], kind: str
) -> None:
    address = f"unix:{tmp_path}/socket" if kind == "unix" else f"tcp:127.0.0.1:{free_port()}"
    receiver = [str(built / name), "recv", "--src", address, "--dst", f"file:{tmp_path}/out", *more]
    with subprocess.Popen(receiver, stdout=subprocess.PIPE, text=True) as process:
        figures = call(built / name, "send", "--src", f"file:{state}", "--dst", address, *more)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert figures["bytes"] == str(len(STATE))
    assert f"bytes={len(STATE)} " in out
    assert (tmp_path / "out").read_bytes() == STATE


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qemu_like", ("--sync",)),
        ("plain_ring", ()),
        ("plain_ring", ("--checksum", "--sync")),
        ("plain_ring", ("--direct", "--buffer", "64K")),
        ("plain_ring", ("--direct", "--sync", "--checksum", "--slots", "2")),
    ],
)
def test_a_state_comes_back_from_a_file(
    built: Path, state: Path, tmp_path: Path, name: str, more: tuple[str, ...]
) -> None:
    stream, out = tmp_path / "stream", tmp_path / "out"
    call(built / name, "send", "--src", f"file:{state}", "--dst", f"file:{stream}", *more)
    if name == "plain_ring":
        assert stream.stat().st_size % PAGE_BYTES == 0
    call(built / name, "recv", "--src", f"file:{stream}", "--dst", f"file:{out}")
    assert out.read_bytes() == STATE


@pytest.mark.parametrize("name", NAMES)
def test_descriptors_are_used_as_they_come(built: Path, state: Path, name: str) -> None:
    with (
        open(state, "rb") as source,
        OwnedFd(os.memfd_create("stream")) as stream,
        OwnedFd(os.memfd_create("out")) as out,
    ):
        fds = stream.fileno(), out.fileno()
        line = [str(built / name), "send", "--src", "fd:0", "--dst", f"fd:{fds[0]}"]
        subprocess.run(
            line, stdin=source, pass_fds=fds, stdout=subprocess.DEVNULL, timeout=60, check=True
        )
        os.lseek(fds[0], 0, os.SEEK_SET)
        line = [str(built / name), "recv", "--src", f"fd:{fds[0]}", "--dst", f"fd:{fds[1]}"]
        subprocess.run(line, pass_fds=fds, stdout=subprocess.DEVNULL, timeout=60, check=True)
        assert os.pread(fds[1], len(STATE) + 1, 0) == STATE


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_a_state_too(built: Path, tmp_path: Path, name: str) -> None:
    call(built / name, "send", "--src", "file:/dev/null", "--dst", f"file:{tmp_path}/stream")
    found = call(built / name, "recv", "--src", f"file:{tmp_path}/stream", "--dst", "memfd")
    assert found["bytes"] == "0"


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_ends_early_is_a_failure(
    built: Path, state: Path, tmp_path: Path, name: str
) -> None:
    stream = tmp_path / "stream"
    call(built / name, "send", "--src", f"file:{state}", "--dst", f"file:{stream}")
    os.truncate(stream, 1 << 20)
    line = [str(built / name), "recv", "--src", f"file:{stream}", "--dst", "null"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "ends early" in done.stderr) == (1, True)


def test_a_damaged_payload_shows_in_its_checksum(built: Path, state: Path, tmp_path: Path) -> None:
    program, stream = built / "plain_ring", tmp_path / "stream"
    call(program, "send", "--src", f"file:{state}", "--dst", f"file:{stream}", "--checksum")
    with open(stream, "r+b") as file:
        file.seek(5000)
        file.write(b"X")
    line = [str(program), "recv", "--src", f"file:{stream}", "--dst", "null"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "its checksum is wrong" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("push",),
        ("send", "--src", "fd:0"),
        ("send", "--src", "fd:0", "--dst"),
        ("send", "--src", "fd:0", "--dst", "nowhere"),
        ("send", "--src", "nowhere", "--dst", "null"),
        ("send", "--src", "fd:0", "--dst", "null", "--fast"),
        ("send", "--src", "fd:0", "--dst", "null", "--buffer", "4X"),
        ("send", "--src", "fd:0", "--dst", "null", "--buffer", "1000"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_they_do_not_know_is_a_usage_error(
    built: Path, name: str, words: tuple[str, ...]
) -> None:
    line = [str(built / name), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.parametrize("into", ["none", "memory"])
def test_the_bench_measures_them_on_every_sink(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--size", "2M", "--runs", "1", "--buffer", "1M", "--zeros", "50", "--into", into)
    sinks = "null,file,durable,pipe,unix,tcp"
    baselines = ("--programs", built, "--baselines", ",".join(NAMES))
    found = run("bench", *words, "--sink", sinks, *baselines, "--json")
    assert found.code == 0, found.out
    assert (found.last["against"], found.last["skipped"]) == ("qemu_like", [])
    measured = [(case["sink"], case["program"]) for case in found.last["cases"]]
    assert measured == [(sink, name) for sink in sinks.split(",") for name in ("vfiomig", *NAMES)]
    for case in found.last["cases"]:
        assert (case["device_bytes"], case["sender_peak_kib"] > 0) == (2 << 20, True)
        assert case["ratio"] > 0
