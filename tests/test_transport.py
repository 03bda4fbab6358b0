"""Files that are whole or not there, and descriptors that stay the caller's."""

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiomig.errors import LocalIOError, PeerError
from vfiomig.transport import open_sink, open_source

InChild = Callable[[Callable[[], object]], None]
InThread = Callable[[Callable[[], object]], threading.Thread]
OpenFds = Callable[[], dict[int, str]]
Refuse = Callable[[str, int, int], None]


@pytest.fixture(autouse=True)
def nothing_stays_open(open_fds: OpenFds) -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def write(target: Path, content: bytes, *, force: bool = False) -> None:
    with open_sink(target, force=force) as sink:
        os.write(sink.fileno(), content)
        sink.commit()


@pytest.mark.usefixtures("no_umask")
def test_a_file_is_for_its_owner_only(tmp_path: Path) -> None:
    with open_sink(tmp_path / "state") as sink:
        assert stat.S_IMODE(os.fstat(sink.fileno()).st_mode) == 0o600
        sink.commit()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600


def test_a_file_has_its_name_only_when_it_is_committed(tmp_path: Path) -> None:
    with open_sink(str(tmp_path / "state")) as sink:
        os.write(sink.fileno(), b"abc")
        (partial,) = os.listdir(tmp_path)
        assert partial.startswith(".state.partial-")
        assert len(partial) == len(".state.partial-XXXXXXXX")
        sink.commit()
        assert os.listdir(tmp_path) == ["state"]
    assert (tmp_path / "state").read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_file_that_is_not_committed(
    tmp_path: Path, cause: type[BaseException]
) -> None:
    with open_sink(tmp_path / "state") as sink:
        os.write(sink.fileno(), b"abc")

    def fail() -> None:
        with open_sink(tmp_path / "state") as sink:
            os.write(sink.fileno(), b"abc")
            raise cause

    with pytest.raises(cause):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_partial_file_that_somebody_took_away_is_no_error(tmp_path: Path) -> None:
    with open_sink(tmp_path / "state"):
        (tmp_path / os.listdir(tmp_path)[0]).unlink()


def test_a_file_without_a_directory_is_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("state"), b"abc")
    assert (tmp_path / "state").read_bytes() == b"abc"


def test_a_directory_that_is_moved_meanwhile_keeps_its_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with open_sink(tmp_path / "one" / "state") as sink:
        (tmp_path / "one").rename(tmp_path / "two")
        (tmp_path / "one").mkdir()
        sink.commit()
    assert os.listdir(tmp_path / "two") == ["state"]
    assert os.listdir(tmp_path / "one") == []


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "状" * 85], ids=len)
def test_the_longest_names_are_possible(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"abc")
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_exists_is_refused_and_intact(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with pytest.raises(LocalIOError, match="exists") as failure:
        write(tmp_path / "state", b"new")
    assert (failure.value.errno, failure.value.code) == (errno.EEXIST, 10)
    assert "--force" in failure.value.hint
    assert (tmp_path / "state").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_force_replaces_a_file_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with open_sink(tmp_path / "state", force=True) as sink:
        os.write(sink.fileno(), b"new")
    assert (tmp_path / "state").read_bytes() == b"old"
    with open_sink(tmp_path / "state", force=True) as sink:
        os.write(sink.fileno(), b"new")
        assert (tmp_path / "state").read_bytes() == b"old"
        sink.commit()
    assert (tmp_path / "state").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with open_sink(tmp_path / "state") as sink:
        (tmp_path / "state").write_bytes(b"theirs")
        with pytest.raises(LocalIOError, match="File exists") as failure:
            sink.commit()
    assert failure.value.errno == errno.EEXIST
    assert (tmp_path / "state").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_symlink_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / "state").symlink_to(target)
    with pytest.raises(LocalIOError, match="exists"):
        write(tmp_path / "state", b"new")
    assert (tmp_path / "state").is_symlink()
    write(tmp_path / "state", b"new", force=True)
    assert not (tmp_path / "state").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["state", "victim"]


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_is_no_file(tmp_path: Path, *, force: bool) -> None:
    for path in (tmp_path, Path("."), Path("/"), tmp_path / ".."):
        with pytest.raises(LocalIOError, match="Is a directory"), open_sink(path, force=force):
            pass


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing/state", errno.ENOENT),
        ("file/state", errno.ENOTDIR),
        ("x" * 256, errno.ENAMETOOLONG),
        ("/proc/self/state", errno.ENOENT),
    ],
)
def test_a_file_that_cannot_be_made_is_said_to_be_so(tmp_path: Path, path: str, code: int) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalIOError, match="cannot write") as failure, open_sink(tmp_path / path):
        pass
    assert (failure.value.errno, failure.value.code) == (code, 10)
    assert path in str(failure.value)


def test_a_directory_without_the_right_to_write_is_said_to_be_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(LocalIOError, match="Permission denied"), open_sink(tmp_path / "state"):
        pass


@pytest.mark.parametrize("syscall", ["fsync", "linkat"])
def test_a_file_that_cannot_be_finished_is_not_there(
    tmp_path: Path, refuse: Refuse, in_child: InChild, open_fds: OpenFds, syscall: str
) -> None:
    def fail() -> None:
        with open_sink(tmp_path / "state") as sink:
            os.write(sink.fileno(), b"abc")
            (directory,) = (fd for fd, path in open_fds().items() if path == str(tmp_path))
            refuse(syscall, sink.fileno() if syscall == "fsync" else directory, errno.EIO)
            with pytest.raises(LocalIOError, match=r"cannot finish .*state: Input/output error"):
                sink.commit()

    in_child(fail)
    assert os.listdir(tmp_path) == []


def test_a_device_node_is_written_to_as_it_is() -> None:
    with open_sink("/dev/full") as sink:
        assert not sink.is_file
        with pytest.raises(OSError, match="No space") as failure:
            os.write(sink.fileno(), b"x")
        error = sink.failed(failure.value)
        sink.commit()
    assert isinstance(error, LocalIOError)
    assert str(error) == "cannot use /dev/full: No space left on device"
    assert (error.errno, error.code) == (errno.ENOSPC, 10)


def test_a_fifo_is_written_to_and_read_from_as_it_is(tmp_path: Path, in_thread: InThread) -> None:
    os.mkfifo(tmp_path / "fifo")

    def save() -> None:
        with open_sink(tmp_path / "fifo") as sink:
            assert not sink.is_file
            os.write(sink.fileno(), b"abc")
            sink.commit()

    thread = in_thread(save)
    with open_source(tmp_path / "fifo") as source:
        assert not source.is_file
        assert os.read(source.fileno(), 10) == b"abc"
        assert os.read(source.fileno(), 10) == b""
        thread.join()
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_pipe_is_used_without_touching_the_callers_flags() -> None:
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb"), open(write_fd, "wb") as end:
        with open_sink(end) as sink:
            assert sink.fileno() != write_fd
            assert not os.get_blocking(sink.fileno())
            assert os.get_blocking(write_fd)
            assert not os.get_inheritable(sink.fileno())
            assert fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ) == 1 << 20
            os.write(sink.fileno(), b"abc")
        assert os.get_blocking(write_fd)
        assert os.read(read_fd, 3) == b"abc"
        with open_source(read_fd) as source:
            assert source.fileno() == read_fd
            assert os.get_blocking(read_fd)


def test_a_pipe_without_a_reader_is_said_to_be_so() -> None:
    read_fd, write_fd = os.pipe()
    with open(write_fd, "wb") as end, open_sink(end) as sink:
        os.close(read_fd)
        with pytest.raises(BrokenPipeError) as failure:
            os.write(sink.fileno(), b"x")
        error = sink.failed(failure.value)
    assert isinstance(error, LocalIOError)
    assert str(error) == f"descriptor {write_fd}: its reader has closed it"


def test_a_socket_stays_as_it_is_and_its_errors_are_the_peers() -> None:
    near, far = socket.socketpair()
    with near, far:
        with open_sink(near) as sink, open_source(far.fileno()) as source:
            assert (sink.fileno(), source.fileno()) == (near.fileno(), far.fileno())
            assert near.getblocking()
            for stream in (sink, source):
                error = stream.failed(OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
                assert isinstance(error, PeerError)
                assert (error.errno, error.code) == (errno.ECONNRESET, 9)
        near.send(b"still open")


def test_a_file_given_as_a_descriptor_stays_the_callers(tmp_path: Path) -> None:
    with open(tmp_path / "state", "wb") as file:
        with open_sink(file.fileno()) as sink:
            assert (sink.fileno(), sink.is_file) == (file.fileno(), True)
            os.write(sink.fileno(), b"abc")
            sink.commit()
        file.write(b"def")
    with open_source(tmp_path / "state") as source:
        assert (source.is_file, os.read(source.fileno(), 10)) == (True, b"abcdef")


@pytest.mark.parametrize(
    ("path", "why"),
    [(".", "Is a directory"), ("missing", "No such file"), ("file/x", "Not a directory")],
)
def test_a_source_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalIOError, match=why) as failure, open_source(tmp_path / path):
        pass
    assert failure.value.code == 10


def test_a_number_that_is_no_descriptor_is_said_to_be_so() -> None:
    for use in (open_sink, open_source):
        with pytest.raises(LocalIOError, match="descriptor 99999: Bad file"), use(99_999):
            pass


def test_a_directory_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(LocalIOError, match="anybody"), open_sink(tmp_path / "state"):
        pass
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o1777)
    with open_sink(tmp_path / "state") as sink:
        sink.commit()
    assert (tmp_path / "state").exists()
