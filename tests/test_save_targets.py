"""Where save() writes: files that are whole or not there, descriptors, pipes, sockets, fifos."""

import errno
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stream_oracle
from devices import Simulated, drained, failure_of, into_pipe, names_in, no_leak
from vfiomig import DeviceState, MigrationError, SaveOptions, inspect, save
from vfiomig.transport import Target

S = DeviceState


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield


def test_a_file_is_for_its_owner_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Simulated("sim:?size=5000") as device:
            save(device, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert names_in(tmp_path) == ["out"]


def test_whatever_it_is_written_to_the_stream_is_the_same_state(tmp_path: Path) -> None:
    streams: dict[str, bytes] = {}
    with Simulated("sim:?size=3000001&zeros=20") as device:
        content = device.content()
        save(device, str(tmp_path / "path"))
        streams["path"] = (tmp_path / "path").read_bytes()
        with (tmp_path / "file").open("w+b") as file:
            save(device, file)
            streams["open file"] = (tmp_path / "file").read_bytes()
            file.truncate(0)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            save(device, file.fileno())
            streams["fd"] = (tmp_path / "file").read_bytes()
        near, far = socket.socketpair()
        streams["socket"] = drained(far.detach(), lambda: save(device, near), near.close)
        streams["pipe"] = into_pipe(lambda fd: save(device, fd))
        streams["non-blocking pipe"] = into_pipe(lambda fd: save(device, fd), nonblocking=True)
    for name, stream in streams.items():
        assert stream_oracle.read(stream).states == [content], name


def test_a_descriptor_stays_the_callers(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as reader, open(write_fd, "wb") as writer:
        with Simulated("sim:?size=100") as device:
            save(device, writer)
        writer.write(b"more")
        writer.flush()
        assert os.read(reader.fileno(), 1 << 20).endswith(b"more")


def test_a_fifo_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Simulated("sim:?size=3000001") as device:
        stream = drained(tmp_path / "fifo", lambda: save(device, tmp_path / "fifo"), lambda: None)
        assert stream_oracle.read(stream).states == [device.content()]


def test_force_replaces_a_file_and_without_it_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    with Simulated("sim:?size=5000") as device:
        err = failure_of(lambda: save(device, path))
        assert (err.code, path.read_bytes()) == (10, b"precious")
        save(device, path, SaveOptions(force=True))
    assert inspect(path).sound
    assert names_in(tmp_path) == ["out"]


# What goes wrong there.


def refused(target: Callable[[], Target], options: SaveOptions = SaveOptions()) -> MigrationError:  # noqa: B008
    """Save into a target, which must fail and leave the device as it was."""
    with Simulated("sim:?size=3000001") as device:
        before = device.content()
        place = target()
        err = failure_of(lambda: save(device, place, options))
        assert (device.state(), device.content()) == (S.RUNNING, before)
        if err.phase:
            assert (err.actual, err.aftermath) == (S.RUNNING, f"{device.name} is RUNNING")
        save(device, "/dev/null")
    return err


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "long").touch()
    cases = {
        tmp_path: errno.EISDIR,
        tmp_path / "none" / "out": errno.ENOENT,
        tmp_path / "file" / "out": errno.ENOTDIR,
        Path("/proc/out"): errno.ENOENT,
        Path("/dev/full"): errno.ENOSPC,
    }
    for path, number in cases.items():
        err = refused(lambda path=path: path)  # type: ignore[misc]
        assert (err.code, err.errno, str(path) in str(err)) == (10, number, True)


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        err = refused(lambda name=name: tmp_path / name)  # type: ignore[misc]
        assert (err.code, err.errno) == (10, errno.EEXIST)
    with Simulated("sim:?size=5000") as device:
        save(device, tmp_path / "link", SaveOptions(force=True))
    assert victim.read_bytes() == b"precious"  # the link was replaced, not what it points to
    assert names_in(tmp_path) == ["dangling", "link", "victim"]


def test_a_descriptor_that_is_not_open() -> None:
    err = refused(lambda: 1_000_000)
    assert (err.code, err.errno) == (10, errno.EBADF)


def test_a_descriptor_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as file:
        err = refused(lambda: file)
    assert (err.code, err.errno) == (10, errno.EBADF)


def test_a_reader_that_goes_away() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with open(write_fd, "wb") as writer:
        err = refused(lambda: writer)
    assert (err.code, err.errno, "its reader has closed it" in str(err)) == (10, errno.EPIPE, True)
    near, far = socket.socketpair()
    far.close()
    with near:
        err = refused(lambda: near)
    assert (err.code, err.errno) == (9, errno.EPIPE)


def in_child(job: Callable[[], None]) -> int:
    """Return how a forked child ends that does this; it may change its own limits."""
    if (child := os.fork()) == 0:
        job()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", [0, 1000, 4096, 8191, 1 << 20, 3_010_000])
def test_a_file_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    def job() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Simulated("sim:?size=3000001") as device:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            err = failure_of(lambda: save(device, tmp_path / "out"))
            assert (err.code, err.errno, device.state()) == (10, errno.EFBIG, S.RUNNING)

    assert in_child(job) == 0
    assert names_in(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("pages", [1, 2, 3, 4, 100, 732])
def test_a_disk_that_fills(tmp_path: Path, pages: int) -> None:
    options = ["-o", f"size={pages * 4096}", "-t", "tmpfs", "none"]
    mounted = subprocess.run(["mount", *options, tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        with Simulated("sim:?size=3000001") as device:
            err = failure_of(lambda: save(device, tmp_path / "out"))
            assert (err.code, err.errno, device.state()) == (10, errno.ENOSPC, S.RUNNING)
        assert names_in(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user takes root")
def test_a_directory_without_rights(tmp_path: Path) -> None:
    def job() -> None:
        with Simulated("sim:?size=5000") as device:
            os.setuid(65534)
            err = failure_of(lambda: save(device, tmp_path / "out"))
            assert (err.code, err.errno, device.state()) == (10, errno.EACCES, S.RUNNING)

    tmp_path.chmod(0o700)
    assert in_child(job) == 0
    assert names_in(tmp_path) == []
