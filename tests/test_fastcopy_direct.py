"""Past the page cache: several threads that each write at their own place of a file."""

import contextlib
import errno
import fcntl
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stream_oracle
from copying import (
    EVERYTHING,
    PAGE,
    Filled,
    InChild,
    checked,
    copied,
    only_threads,
    pattern,
    small_disk,
    thread_ids,
    whole,
    written,
)
from devices import Simulated, failure_of, no_leak
from vfiomig import QemuFraming, SaveOptions, UsageError, inspect, save
from vfiomig._fastcopy import Digest, FrameWriter, Outcome, StreamReader, Template
from vfiomig.fd import OwnedFd
from vfiomig.transport import Target

BUFFER = 1 << 16
STATE = pattern((6 << 20) + 12_345)
ALIGNED = checked(align=PAGE)
STREAM = written(ALIGNED, STATE, BUFFER)


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@contextlib.contextmanager
def direct(path: Path) -> Iterator[OwnedFd]:
    """A new file that is written past the page cache."""
    try:
        fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT))
    except OSError as err:
        pytest.skip(f"O_DIRECT is refused here: {err.strerror}")
    with fd:
        yield fd


def is_direct(fd: OwnedFd) -> bool:
    return bool(fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    """A directory where O_DIRECT refuses what is not aligned."""
    with direct(tmp_path / "probe") as fd, contextlib.suppress(OSError):
        os.write(fd.fileno(), b"abc")
        pytest.skip("this file system takes writes that are not aligned")
    return tmp_path


def cut(fd: OwnedFd) -> int:
    """Cut what several writers made longer ahead of them: at the file's offset. Returns that."""
    end = os.lseek(fd.fileno(), 0, os.SEEK_CUR)
    os.ftruncate(fd.fileno(), end)
    return end


def ring_of(fd: OwnedFd, writers: int = 4) -> FrameWriter:
    return FrameWriter(fd.fileno(), BUFFER, ring_slots=2 * writers, writers=writers)


@pytest.mark.parametrize("writers", [1, 2, 4, 8])
def test_aligned_frames_go_past_the_page_cache(
    tmp_path: Path, filled: Filled, writers: int
) -> None:
    with filled(STATE) as src, direct(tmp_path / "out") as fd:
        writer, before = ring_of(fd, writers), thread_ids()
        assert writer.copy(src.fileno(), ALIGNED, EVERYTHING, Digest()) is Outcome.END_OF_STREAM
        assert len(thread_ids() - before) == writers
        assert writer.stream_bytes == writer.direct_bytes == len(STREAM)
        assert is_direct(fd)
        assert cut(fd) == len(STREAM)
    assert (tmp_path / "out").read_bytes() == STREAM


def test_runs_of_zeros_keep_to_the_alignment(strict: Path, filled: Filled) -> None:
    state = (bytes(5 * PAGE) + STATE[: 11 * PAGE]) * 100 + bytes(777)
    with filled(state) as src, direct(strict / "out") as fd:
        writer = ring_of(fd)
        writer.copy(src.fileno(), ALIGNED, EVERYTHING, Digest())
        assert writer.direct_bytes == writer.stream_bytes
        assert writer.zero_bytes == 100 * 5 * PAGE + 777
        cut(fd)
    with OwnedFd(os.open(strict / "out", os.O_RDONLY)) as src:
        reader = StreamReader(src.fileno(), BUFFER)
        assert copied(reader, ALIGNED, Digest()) == (Outcome.OTHER_FRAME, state)


def test_what_is_put_between_keeps_its_place(tmp_path: Path, filled: Filled) -> None:
    first, last = b"1" * PAGE, b"2" * PAGE
    with filled(STATE) as src, direct(tmp_path / "out") as fd:
        os.lseek(fd.fileno(), PAGE, os.SEEK_SET)  # where the writer begins
        writer = ring_of(fd)
        writer.put(first)
        writer.copy(src.fileno(), ALIGNED, EVERYTHING, Digest())
        writer.put(last)
        cut(fd)
    assert (tmp_path / "out").read_bytes() == bytes(PAGE) + first + STREAM + last


def copy_unaligned(filled: Filled, path: Path, aligned_bytes: int) -> tuple[FrameWriter, bytes]:
    """Write frames on pages, so many bytes, and the rest on 64 bytes. Returns what was written."""
    template, digest = checked(align=64), Digest()
    with filled(STATE) as src, direct(path) as fd:
        writer = ring_of(fd)
        writer.copy(src.fileno(), ALIGNED, aligned_bytes, digest)
        writer.copy(src.fileno(), template, EVERYTHING, digest)
        assert not is_direct(fd)
        cut(fd)
    with OwnedFd(os.open(path, os.O_RDONLY)) as src:
        reader, digest = StreamReader(src.fileno(), BUFFER), Digest()
        _, start = copied(reader, ALIGNED, digest)
        _, end = copied(reader, template, digest)
        assert reader.offset == path.stat().st_size == writer.stream_bytes
    return writer, start + end


@pytest.mark.parametrize("aligned_bytes", [0, 1 << 20, 5 << 20])
def test_frames_that_are_not_aligned_go_through_the_page_cache(
    strict: Path, filled: Filled, aligned_bytes: int
) -> None:
    writer, found = copy_unaligned(filled, strict / "out", aligned_bytes)
    assert found == STATE
    assert writer.direct_bytes == len(written(ALIGNED, STATE[:aligned_bytes], BUFFER))


def test_a_file_in_memory_is_written_too(filled: Filled) -> None:
    path = Path(f"/dev/shm/direct-{os.getpid()}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    with filled(STATE) as src, OwnedFd(os.open(path, flags)) as fd:
        path.unlink()
        with contextlib.suppress(OSError):  # tmpfs before Linux 6.6
            fcntl.fcntl(fd.fileno(), fcntl.F_SETFL, os.O_DIRECT)
        ring_of(fd).copy(src.fileno(), ALIGNED, EVERYTHING, Digest())
        cut(fd)
        assert whole(fd) == STREAM


# What fails.


def check_failure(path: Path, filled: Filled, code: int, limit: Callable[[], None]) -> None:
    with filled(STATE) as src, direct(path) as fd, filled(b"") as other:
        threads, writer = thread_ids(), ring_of(fd)
        limit()
        with pytest.raises(OSError, match=os.strerror(code)):
            writer.copy(src.fileno(), ALIGNED, EVERYTHING, Digest())
        assert writer.failed_fd == fd.fileno()
        assert writer.direct_bytes <= writer.stream_bytes < len(STREAM)
        assert only_threads(threads)
        # The number may be another file's now: nobody must write to it any more.
        os.dup2(other.fileno(), fd.fileno())
        writer.close()
        assert whole(other) == b""


@pytest.mark.parametrize("size", [1 << 20, 5 << 20, (5 << 20) + 4097])
def test_a_file_that_may_not_grow(
    tmp_path: Path, filled: Filled, in_child: InChild, size: int
) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    in_child(lambda: check_failure(tmp_path / "out", filled, errno.EFBIG, limit))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_fills(tmp_path: Path, filled: Filled) -> None:
    with small_disk(tmp_path, 5 << 20):
        check_failure(tmp_path / "out", filled, errno.ENOSPC, lambda: None)


# save().

DURABLE = SaveOptions(durable=True)


@pytest.mark.parametrize("query", ["size=300001", "size=9000001", "size=9000001&zeros=50"])
def test_a_durable_save_is_the_same_state(strict: Path, query: str) -> None:
    with no_leak(), Simulated(f"sim:?{query}") as device:
        report = save(device, strict / "out", DURABLE)
        stream = stream_oracle.read((strict / "out").read_bytes())
        assert stream.states == [device.content()]
    assert 0 < report.direct_bytes == report.stream_bytes == (strict / "out").stat().st_size
    assert report.warnings == ()
    found = inspect(strict / "out")
    assert (found.sound, found.digest) == (True, report.digest)


def test_what_cannot_go_past_the_page_cache_says_so(tmp_path: Path) -> None:
    with no_leak(), Simulated("sim:?size=3000001") as device:
        options = SaveOptions(durable=True, framing=QemuFraming())
        report = save(device, tmp_path / "out", options)
        assert inspect(tmp_path / "out").digest == report.digest
    assert report.direct_bytes == 0
    assert any("O_DIRECT" in warning for warning in report.warnings)


def test_only_a_new_file_can_be_durable(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb"), open(write_fd, "wb") as sink, (tmp_path / "open").open("wb") as file:
        targets: list[Target] = ["/dev/null", file, file.fileno(), sink]
        with no_leak(), Simulated("sim:?size=5000") as device:
            for target in targets:
                err = failure_of(lambda target=target: save(device, target, DURABLE))  # type: ignore[misc]
                assert isinstance(err, UsageError)
                assert "only such can be durable" in str(err)
            assert device.state().name == "RUNNING"


def test_holes_and_several_writers_go_together(tmp_path: Path, filled: Filled) -> None:
    state = (bytes(8 * PAGE) + STATE[: 8 * PAGE]) * 100
    template = Template(bytes(8), b"tail", length_at=0)
    with filled(state) as src, direct(tmp_path / "out") as fd:
        writer = FrameWriter(fd.fileno(), BUFFER, ring_slots=8, writers=4, leave_holes=True)
        writer.copy(src.fileno(), template, EVERYTHING)
        cut(fd)
    assert (tmp_path / "out").read_bytes() == written(template, state, BUFFER)
    assert writer.zero_bytes == len(state) // 2
