"""Signals at a real process: SIGINT and SIGTERM at every moment, twice, on pipes; SIGKILL."""

import fcntl
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli_runner import VFIOMIG, entered, run, start, state_of, wait_for
from devices import names_in

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
# A hang makes the moment: the process is there until it is over.
SAVE_MOMENTS = {
    "before the stop": ("fault=hang:600ms@set:STOP", "RUNNING", "RUNNING_P2P"),
    "pre-copy": ("bandwidth=2M", "RUNNING", "PRE_COPY"),
    "switch-over": ("fault=hang:600ms@set:STOP_COPY", "PRE_COPY", "PRE_COPY_P2P"),
    "stop-copy": ("fault=hang:600ms@read:4M&bandwidth=100M", "STOP", "STOP_COPY"),
    "slow stop-copy": ("bandwidth=2M", "STOP", "STOP_COPY"),
    "resume": ("fault=hang:600ms@set:RUNNING", "STOP_COPY", "STOP"),
    "end": ("fault=hang:600ms@set:RUNNING", "STOP", "RUNNING_P2P"),
}
LOAD_MOMENTS = {
    "before": ("fault=hang:600ms@set:RESUMING", "STOP"),
    "resuming": ("bandwidth=2M", "RESUMING"),
    "hanging": ("fault=hang:600ms@write:1M&bandwidth=100M", "RESUMING"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def started(*words: object, **arguments: Any) -> Iterator["subprocess.Popen[bytes]"]:  # noqa: ANN401
    """Start the command with --json; kill it when the test fails."""
    with start(*words, "--json", **arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def ending(process: "subprocess.Popen[bytes]") -> tuple[int, dict[str, Any]]:
    """Return the exit code of a process, and its last document."""
    last = wait_for(process, lambda document: document["type"] in ("error", "result"))
    return process.wait(60), last


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize(("query", "before", "state"), SAVE_MOMENTS.values(), ids=SAVE_MOMENTS)
def test_a_save_that_is_stopped_leaves_the_device_running_and_no_file(
    query: str, before: str, state: str, number: signal.Signals, code: int
) -> None:
    run("info", "sim:a?size=8M&seed=1")
    content = Path("a").read_bytes()
    options = ["--pre-copy"] if "PRE_COPY" in state else []
    with started("save", f"sim:a?{query}", "out", *options, stdout=subprocess.PIPE) as process:
        wait_for(process, lambda told: told.get("before") == before and entered(state)(told))
        assert any(name.startswith(".out.partial-") for name in os.listdir())
        process.send_signal(number)
        found, last = ending(process)
    assert (found, last["code"], last["type"]) == (code, code, "error")
    assert last["message"] == f"stopped by {number.name}"
    assert (last["actual_state"], last["aftermath"]) == ("RUNNING", "sim:a is RUNNING")
    assert names_in(Path()) == ["a", "a.sim"]
    assert (state_of("sim:a"), Path("a").read_bytes() == content) == ("RUNNING", True)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize(("query", "state"), LOAD_MOMENTS.values(), ids=LOAD_MOMENTS)
def test_a_load_that_is_stopped_leaves_the_device_reset(
    query: str, state: str, number: signal.Signals, code: int
) -> None:
    run("save", "sim:?size=8M&seed=1", "stream")
    run("info", "sim:a?size=8M")
    with started("load", "stream", f"sim:a?{query}", stdout=subprocess.PIPE) as process:
        wait_for(process, entered(state))
        process.send_signal(number)
        found, last = ending(process)
    assert (found, last["code"], last["actual_state"]) == (code, code, "RUNNING")
    assert last["aftermath"] == "sim:a was reset and is RUNNING; nothing is loaded"
    assert names_in(Path()) == ["a", "a.sim", "stream"]
    assert (state_of("sim:a"), any(Path("a").read_bytes())) == ("RUNNING", False)
    assert run("load", "stream", "sim:a").code == 0


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_tear_the_roll_back(second: signal.Signals) -> None:
    url = "sim:a?size=8M&bandwidth=100M&fault=hang:600ms@read:1M&fault=hang:600ms@set:RUNNING"
    with started("save", url, "out", stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP_COPY"))
        process.send_signal(signal.SIGINT)
        wait_for(process, entered("RUNNING_P2P"))
        process.send_signal(second)
        found, last = ending(process)
    assert (found, last["message"]) == (130, "stopped by SIGINT")
    assert last["aftermath"] == "sim:a is RUNNING"
    assert (names_in(Path()), state_of("sim:a")) == (["a", "a.sim"], "RUNNING")


def test_a_hang_up_is_a_signal_like_the_others() -> None:
    with started("save", "sim:a?size=8M&bandwidth=2M", "out", stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP_COPY"))
        process.send_signal(signal.SIGHUP)
        found, last = ending(process)
    assert (found, last["message"]) == (129, "stopped by SIGHUP")
    assert (names_in(Path()), state_of("sim:a")) == (["a", "a.sim"], "RUNNING")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    line = f"trap '' HUP; exec {VFIOMIG} save 'sim:a?size=2M&bandwidth=4M' out --json"
    with subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP_COPY"))
        process.send_signal(signal.SIGHUP)
        found, last = ending(process)
    assert (found, last["type"]) == (0, "result")


def test_a_storm_of_signals_does_not_tear_the_roll_back() -> None:
    url = "sim:a?size=8M&fault=hang:100ms@set:STOP_COPY&fault=hang:100ms@set:RUNNING"
    for _ in range(3):
        with started("save", url, "out", stdout=subprocess.PIPE) as process:
            wait_for(process, entered("STOP"))
            process.send_signal(signal.SIGINT)
            wait_for(process, entered("STOP_COPY"))
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
            found, last = ending(process)
        assert (found, last["message"]) == (130, "stopped by SIGINT")
        assert last["aftermath"] == "sim:a is RUNNING"
        assert (names_in(Path()), state_of("sim:a")) == (["a", "a.sim"], "RUNNING")


def test_a_device_that_does_not_come_back_matters_more_than_the_signal() -> None:
    faults = "fault=hang:600ms@set:STOP_COPY&fault=set:EIO@RUNNING:ERROR&fault=reset:EIO"
    with started("save", f"sim:a?size=5000&{faults}", "out", stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP"))
        process.send_signal(signal.SIGINT)
        found, last = ending(process)
    assert (found, last["code"], last["actual_state"]) == (20, 20, "ERROR")
    assert last["recoverable"] is False
    assert (names_in(Path()), state_of("sim:a")) == (["a", "a.sim"], "ERROR")


def wait_until_full(pipe_fd: int) -> None:
    """Return once nobody could write a page more."""
    full = False
    while not full:
        os.sched_yield()
        queued = int.from_bytes(fcntl.ioctl(pipe_fd, termios.FIONREAD, bytes(4)), "little")
        full = queued >= fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ) - 4096


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_save_that_waits_for_its_reader_can_be_stopped(number: signal.Signals, code: int) -> None:
    read_fd, write_fd = os.pipe()
    with (
        open(read_fd, "rb") as reader,
        started("save", "sim:a?size=8M", "-", stdout=write_fd, stderr=subprocess.PIPE) as process,
    ):
        os.close(write_fd)
        wait_for(process, entered("STOP_COPY"), stderr=True)
        wait_until_full(reader.fileno())
        process.send_signal(number)
        last = wait_for(process, lambda document: document["type"] == "error", stderr=True)
        assert (process.wait(60), last["aftermath"]) == (code, "sim:a is RUNNING")
    assert state_of("sim:a") == "RUNNING"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_load_that_waits_for_its_writer_can_be_stopped(number: signal.Signals, code: int) -> None:
    run("save", "sim:?size=1M", "stream")
    run("info", "sim:a?size=1M")
    pipe = subprocess.PIPE
    with started("load", "-", "sim:a", stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        process.stdin.write(Path("stream").read_bytes()[:100_000])
        process.stdin.flush()
        wait_for(process, entered("RESUMING"))
        process.send_signal(number)
        found, last = ending(process)
    assert (found, "was reset" in last["aftermath"]) == (code, True)
    assert state_of("sim:a") == "RUNNING"


@pytest.mark.parametrize("words", [["load", "fifo", "sim:a"], ["save", "sim:a", "fifo"]])
def test_a_fifo_without_a_partner_can_be_left(words: list[str]) -> None:
    os.mkfifo("fifo")
    run("info", "sim:a?size=5000")
    with started(*words, stdout=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/wchan")
        blocked = False
        while not blocked:  # in open(2) of the fifo
            os.sched_yield()
            blocked = status.read_text() in ("wait_for_partner", "fifo_open")
        process.send_signal(signal.SIGINT)
        found, last = ending(process)
    assert (found, last["message"]) == (130, "stopped by SIGINT")
    assert state_of("sim:a") == "RUNNING"


def test_a_killed_save_leaves_the_device_where_it_was_and_no_whole_file() -> None:
    with started("save", "sim:a?size=8M&bandwidth=2M", "out", stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP_COPY"))
        process.kill()
    assert "out" not in names_in(Path())
    assert state_of("sim:a") == "STOP_COPY"
    assert run("save", "sim:a", "out").code == 5
    assert run("reset", "sim:a").code == 0
    assert run("save", "sim:a", "out").code == 0
