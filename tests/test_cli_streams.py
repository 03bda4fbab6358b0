"""The command as a process: pipes, standard output, terminals, and what is said there."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import stream_oracle
from cli_runner import VFIOMIG, documents, entered, run, run_process, start, state_of, wait_for
from devices import names_in
from vfiomig.fd import OwnedFd

ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "TERM", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_stream_on_stdout_has_its_talk_on_stderr() -> None:
    code, out, err = run_process("save", "sim:a?size=3000001", "-")
    assert code == 0
    assert stream_oracle.read(out).states == [Path("a").read_bytes()]
    assert err.startswith(b"saved sim:a to standard output\n")
    code, out, err = run_process("save", "sim:a", "-", "--json")
    assert (code, documents(err.decode())[-1]["type"]) == (0, "result")
    assert stream_oracle.read(out).states == [Path("a").read_bytes()]
    code, out, err = run_process("save", "sim:a", "-", "--quiet")
    assert (code, err, len(stream_oracle.read(out).states)) == (0, b"", 1)


def test_errors_of_a_stream_on_stdout_leave_it_alone() -> None:
    for words in (["--framing", "tar"], ["--buffer", "1"], ["--pre-copy-time", "x"]):
        code, out, err = run_process("save", "sim:a", "-", *words)
        assert (code, out) == (2, b"")
        assert err.startswith(b"vfiomig: ")


def test_one_command_pipes_into_another() -> None:
    line = (
        f"{VFIOMIG} save 'sim:a?size=3000001&seed=3' - -q |"
        f" {VFIOMIG} load - 'sim:b?size=3000001' --json"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, check=True, timeout=60
    )
    assert documents(done.stdout.decode())[-1]["file"] == "standard input"
    assert Path("a").read_bytes() == Path("b").read_bytes()
    code, out, _ = run_process("inspect", "-", stdin=run_process("save", "sim:a", "-")[1])
    assert (code, b"sound to the end" in out) == (0, True)


def test_a_reader_of_the_stream_that_goes_away_is_an_error() -> None:
    read_fd, write_fd = os.pipe()
    with start("save", "sim:a?size=3M", "-", stdout=write_fd, stderr=subprocess.PIPE) as process:
        os.close(write_fd)
        os.read(read_fd, 5000)
        os.close(read_fd)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 10
    assert b"standard output: its reader has closed it" in err
    assert b"now: sim:a is RUNNING" in err
    assert state_of("sim:a") == "RUNNING"


@pytest.mark.parametrize("words", [["list"], ["info", "sim:"], ["--help"], ["state", "sim:"]])
def test_a_reader_of_words_that_goes_away_is_no_error_of_ours(words: list[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with start(*words, stdout=write_fd, stderr=subprocess.PIPE) as process:
        os.close(write_fd)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")


def test_a_reader_of_records_that_goes_away_stops_the_work_and_rolls_back() -> None:
    read_fd, write_fd = os.pipe()
    words = ["save", "sim:a?size=8M&bandwidth=20M", "out", "--json"]
    with start(*words, stdout=write_fd, stderr=subprocess.PIPE) as process:
        os.close(write_fd)
        os.read(read_fd, 1)
        os.close(read_fd)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")
    assert names_in(Path()) == ["a", "a.sim"]
    assert state_of("sim:a") == "RUNNING"


def test_the_code_of_an_error_survives_that_it_cannot_be_told() -> None:
    lost = "save 'sim:?size=5000&fault=set:EIO@STOP:ERROR&fault=reset:EIO' out --json"
    for where in ("> /dev/full", ">&-", "> /dev/full 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f"{VFIOMIG} {lost} {where}"], capture_output=True, check=False
        )
        # What cannot be written ends the work first; the device then does not come back.
        assert done.returncode == 20
        assert b"Traceback" not in done.stderr
        assert (b"cannot be reset" in done.stderr) is not where.endswith("2>&-")


def test_a_full_device_for_words_is_an_error() -> None:
    with Path("/dev/full").open("wb") as full:
        for words in (["list"], ["--help"], ["state", "sim:"]):
            with start(*words, stdout=full, stderr=subprocess.PIPE) as process:
                _, err = process.communicate(timeout=60)
            assert process.returncode == 10
            assert b"No space left on device" in err
            assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("save 'sim:a?size=5000' - >&-", 10),
        ("load - sim:a <&-", 10),
        ("save sim:a - --json >&- 2>&-", 10),
        ("list >&-", 10),
        ("list --json >&-", 10),
        ("list 2>&-", 0),
        ("nothing 2>&-", 2),
        ("save sim:a out 2>&-", 0),
        ("load out sim:a <&- 2>&-", 0),
        ("load - sim:a --dry-run < /dev/null", 2),
    ],
)
def test_standard_streams_may_be_closed(line: str, code: int) -> None:
    assert run("save", "sim:a?size=5000", "out").code == 0
    Path("out").rename("kept")
    line = line.replace("load out", "load kept")
    done = subprocess.run(
        ["bash", "-c", f"{VFIOMIG} {line}"], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert state_of("sim:a") == "RUNNING"


def test_words_fit_into_any_encoding() -> None:
    for encoding in ("ascii", "latin-1"):
        name = "sim:\u00e9\u4e2d?size=5000"
        code, out, _ = run_process("info", name, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (code, b"capabilities" in out) == (0, True)
        assert run_process("load", "--help", PYTHONIOENCODING=encoding)[0] == 0


def test_a_name_that_is_no_text_is_shown_escaped(here: Path) -> None:
    code, out, _ = run_process(
        "save", "sim:?size=5000", b"\xff\x1b[31m".decode(errors="surrogateescape")
    )
    assert (code, names_in(here)) == (0, ["\udcff\x1b[31m"])
    assert b"\x1b" not in out
    assert b"to \\udcff\\x1b[31m\n" in out


# Terminals.


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A pty of 100 columns: our end, and the end for the command."""
    ours, theirs = pty.openpty()
    with OwnedFd(ours), OwnedFd(theirs):
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        yield ours, theirs


def shown(ours: int, process: "subprocess.Popen[bytes]") -> bytes:
    """Return what a process wrote to the terminal until it ended."""
    text = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            text += os.read(ours, 65536)
    return text


def save_on_terminal(*words: str, **environment: str) -> bytes:
    url = "sim:?size=4M&bandwidth=10M"
    with terminal() as (ours, theirs):
        environment = os.environ | {"TERM": "xterm"} | environment
        arguments = ["save", url, "/dev/null", *words]
        with start(
            *arguments, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
        ) as process:
            return shown(ours, process)


def test_a_bar_is_drawn_on_a_terminal() -> None:
    text = save_on_terminal()
    assert ANSI.search(text)
    assert b"stop-copy" in text
    assert b"MiB" in text


def test_no_colour_means_none() -> None:
    text = save_on_terminal(NO_COLOR="1")
    assert b"stop-copy" in text
    assert not [code for code in ANSI.findall(text) if code.endswith(b"m") and code != b"\x1b[0m"]


def test_where_no_bar_belongs_there_is_none() -> None:
    assert save_on_terminal(TERM="dumb") == b""
    assert save_on_terminal("--quiet") == b""
    assert save_on_terminal("--json") == b""
    assert not ANSI.search(run_process("save", "sim:?size=4M", "/dev/null")[2])


def test_a_stream_is_not_written_to_a_terminal_nor_read_from_one() -> None:
    with terminal() as (_, theirs):
        with start(
            "save", "sim:a?size=5000", "-", stdout=theirs, stderr=subprocess.PIPE
        ) as process:
            _, err = process.communicate(timeout=60)
        assert (process.returncode, b"standard output is a terminal" in err) == (2, True)
        assert names_in(Path()) == []
        with start("load", "-", "sim:", stdin=theirs, stderr=subprocess.PIPE) as process:
            _, err = process.communicate(timeout=60)
        assert (process.returncode, b"standard input is a terminal" in err) == (2, True)


# SIGUSR1.


def test_usr1_shows_where_the_work_stands() -> None:
    words = ["save", "sim:a?size=8M&bandwidth=8M", "/dev/null", "-v"]
    with start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(b"-> STOP_COPY" in line for line in process.stderr)
        process.send_signal(signal.SIGUSR1)
        pattern = re.compile(rb"vfiomig: (stop-copy: .* of about 8 MiB in|nothing copied yet)")
        assert any(pattern.match(line) for line in process.stderr)
        process.stderr.read()
        assert process.wait(60) == 0


def test_usr1_is_a_record_with_json() -> None:
    words = ["save", "sim:a?size=16M&bandwidth=8M", "/dev/null", "--json"]
    with start(*words, stdout=subprocess.PIPE) as process:
        wait_for(process, lambda document: document["type"] == "progress")
        process.send_signal(signal.SIGUSR1)
        told = wait_for(process, lambda document: document["type"] == "progress")
        assert (told["phase"], told["expected_bytes"]) == ("stop-copy", 16 << 20)
        wait_for(process, entered("RUNNING"))
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(60) == 0


def test_a_running_command_has_the_device_for_itself() -> None:
    url = "sim:a?size=8M&bandwidth=8M"
    with start("save", url, "/dev/null", "--json", stdout=subprocess.PIPE) as process:
        wait_for(process, entered("STOP_COPY"))
        for words in (["save", "sim:a", "x"], ["state", "sim:a"], ["reset", "sim:a"]):
            found = run(*words)
            assert (found.code, "in use by another process" in found.err) == (5, True)
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(60) == 0
