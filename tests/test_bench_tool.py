"""One run of a foreign program: descriptors, figures, failure, the end by cancellation."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from devices import failure_of, no_leak
from vfiomig import Cancellation, CancelledError
from vfiomig.bench.tool import ToolError, ToolRun, run_tool
from vfiomig.fd import OwnedFd

SH = shutil.which("sh") or ""
FIGURES = "bytes=5 seconds=1 user=0.25 sys=0.5 start_ns=7 end_ns=9 peak_kib=11"


@pytest.fixture
def cancellation() -> Iterator[Cancellation]:
    with closing(Cancellation()) as found:
        yield found


@pytest.fixture
def run(
    cancellation: Cancellation, filled: Callable[[bytes], OwnedFd]
) -> Iterator[Callable[..., tuple[ToolRun, bytes]]]:
    def call(program: str, *, figures: bool = False) -> tuple[ToolRun, bytes]:
        with filled(b"state") as source, OwnedFd(os.memfd_create("sink")) as sink:
            fds = source.fileno(), sink.fileno(), cancellation.fileno()
            found = run_tool([SH, "-c", program], *fds, figures=figures)
            return found, os.pread(sink.fileno(), 100, 0)

    with no_leak():
        yield call


def test_a_tool_reads_the_source_and_writes_the_sink(
    run: Callable[..., tuple[ToolRun, bytes]],
) -> None:
    found, written = run("cat")
    assert (written, found.device_bytes) == (b"state", None)
    assert found.usage.start_ns < found.usage.end_ns


def test_a_program_with_figures_writes_descriptor_3_and_is_believed(
    run: Callable[..., tuple[ToolRun, bytes]],
) -> None:
    found, written = run(f"cat >&3; echo {FIGURES}", figures=True)
    usage = found.usage
    assert (written, found.device_bytes) == (b"state", 5)
    assert (usage.start_ns, usage.end_ns, usage.cpu_s, usage.peak_kib) == (7, 9, 0.75, 11)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo first >&2; echo no room >&2; exit 3", "sh: no room"),
        ("exit 3", "sh: exit code 3"),
        ("kill -PIPE $$", "sh: killed by SIGPIPE"),
    ],
)
def test_a_tool_that_fails_says_why(
    run: Callable[..., tuple[ToolRun, bytes]], program: str, said: str
) -> None:
    failed = failure_of(lambda: run(program))
    assert isinstance(failed, ToolError)
    assert str(failed) == said


def test_a_program_without_figures_is_a_failure(
    run: Callable[..., tuple[ToolRun, bytes]],
) -> None:
    assert "prints no figures" in str(failure_of(lambda: run("echo bytes=1", figures=True)))


def test_nothing_is_inherited_but_the_descriptors_it_needs(
    run: Callable[..., tuple[ToolRun, bytes]],
) -> None:
    _, written = run("readlink /proc/self/fd/*; true")
    memfds = [line.split()[0] for line in written.splitlines() if b"memfd" in line]
    assert memfds == [b"/memfd:content", b"/memfd:sink", b"/memfd:words"]


def test_signals_are_as_a_shell_would_give_them(
    cancellation: Cancellation, filled: Callable[[bytes], OwnedFd]
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # Not through a shell: that would have its own way with signals.
    words = [shutil.which("grep") or "", "-E", "SigBlk|SigIgn", "/proc/self/status"]
    try:
        with filled(b"") as source, OwnedFd(os.memfd_create("sink")) as sink:
            fds = source.fileno(), sink.fileno(), cancellation.fileno()
            run_tool(words, *fds, figures=False)
            written = os.pread(sink.fileno(), 100, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked, ignored = (int(line.split()[1], 16) for line in written.splitlines())
    ours = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE)
    assert (blocked, [number for number in ours if ignored >> (number - 1) & 1]) == (0, [])


def test_a_tool_that_hangs_is_killed_when_cancelled(
    run: Callable[..., tuple[ToolRun, bytes]], cancellation: Cancellation
) -> None:
    cancellation.cancel()
    failed = failure_of(lambda: run("exec sleep 1000"))
    assert isinstance(failed, CancelledError)
