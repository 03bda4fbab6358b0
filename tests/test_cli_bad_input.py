"""What a user may get wrong: a sentence, a code, and a device that is where it is said to be."""

import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import stream_oracle
from cli_runner import Run, run, run_process, state_of
from devices import Simulated, into_pipe, names_in
from vfiomig import MigrationError, SaveOptions, load, save

DEVICE = "sim:device?size=5000&seed=1"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a device, and a stream for it."""
    monkeypatch.chdir(tmp_path)
    with Simulated("sim:?size=5000&seed=2") as device:
        save(device, "stream")
    assert run("info", DEVICE).code == 0
    return tmp_path


@pytest.fixture(scope="module")
def small() -> bytes:
    """A whole stream of few bytes: as for a pipe."""
    with Simulated("sim:?size=300&seed=2") as device:
        options = SaveOptions(config=b"a blob of no meaning")
        return into_pipe(lambda fd: save(device, fd, options))


def refused(source: object, code: int, *, reset: bool) -> Run:
    """Load what must be refused. reset: whether the device's own state may be lost."""
    before = Path("device").read_bytes()
    found = run("load", source, "sim:device")
    assert (found.code, found.out) == (code, "")
    assert found.err.startswith("vfiomig: ")
    assert state_of("sim:device") == "RUNNING"
    assert Path("device").read_bytes() == (bytes(5000) if reset else before)
    assert ("was reset and is RUNNING; nothing is loaded" in found.err) is reset
    return found


def test_an_empty_file() -> None:
    Path("empty").touch()
    assert "empty: the stream is empty (at byte 0)" in refused("empty", 7, reset=False).err


def test_a_file_that_is_something_else() -> None:
    Path("text").write_text("Dear Sir or Madam,\n" * 100)
    found = refused("text", 8, reset=False)
    assert "text: this is neither a vfiomig stream nor a QEMU section" in found.err
    Path("machine").write_bytes(b"QEVM" + bytes(1000))
    assert "of a whole QEMU machine" in refused("machine", 8, reset=False).err
    Path("guest").write_bytes(b"\x01\0\0\0\x01\x0ddev/pcnet/0\0\0" + bytes(100))
    assert "guest: " in refused("guest", 8, reset=False).err


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes(seed: int) -> None:
    Path("noise").write_bytes(random.Random(seed).randbytes(9000))
    refused("noise", 8, reset=False)


def test_a_directory_a_missing_file_and_a_file_without_rights() -> None:
    assert "cannot read .: Is a directory" in refused(".", 10, reset=False).err
    assert "cannot open none: No such file" in refused("none", 10, reset=False).err
    assert "cannot open stream/x: Not a directory" in refused("stream/x", 10, reset=False).err
    with socket.socket(socket.AF_UNIX) as lone:
        lone.bind("socket")
        assert "cannot open socket" in refused("socket", 10, reset=False).err


def test_endless_and_empty_devices() -> None:
    assert "neither a vfiomig stream" in refused("/dev/zero", 8, reset=False).err
    assert "the stream is empty" in refused("/dev/null", 7, reset=False).err
    endless = Path("stream").read_bytes()[:16384]  # to the header of 5000 bytes
    code, _, err = run_process("load", "-", "sim:device", stdin=endless + bytes(1 << 20))
    assert (code, b"the state in frame 1 is damaged" in err) == (7, True)
    assert state_of("sim:device") == "RUNNING"


def test_bytes_after_the_end() -> None:
    Path("long").write_bytes(Path("stream").read_bytes() + b"\0")
    assert "bytes after the end of the stream" in refused("long", 7, reset=True).err
    Path("twice").write_bytes(Path("stream").read_bytes() * 2)
    refused("twice", 7, reset=True)


def test_a_newer_version() -> None:
    newer = stream_oracle.prologue(4096, version=2) + Path("stream").read_bytes()[4096:]
    Path("newer").write_bytes(newer)
    assert "newer: the stream has version 2" in refused("newer", 8, reset=False).err


def test_a_stream_of_another_device() -> None:
    assert run("save", "sim:?profile=mlx5&size=5000", "other").code == 0
    found = refused("other", 8, reset=False)
    assert "other is of another device than sim:device: driver 'sim:mlx5'" in found.err
    assert "hint: if you know that it fits: --allow-mismatch driver" in found.err


def test_several_devices_in_one_stream() -> None:
    Path("two").write_bytes(stream_oracle.write([], stream_oracle.manifest(2)))
    assert "holds 2 devices, not one" in refused("two", 8, reset=False).err


def load_bytes(stream: bytes, device: Simulated) -> MigrationError | None:
    """Load a stream from a memfd; return the error, if it is one."""
    with os.fdopen(os.memfd_create("stream"), "w+b") as file:
        file.write(stream)
        file.seek(0)
        try:
            load(file, device)
        except MigrationError as err:
            return err
    return None


def test_every_truncation_is_refused(small: bytes) -> None:
    with Simulated("sim:?size=300") as device:
        for length in range(0, len(small), 64):
            err = load_bytes(small[:length], device)
            assert err is not None
            assert (err.code, device.state().name, any(device.content()[:0])) == (
                7,
                "RUNNING",
                False,
            )
        assert load_bytes(small, device) is None


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_refused(small: bytes, seed: int) -> None:
    dice = random.Random(seed)
    with Simulated("sim:?size=300") as device:
        for _ in range(150):
            damaged = bytearray(small)
            bit = dice.randrange(len(small) * 8)
            damaged[bit // 8] ^= 1 << bit % 8
            err = load_bytes(bytes(damaged), device)
            assert err is not None, f"seed {seed}, bit {bit}"
            assert err.code in (7, 8)
            assert device.state().name == "RUNNING"


def test_a_truncation_is_named_with_its_place() -> None:
    whole = Path("stream").read_bytes()
    for length in (1, 63, 4096, 8191, 12288, 15000, len(whole) - 1):
        Path("cut").write_bytes(whole[:length])
        found = refused("cut", 7, reset=length >= 12288)
        assert "cut: the stream ends" in found.err
        assert f"(at byte {length})" in found.err
        assert run("verify", "cut").code == run("inspect", "cut").code == 7


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**41])
def test_a_qemu_record_of_any_length_is_no_allocation(length: int) -> None:
    assert run("save", DEVICE, "qemu", "--framing", "qemu").code == 0
    stream = bytearray(Path("qemu").read_bytes())
    at = stream.index((5000).to_bytes(8, "big"))
    stream[at : at + 8] = length.to_bytes(8, "big")
    Path("bomb").write_bytes(stream)
    found = refused("bomb", 7, reset=True)
    assert f"a length of {length} bytes makes more than" in found.err
    assert "--max-state" in found.err


# Fifos.


def through_fifo(stream: bytes, code: int) -> Run:
    """Load from a fifo that somebody writes a stream to."""
    os.mkfifo("fifo")

    def write() -> None:
        with Path("fifo").open("wb") as fifo:
            fifo.write(stream)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        found = run("load", "fifo", "sim:device")
    finally:
        thread.join()
    assert found.code == code
    assert state_of("sim:device") == "RUNNING"
    return found


def test_a_fifo_that_gives_a_stream() -> None:
    through_fifo(Path("stream").read_bytes(), 0)
    with Simulated("sim:?size=5000&seed=2") as device:
        assert Path("device").read_bytes() == device.content()


def test_a_fifo_whose_writer_closes_at_once() -> None:
    assert "fifo: the stream is empty" in through_fifo(b"", 7).err


# Targets.


def unsaved(target: object, code: int) -> Run:
    """Save to a target that must be refused; nothing is left, the device is as it was."""
    before, device = names_in(Path()), Path("device").read_bytes()
    found = run("save", "sim:device", target)
    assert (found.code, found.out) == (code, "")
    assert (names_in(Path()), Path("device").read_bytes()) == (before, device)
    assert state_of("sim:device") == "RUNNING"
    return found


TARGETS: dict[str, tuple[Callable[[], object], str]] = {
    "exists": (lambda: "stream", "vfiomig: stream exists\n  hint: choose another name"),
    "full": (lambda: "/dev/full", "/dev/full: No space left on device"),
    "directory": (lambda: ".", "cannot write .: Is a directory"),
    "missing directory": (lambda: "none/out", "cannot write none/out: No such file or directory"),
    "file as directory": (lambda: "stream/out", "cannot write stream/out: Not a directory"),
    "no file system for it": (lambda: "/proc/out", "cannot write /proc/out: "),
    "a long name": (lambda: "x" * 300, "File name too long"),
    "empty name": (lambda: "", "vfiomig: "),
}


@pytest.mark.parametrize(("target", "text"), TARGETS.values(), ids=TARGETS)
def test_targets_that_cannot_be(target: Callable[[], object], text: str) -> None:
    stream = Path("stream").read_bytes()
    assert text in unsaved(target(), 10).err
    assert Path("stream").read_bytes() == stream


# The device's own files.


def test_a_device_file_that_is_not_one() -> None:
    Path("device.sim").write_text("{}")
    found = run("state", "sim:device")
    assert (found.code, "device.sim does not describe a simulated device" in found.err) == (
        10,
        True,
    )


def test_a_device_in_a_place_that_is_not_there() -> None:
    found = run("save", "sim:none/device", "out")
    assert (found.code, "sim:none/device: No such file or directory" in found.err) == (5, True)


# What a stream says is shown as text.

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\u202e"


def test_names_in_a_stream_cannot_drive_the_terminal() -> None:
    described = stream_oracle.manifest()
    described["tool"] = HOSTILE
    described["devices"][0]["name"] = HOSTILE
    described["devices"][0]["identity"]["driver"] = HOSTILE
    Path("hostile").write_bytes(stream_oracle.write([stream_oracle.data(b"x")], described))
    for words in (
        ["inspect", "hostile"],
        ["inspect", "hostile", "--frames"],
        ["verify", "hostile"],
        ["diff", "hostile", "stream"],
        ["load", "hostile", "sim:device"],
        ["load", "hostile", "sim:device", "--dry-run"],
    ):
        found = run(*words)
        said = found.out + found.err
        assert not {char for char in said if not char.isprintable()} - {"\n"}, words
        assert "Traceback" not in said
    assert "\\x1b]0;owned\\x07" in run("inspect", "hostile").out


def test_names_of_files_cannot_drive_the_terminal() -> None:
    Path("\x1b[31m").write_bytes(Path("stream").read_bytes())
    for words in (["inspect"], ["verify"], ["load", "sim:device"]):
        found = run(words[0], "\x1b[31m", *words[1:])
        assert (found.code, "\x1b" in found.out + found.err) == (0, False)
    assert "\x1b" not in run("load", "\x1b[32m", "sim:device").err
    assert "\x1b" not in run("info", "sim:\x1b[33m?size=10").out
