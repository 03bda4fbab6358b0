"""Save and load by the command: its words, its records, its streams, and signals."""

import os
import signal
from pathlib import Path

import pytest

import stream_oracle
from kernel.command import installed, run, start
from kernel.mtty import DESTINATION, SOURCE, Mtty, state_bytes
from kernel.streams import PIPE_BYTES, state_in
from vfiomig import DeviceState
from vfiomig.fd import OwnedFd

PAGE_BYTES = 4096


def test_a_state_is_saved_to_a_file_and_loaded(
    source: Mtty, destination: Mtty, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    done = installed("save", source.uuid, str(file))
    assert done.code == 0
    assert done.text.startswith(f"saved {source.uuid} to {file}\n")
    assert "state    96 B (96 bytes)" in done.text
    assert f"device   {source.uuid} is RUNNING" in done.text
    assert file.stat().st_mode & 0o777 == 0o600
    done = installed("load", str(file), destination.uuid)
    assert done.code == 0
    assert done.text.startswith(f"loaded {file} into {destination.uuid}\n")
    assert (source.is_untouched(SOURCE), destination.is_untouched(SOURCE)) == (True, True)


def test_the_records_of_both_ends_agree(source: Mtty, destination: Mtty, tmp_path: Path) -> None:
    file = str(tmp_path / "state")
    out = run("save", source.uuid, file, "--json", "--pre-copy")
    back = run("load", file, destination.uuid, "--json")
    assert (out.code, back.code) == (0, 0)
    steps = [record["wanted"] for record in out.of_type("transition")]
    assert steps == ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP", "RUNNING_P2P", "RUNNING"]
    steps = [record["wanted"] for record in back.of_type("transition")]
    loading = ["RUNNING_P2P", "STOP", "RESUMING", "STOP", "RUNNING_P2P", "RUNNING"]
    assert steps == loading
    one, other = out.records[-1], back.records[-1]
    assert (one["type"], other["type"]) == ("result", "result")
    assert (one["device_bytes"], one["digest"]) == (96, other["digest"])
    assert (one["device"], other["device"]) == (source.uuid, destination.uuid)


@pytest.mark.parametrize("framing", ["native", "qemu"])
def test_two_commands_are_joined_by_a_pipe(source: Mtty, destination: Mtty, framing: str) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd) as reader, OwnedFd(write_fd) as writer:
        saving = start("save", source.uuid, "-", "--framing", framing, stdout=writer.fileno())
        loading = start("load", "-", destination.uuid, stdin=reader.fileno())
        writer.close()
        with saving, loading:
            assert (saving.finish().code, loading.finish().code) == (0, 0)
    assert destination.is_untouched(SOURCE)


def test_after_stop_leaves_both_stopped_and_state_says_so(
    source: Mtty, destination: Mtty, tmp_path: Path
) -> None:
    file = str(tmp_path / "state")
    assert run("save", source.uuid, file, "--after", "stop").code == 0
    assert run("load", file, destination.uuid, "--after", "stop").code == 0
    for device in (source, destination):
        assert run("state", device.uuid).text == "STOP\n"
        assert run("state", device.uuid, "--set", "running").text == "RUNNING\n"
    assert destination.is_untouched(SOURCE)


def test_a_file_that_exists_is_not_replaced_unasked(source: Mtty, tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("precious")
    done = run("save", source.uuid, str(file))
    assert (done.code, file.read_text()) == (10, "precious")
    assert run("save", source.uuid, str(file), "--force").code == 0
    assert state_in(file.read_bytes()) == state_bytes(SOURCE)


def test_a_reader_that_goes_away_leaves_the_device_running(source: Mtty) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with OwnedFd(write_fd), start("save", source.uuid, "-", stdout=write_fd) as saving:
        done = saving.finish()
    assert done.code == 10
    assert f"now: {source.uuid} is RUNNING" in done.err
    assert source.is_untouched(SOURCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_save_whose_reader_stalls_and_the_device_runs(
    source: Mtty, almost_full_pipe: tuple[int, int], number: signal.Signals
) -> None:
    _, write_fd = almost_full_pipe
    with start("save", source.uuid, "-", "-v", stdout=write_fd) as saving:
        saving.wait_for_talk("STOP -> STOP_COPY")
        saving.signal(number)
        done = saving.finish()
    assert done.code == 128 + number
    assert f"stopped by {number.name}" in done.err
    assert f"now: {source.uuid} is RUNNING" in done.err
    assert source.is_untouched(SOURCE)


def test_a_save_whose_reader_stalls_goes_on_when_it_reads(
    source: Mtty, almost_full_pipe: tuple[int, int]
) -> None:
    read_fd, write_fd = almost_full_pipe
    with start("save", source.uuid, "-", "-v", stdout=write_fd) as saving:
        saving.wait_for_talk("STOP -> STOP_COPY")
        received = bytearray()
        while not received.endswith(b"VMfr") and len(received) < PIPE_BYTES:
            received += os.read(read_fd, PAGE_BYTES)
        assert saving.finish().code == 0
        received += os.read(read_fd, PIPE_BYTES)
    assert state_in(bytes(received).lstrip(b"\0")) == state_bytes(SOURCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_load_whose_writer_stalls_and_the_device_runs(
    stream: bytes, destination: Mtty, number: signal.Signals
) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd):
        os.write(write_fd, stream[: stream.index(state_bytes(SOURCE)) + 48])
        with start("load", "-", destination.uuid, "-v", stdin=read_fd) as loading:
            loading.wait_for_talk("STOP -> RESUMING")
            loading.signal(number)
            done = loading.finish()
    assert done.code == 128 + number
    assert "was reset and is RUNNING; nothing is loaded" in done.err
    assert destination.is_untouched(DESTINATION)


def test_a_fifo_is_a_stream_like_any_other(source: Mtty, destination: Mtty, tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    with start("save", source.uuid, fifo) as saving, start("load", fifo, destination.uuid) as load:
        assert (saving.finish().code, load.finish().code) == (0, 0)
    assert destination.is_untouched(SOURCE)


def test_a_stream_of_the_command_keeps_to_the_documented_format(source: Mtty) -> None:
    done = run("save", source.uuid, "-", "--pre-copy")
    read = stream_oracle.read(done.out)
    assert read.manifest["devices"][0]["name"] == source.uuid
    assert read.manifest["devices"][0]["identity"]["driver"] == "mtty"
    assert read.manifest["devices"][0]["stop_copy_length"] == 96
    kinds = [(frame.kind, frame.flags) for frame in read.frames]
    data = stream_oracle.DATA
    assert kinds[1:3] == [(data, stream_oracle.PRE_COPY), (data, 0)]
    assert DeviceState[read.manifest["devices"][0]["capabilities"][0]] is DeviceState.STOP_COPY
