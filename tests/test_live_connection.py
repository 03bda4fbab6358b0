"""Dialing, listening, and descriptors: who gets in, who is turned away, and what is left of it."""

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfiomig import DeviceBusyError, LocalIOError, PeerError, UsageError
from vfiomig.errors import CancelledError, ResourceLimitError
from vfiomig.live.address import Address, parse_address
from vfiomig.live.connection import Connection, dial, from_descriptors, reach
from vfiomig.live.listener import MAX_HANDSHAKES, Arrival, Listener, read_greeting
from vfiomig.live.wire import Greeting
from vfiomig.worker import Cancellation

SECOND_NS = 10**9
GREETING = Greeting(b"0123456789abcdef", 0, 1)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@contextmanager
def listening(
    text: str, *, handshake_ns: int = 5 * SECOND_NS, insecure: bool = False
) -> Iterator[tuple[Listener, list[str]]]:
    strangers: list[str] = []
    listener = Listener(
        parse_address(text),
        tls=None,
        insecure=insecure,
        handshake_ns=handshake_ns,
        on_stranger=strangers.append,
    )
    try:
        yield listener, strangers
    finally:
        listener.close()


def dialed(address: Address, *, timeout_ns: int = 5 * SECOND_NS, wake_fd: int = -1) -> Connection:
    return dial(address, tls=None, insecure=False, timeout_ns=timeout_ns, wake_fd=wake_fd)


def next_of(listener: Listener) -> Arrival:
    cancellation = Cancellation()
    try:
        arrival = listener.next(cancellation.fileno(), 5 * SECOND_NS)
    finally:
        cancellation.close()
    assert arrival is not None
    return arrival


def wait_until(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not done():
        assert time.monotonic() < ends
        threading.Event().wait(0.001)


def urls(tmp_path: Path) -> list[str]:
    return ["tcp:127.0.0.1:0", "tcp:[::1]:0", f"unix:{tmp_path}/x.sock"]


@pytest.mark.parametrize("kind", range(3))
def test_what_one_end_writes_the_other_reads_to_the_last_byte(tmp_path: Path, kind: int) -> None:
    data = os.urandom(1 << 20)
    with listening(urls(tmp_path)[kind]) as (listener, strangers):
        near = dialed(listener.address)
        os.write(near.out_fd, GREETING.encode())
        arrival = next_of(listener)
        assert arrival.greeting == GREETING
        far = arrival.connection
        # Something unread at the writer must not take from the reader what was written.
        os.write(far.out_fd, b"never read")
        threads = [threading.Thread(target=write_and_close, args=(near, data))]
        threads[0].start()
        found = b""
        while piece := os.read(far.in_fd, 1 << 16):
            found += piece
        far.close()
        threads[0].join()
        assert found == data
        assert strangers == []
        assert "127.0.0.1" in near.peer or "::1" in near.peer or "process" in near.peer


def write_and_close(connection: Connection, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(connection.out_fd, view) :]
    connection.close()
    connection.close()  # once more does nothing
    assert connection.in_fd == connection.out_fd == -1


def test_a_port_that_was_left_open_is_told() -> None:
    with listening("tcp::0") as (listener, _):
        assert listener.address.port > 0
        assert str(listener.address).startswith("tcp:127.0.0.1:")


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n" * 8, b"\0" * 64, b"\x89VMGS"])
def test_a_stranger_is_turned_away_and_the_next_one_is_let_in(words: bytes) -> None:
    with listening("tcp::0") as (listener, strangers):
        where = (listener.address.host, listener.address.port)
        with socket.create_connection(where) as stranger:
            stranger.sendall(words)
        wait_until(lambda: bool(strangers))
        assert "was turned away" in strangers[0]
        near = dialed(listener.address)
        os.write(near.out_fd, GREETING.encode())
        next_of(listener).connection.abandon()
        near.close()


def test_who_says_nothing_costs_a_handshake_and_nobody_else_anything() -> None:
    with listening("tcp::0", handshake_ns=SECOND_NS // 10) as (listener, strangers):
        where = (listener.address.host, listener.address.port)
        with socket.create_connection(where):
            near = dialed(listener.address)
            os.write(near.out_fd, GREETING.encode())
            next_of(listener).connection.abandon()
            near.close()
            wait_until(lambda: bool(strangers))
        assert "did not greet in time" in strangers[0]


def test_too_many_at_once_are_turned_away_at_the_door() -> None:
    with listening("tcp::0") as (listener, strangers):
        where = (listener.address.host, listener.address.port)
        waiting = [socket.create_connection(where) for _ in range(MAX_HANDSHAKES + 1)]
        wait_until(lambda: bool(strangers))
        assert "too many" in strangers[0]
        for sock in waiting:
            sock.close()


def test_a_listener_that_is_closed_leaves_nobody_waiting() -> None:
    with listening("tcp::0") as (listener, _):
        where = (listener.address.host, listener.address.port)
        silent = socket.create_connection(where)
        greeting = dialed(listener.address)
        os.write(greeting.out_fd, GREETING.encode())
    with silent:
        assert has_ended(silent.fileno())
    assert has_ended(greeting.in_fd)
    greeting.close()


def has_ended(fd: int) -> bool:
    """Whether the other end has closed, or reset, since it had not read all."""
    try:
        return os.read(fd, 1) == b""
    except ConnectionResetError:
        return True


def test_waiting_for_somebody_is_cancelled_and_times_out() -> None:
    cancellation = Cancellation()
    with listening("tcp::0") as (listener, _):
        assert listener.next(cancellation.fileno(), SECOND_NS // 100) is None
        cancellation.cancel()
        with pytest.raises(CancelledError):
            listener.next(cancellation.fileno())
    cancellation.close()


def test_nobody_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerError, match="Connection refused") as caught:
        dialed(Address("tcp", "127.0.0.1", port))
    assert caught.value.errno == errno.ECONNREFUSED
    assert "listening" in caught.value.hint


def test_a_name_that_does_not_resolve_says_so() -> None:
    with pytest.raises(PeerError, match="does not resolve"):
        dialed(Address("tcp", "nowhere.invalid", 1))


def test_of_several_addresses_of_a_name_the_first_that_answers_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [(socket.AF_INET6, ("::1", port)), (socket.AF_INET, ("127.0.0.1", port))]
        with reach(found, "a name", time.monotonic_ns() + SECOND_NS, -1) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)
    with pytest.raises(PeerError, match="a name: Connection refused"):
        reach(found, "a name", time.monotonic_ns() + SECOND_NS, -1)


# Both with a resolver that is asked and never answers; the second wait is cancelled from the start.
SLOW = """
import os
from vfiomig.errors import MigrationError
from vfiomig.live.address import Address
from vfiomig.live.connection import dial
wake_fd = os.eventfd(1)
for timeout_ns, woken_by in ((50_000_000, -1), (60_000_000_000, wake_fd)):
    try:
        dial(Address("tcp", "slow.invalid", 1), tls=None, insecure=False, timeout_ns=timeout_ns,
             wake_fd=woken_by)
    except MigrationError as err:
        print(type(err).__name__, err)
"""


def test_a_resolver_that_does_not_answer_is_given_up_in_time(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.9.9.9\noptions timeout:20 attempts:1\n")
    mount = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf || exit 77; exec "$@"'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind(("127.9.9.9", 53))
        except OSError as err:
            pytest.skip(f"cannot be a resolver: {err}")
        words = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", SLOW]
        done = subprocess.run(words, capture_output=True, text=True, timeout=15, check=False)
    if done.returncode in (1, 77) and not done.stdout:
        pytest.skip(f"cannot mount: {done.stderr}")
    assert done.stdout.splitlines() == [
        "PeerError tcp:slow.invalid:1: the host's name was not resolved in time",
        "CancelledError cancelled",
    ], done.stderr


def test_a_socket_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="No such file"):
        dialed(Address("unix", path=f"{tmp_path}/x"))


def test_a_listener_that_does_not_accept_is_given_up_in_time() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = Address("tcp", *server.getsockname())
        full = [socket.socket() for _ in range(4)]
        for sock in full:
            sock.settimeout(0)
            sock.connect_ex(server.getsockname())
        with pytest.raises(PeerError, match="in time"):
            dialed(address, timeout_ns=SECOND_NS // 20)
        cancellation = Cancellation()
        cancellation.cancel()
        with pytest.raises(CancelledError):
            dialed(address, wake_fd=cancellation.fileno())
        cancellation.close()
        for sock in full:
            sock.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::"])
def test_plain_tcp_beyond_this_host_must_be_asked_for(host: str) -> None:
    address = Address("tcp", host, 0)
    with pytest.raises(UsageError, match="no TLS") as caught:
        dial(address, tls=None, insecure=False, timeout_ns=1)
    assert "--insecure" in caught.value.hint
    with pytest.raises(UsageError, match="no TLS"), listening(str(address)):
        pass


def test_it_may_listen_everywhere_when_asked_to() -> None:
    with listening("tcp:0.0.0.0:0", insecure=True) as (listener, _):
        assert listener.address.port


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LocalIOError, match="cannot listen"), listening(f"tcp::{port}"):
            pass


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with listening(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with (
            pytest.raises(DeviceBusyError, match="serves there already"),
            listening(f"unix:{path}"),
        ):
            pass
    assert not path.exists()


def test_a_unix_socket_that_a_killed_listener_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listening(f"unix:{path}"):
        pass
    path.write_text("a file")
    with pytest.raises(LocalIOError, match="no socket of ours"), listening(f"unix:{path}"):
        pass
    assert path.read_text() == "a file"


def test_a_descriptor_must_be_a_stream_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UsageError, match="is no socket"):
        from_descriptors(Address("fd", fd=file.fileno()))
    with pytest.raises(UsageError, match="Bad file descriptor"):
        from_descriptors(Address("fd", fd=1 << 20))
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, pytest.raises(UsageError, match="no stream socket"):
        from_descriptors(Address("fd", fd=near.fileno()))
    with socket.socket() as near, pytest.raises(UsageError, match="is not connected"):
        from_descriptors(Address("fd", fd=near.fileno()))
    server = socket.create_server(("127.0.0.1", 0))
    with server, pytest.raises(UsageError, match="is not connected"):
        from_descriptors(Address("fd", fd=server.fileno()))


def test_a_descriptor_that_was_given_stays_the_callers() -> None:
    near, far = socket.socketpair()
    with near, far:
        connection = from_descriptors(Address("fd", fd=near.fileno()))
        os.write(connection.out_fd, b"x")
        assert far.recv(1) == b"x"
        far.shutdown(socket.SHUT_WR)
        connection.close()
        assert near.fileno() >= 0
        assert far.recv(1) == b""


def test_a_greeting_is_read_to_its_last_byte_and_no_further() -> None:
    near, far = socket.socketpair()
    cancellation = Cancellation()
    with near, far:
        connection = from_descriptors(Address("fd", fd=near.fileno()))
        for byte in GREETING.encode():
            far.send(bytes([byte]))
        far.send(b"more")
        assert read_greeting(connection, 0, cancellation.fileno()) == GREETING
        assert os.read(connection.in_fd, 9) == b"more"
        far.shutdown(socket.SHUT_WR)
        connection.close()
    cancellation.close()


def test_without_a_free_descriptor_it_waits_and_does_not_spin(
    in_child: Callable[[Callable[[], object]], None],
) -> None:
    def run() -> None:
        import resource

        with listening("tcp::0") as (listener, strangers):
            where = (listener.address.host, listener.address.port)
            first = socket.socket()
            taken = [os.open("/dev/null", os.O_RDONLY)]
            before_limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            limits = (taken[0] + 1, before_limits[1])
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            first.connect(where)
            wait_until(lambda: bool(strangers))
            assert "could not be let in" in strangers[0]
            before = time.process_time()
            wait_until(lambda: len(strangers) >= 2)
            assert time.process_time() - before < 0.09  # it pauses for 0.1 s
            os.close(taken[0])
            first.sendall(GREETING.encode())
            resource.setrlimit(resource.RLIMIT_NOFILE, before_limits)
            next_of(listener).connection.abandon()
            first.close()

    in_child(run)


def test_without_a_free_thread_a_caller_is_turned_away_and_the_listener_goes_on(
    in_child: Callable[[Callable[[], object]], None], refuse: Callable[[str, int, int], None]
) -> None:
    def run() -> None:
        told: list[str] = []

        def on_stranger(sentence: str) -> None:
            told.append(sentence)
            if len(told) == 1:  # too many: told by the thread that lets them in
                for syscall in ("clone3", "clone"):
                    refuse(syscall, -1, errno.EAGAIN)

        address = Address("tcp", "127.0.0.1", 0)
        listener = Listener(
            address, tls=None, insecure=False, handshake_ns=60 * SECOND_NS, on_stranger=on_stranger
        )
        where = (listener.address.host, listener.address.port)
        waiting = [socket.create_connection(where) for _ in range(MAX_HANDSHAKES + 1)]
        wait_until(lambda: bool(told))
        for sock in waiting:
            sock.close()
        wait_until(lambda: threading.active_count() == 2)
        for _ in range(2):
            before = len(told)
            with socket.create_connection(where) as caller:
                assert has_ended(caller.fileno())
            wait_until(lambda count=before: len(told) > count)  # type: ignore[misc]
            assert "could not be let in: can't start new thread" in told[-1]
        listener.close()

    in_child(run)


def test_without_a_free_descriptor_both_ends_say_so(
    in_child: Callable[[Callable[[], object]], None],
) -> None:
    def run() -> None:
        import resource

        first_free = os.open("/dev/null", os.O_RDONLY)
        os.close(first_free)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        address = Address("tcp", "127.0.0.1", 0)
        for free in range(3):  # of the three that a listener needs
            resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + free, limits[1]))
            with pytest.raises(ResourceLimitError), listening(str(address)):
                pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        for host in ("127.0.0.1", "localhost"):  # a name takes descriptors to resolve
            with pytest.raises(ResourceLimitError, match="Too many open files"):
                dialed(address._replace(host=host))
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert os.open("/dev/null", os.O_RDONLY) == first_free  # nothing is left open

    in_child(run)


def test_an_end_of_another_version_and_ours_both_say_why() -> None:
    newer = Greeting(b"0123456789abcdef", 0, 1, version=7, oldest=2)
    with listening("tcp::0") as (listener, strangers):
        near = dialed(listener.address)
        os.write(near.out_fd, newer.encode())
        answer = os.read(near.in_fd, 64)
        assert int.from_bytes(answer[8:12], "little") == 1
        near.close()
        wait_until(lambda: bool(strangers))
        assert "speaks versions 2 to 7" in strangers[0]
