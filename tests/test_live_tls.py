"""TLS between two ends: who is let in, who is not and why, and that the last byte arrives."""

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vfiomig import MigrationError
from vfiomig.errors import AuthenticationError, PeerError
from vfiomig.live.address import Address
from vfiomig.live.connection import Connection, dial
from vfiomig.live.listener import Arrival, Listener
from vfiomig.live.tls import TlsFiles, handshake
from vfiomig.live.wire import Greeting
from vfiomig.worker import Cancellation

SECOND_NS = 10**9
GREETING = Greeting(b"0123456789abcdef", 0, 1)
KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


class Authority:
    """A CA of a test's own, and directories as --tls-dir wants them."""

    def __init__(self, place: Path) -> None:
        self._place, self._count = place, 0
        place.mkdir(exist_ok=True)
        pair = ["-keyout", place / "ca-key.pem", "-out", place / "ca-cert.pem"]
        openssl("req", "-x509", *KEY, *pair, "-subj", "/CN=a test's CA", "-days", 2)

    def directory(self, names: str = "DNS:localhost,IP:127.0.0.1", *, days: int = 2) -> Path:
        """Return a directory whose certificates bear these names, for both roles."""
        self._count += 1
        place = self._place / str(self._count)
        place.mkdir()
        (place / "ca-cert.pem").write_bytes((self._place / "ca-cert.pem").read_bytes())
        (place / "names").write_text(f"subjectAltName={names}\n" if names else "")
        for role in ("server", "client"):
            key, request = place / f"{role}-key.pem", place / f"{role}.csr"
            openssl("req", *KEY, "-keyout", key, "-out", request, "-subj", "/CN=common.example")
            authority = ["-CA", self._place / "ca-cert.pem", "-CAkey", self._place / "ca-key.pem"]
            words = ["x509", "-req", "-in", request, *authority, "-CAcreateserial"]
            words += ["-out", place / f"{role}-cert.pem", "-extfile", place / "names"]
            if days > 0:
                openssl(*words, "-days", days)
            else:
                self._expired(request, place / f"{role}-cert.pem", place / "names")
        return place

    def _expired(self, request: Path, out: Path, names: Path) -> None:
        # `openssl x509` takes dates from 3.4 on, `openssl ca` always has.
        base = self._place / "ca"
        base.mkdir(exist_ok=True)
        (base / "index.txt").write_text("")
        (base / "serial").write_text("1000\n")
        config = base / "config"
        config.write_text(
            "[ca]\ndefault_ca=x\n[x]\n"
            f"database={base}/index.txt\nserial={base}/serial\nnew_certs_dir={base}\n"
            "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n"
        )
        authority = ["-cert", self._place / "ca-cert.pem", "-keyfile", self._place / "ca-key.pem"]
        dates = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"]
        words = ["ca", "-batch", "-config", config, *authority, *dates, "-in", request]
        openssl(*words, "-out", out, "-extfile", names)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-pki"))


@pytest.fixture(scope="session")
def directory(authority: Authority) -> Path:
    return authority.directory()


class Meeting:
    """A listener with TLS, and who comes to it."""

    def __init__(self, files: TlsFiles) -> None:
        self.strangers: list[str] = []
        self._cancellation = Cancellation()
        self.listener = Listener(
            Address("tcp", "127.0.0.1", 0),
            tls=files,
            insecure=False,
            handshake_ns=5 * SECOND_NS,
            on_stranger=self.strangers.append,
        )

    def dial(self, files: TlsFiles | None, host: str = "localhost") -> Connection:
        address = self.listener.address._replace(host=host)
        connection = dial(address, tls=files, insecure=False, timeout_ns=5 * SECOND_NS)
        with suppress(BrokenPipeError):  # refused already; reading tells why
            os.write(connection.out_fd, GREETING.encode())
        return connection

    def arrival(self, timeout_ns: int = 5 * SECOND_NS) -> Arrival | None:
        return self.listener.next(self._cancellation.fileno(), timeout_ns)

    def meet(self, files: TlsFiles) -> tuple[Connection, Connection]:
        near = self.dial(files)
        arrival = self.arrival()
        assert arrival is not None, self.strangers
        return near, arrival.connection

    def await_stranger(self) -> str:
        ends = time.monotonic() + 10
        while not self.strangers:
            assert time.monotonic() < ends
            threading.Event().wait(0.001)
        return self.strangers[0]

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self._cancellation.close()


def refused(job: Callable[[], Connection]) -> MigrationError:
    """Return the error of a dialer: of its handshake, or, in TLS 1.3, of its first read."""
    try:
        connection = job()
    except MigrationError as err:
        return err
    try:
        assert os.read(connection.in_fd, 1) == b""
        return connection.failed(ConnectionResetError(104, "reset"))
    except OSError as err:
        return connection.failed(err)
    finally:
        connection.close()


def test_both_ends_know_who_the_other_is(authority: Authority) -> None:
    here = TlsFiles(authority.directory("DNS:here.example"), frozenset({"there.example"}))
    there = TlsFiles(authority.directory("DNS:there.example"), frozenset({"here.example"}))
    with Meeting(there) as meeting:
        near, far = meeting.meet(here)
        assert (near.peer, far.peer) == ("there.example", "here.example")
        os.write(far.out_fd, b"answer")
        assert os.read(near.in_fd, 9) == b"answer"
        far.abandon()
        near.close()


@pytest.mark.parametrize("direction", ["to the listener", "to the dialer"])
def test_the_last_byte_arrives_whatever_is_unread_at_the_writer(
    directory: Path, direction: str
) -> None:
    data = os.urandom(16 << 20)
    with Meeting(TlsFiles(directory)) as meeting:
        near, far = meeting.meet(TlsFiles(directory))
        writer, reader = (near, far) if direction == "to the listener" else (far, near)
        os.write(reader.out_fd, b"never read" * 100)
        thread = threading.Thread(target=write_and_close, args=(writer, data))
        thread.start()
        found = bytearray()
        while piece := os.read(reader.in_fd, 1 << 20):
            found += piece
        reader.close()
        thread.join()
        assert found == data


def write_and_close(connection: Connection, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(connection.out_fd, view) :]
    connection.close()


def test_a_certificate_of_another_authority_is_refused_at_both_ends(
    directory: Path, other_authority: Authority
) -> None:
    with Meeting(TlsFiles(directory)) as meeting:
        other = TlsFiles(other_authority.directory())
        failure = refused(lambda: meeting.dial(other))
        assert failure.code in (9, 13)
        assert isinstance(failure, AuthenticationError), str(failure)
        assert "handshake" in str(failure)
        assert "turned away" in meeting.await_stranger()
        assert meeting.arrival(1) is None


def test_an_expired_certificate_is_refused(authority: Authority, directory: Path) -> None:
    with Meeting(TlsFiles(authority.directory(days=0))) as meeting:
        failure = refused(lambda: meeting.dial(TlsFiles(directory)))
        assert isinstance(failure, AuthenticationError)
        assert "expired" in str(failure)


def test_a_host_of_another_name_is_refused(authority: Authority, directory: Path) -> None:
    with Meeting(TlsFiles(authority.directory("DNS:elsewhere.example"))) as meeting:
        failure = refused(lambda: meeting.dial(TlsFiles(directory)))
        assert isinstance(failure, AuthenticationError)
        assert "elsewhere.example, and not localhost" in str(failure)
        assert "--tls-peer" in failure.hint
        near = meeting.dial(TlsFiles(directory, frozenset({"elsewhere.example"})))
        arrival = meeting.arrival()
        assert arrival is not None
        arrival.connection.abandon()
        near.close()


def test_a_host_that_is_dialed_by_number_is_known_by_it_however_it_is_written(
    authority: Authority,
) -> None:
    files = TlsFiles(authority.directory("DNS:there.example,IP:::1"))
    listener = Listener(
        Address("tcp", "::1", 0),
        tls=files,
        insecure=False,
        handshake_ns=5 * SECOND_NS,
        on_stranger=lambda _: None,
    )
    for host in ("::1", "0::0:1"):
        address = listener.address._replace(host=host)
        dial(address, tls=files, insecure=False, timeout_ns=5 * SECOND_NS).abandon()
    listener.close()


def test_a_certificate_that_the_listener_does_not_trust_is_told_to_the_dialer(
    directory: Path, other_authority: Authority
) -> None:
    mixed = other_authority.directory()
    (mixed / "ca-cert.pem").write_bytes((directory / "ca-cert.pem").read_bytes())
    with Meeting(TlsFiles(directory)) as meeting:
        failure = refused(lambda: meeting.dial(TlsFiles(mixed)))
        assert isinstance(failure, AuthenticationError)
        assert "unknown ca" in str(failure)
        assert "does not trust" in failure.hint


def test_a_dialer_who_is_not_on_the_list_is_turned_away(authority: Authority) -> None:
    there = TlsFiles(authority.directory(), frozenset({"somebody.example"}))
    with Meeting(there) as meeting:
        failure = refused(lambda: meeting.dial(TlsFiles(authority.directory())))
        assert failure.code in (9, 13)
        assert "not somebody.example" in meeting.await_stranger()
        assert meeting.arrival(1) is None


def test_a_name_with_a_star_fits_one_label_and_a_common_name_serves(
    authority: Authority, directory: Path
) -> None:
    star = TlsFiles(authority.directory("DNS:*.example"))
    with Meeting(star) as meeting:
        for wanted, fits in (("a.example", True), ("a.b.example", False), ("example", False)):
            here = TlsFiles(directory, frozenset({wanted}))
            if fits:
                near, far = meeting.meet(here)
                far.abandon()
                near.close()
            else:
                assert isinstance(refused(lambda h=here: meeting.dial(h)), AuthenticationError)  # type: ignore[misc]
    with Meeting(TlsFiles(authority.directory(""))) as meeting:
        near, far = meeting.meet(TlsFiles(directory, frozenset({"common.example"})))
        far.abandon()
        near.close()


def raw_client(meeting: Meeting, context: ssl.SSLContext) -> str:
    """Return what became of another program's client."""
    where = (meeting.listener.address.host, meeting.listener.address.port)
    try:
        with (
            socket.create_connection(where) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            secured.settimeout(10)
            return "let in" if secured.recv(1) else "closed"
    except OSError as err:
        return type(err).__name__


def test_who_shows_no_certificate_or_speaks_tls_1_2_is_turned_away(directory: Path) -> None:
    with Meeting(TlsFiles(directory)) as meeting:
        bare = ssl.create_default_context(cafile=str(directory / "ca-cert.pem"))
        assert raw_client(meeting, bare) != "let in"
        old = ssl.create_default_context(cafile=str(directory / "ca-cert.pem"))
        old.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert raw_client(meeting, old) != "let in"
        assert meeting.arrival(1) is None


def test_tls_at_one_end_alone_is_noticed_at_both(directory: Path) -> None:
    with Meeting(TlsFiles(directory)) as meeting:
        failure = refused(lambda: meeting.dial(None))
        assert failure.code in (9, 13)
        assert "handshake" in meeting.await_stranger()
    strangers: list[str] = []
    listener = Listener(
        Address("tcp", "127.0.0.1", 0),
        tls=None,
        insecure=False,
        handshake_ns=SECOND_NS,
        on_stranger=strangers.append,
    )
    files = TlsFiles(directory)
    with pytest.raises((AuthenticationError, PeerError)):
        dial(listener.address, tls=files, insecure=False, timeout_ns=5 * SECOND_NS)
    listener.close()
    assert "does not speak vfiomig's session protocol" in strangers[0]


def test_a_key_that_others_may_read_is_refused(authority: Authority) -> None:
    directory = authority.directory()
    for role, mode in (("server", 0o644), ("client", 0o640)):
        (directory / f"{role}-key.pem").chmod(mode)
        with pytest.raises(AuthenticationError, match="can be read by others") as caught:
            TlsFiles(directory).context(role)
        assert caught.value.hint == f"chmod 600 {directory}/{role}-key.pem"


@pytest.mark.parametrize("missing", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_a_file_that_is_missing_is_named(authority: Authority, missing: str) -> None:
    directory = authority.directory()
    (directory / missing).unlink()
    with pytest.raises(AuthenticationError, match=missing):
        TlsFiles(directory).context("client")


def test_files_that_do_not_belong_together_are_refused(authority: Authority) -> None:
    directory = authority.directory()
    (directory / "client-key.pem").write_bytes((directory / "server-key.pem").read_bytes())
    with pytest.raises(AuthenticationError, match="cannot be used"):
        TlsFiles(directory).context("client")
    (directory / "client-key.pem").write_text("no key\n")
    with pytest.raises(AuthenticationError, match="cannot be used"):
        TlsFiles(directory).context("client")


def test_an_encrypted_key_is_refused_and_nobody_is_asked(authority: Authority) -> None:
    directory = authority.directory()
    key = directory / "client-key.pem"
    openssl("ec", "-in", key, "-aes128", "-passout", "pass:secret", "-out", directory / "new")
    key.write_bytes((directory / "new").read_bytes())
    with pytest.raises(AuthenticationError, match="the key is encrypted"):
        TlsFiles(directory).context("client")


def test_a_connection_that_is_cut_without_an_end_is_no_end(directory: Path) -> None:
    """A proxy cuts the TCP connection: what was said is there, and the cut shows."""
    with Meeting(TlsFiles(directory)) as meeting, socket.create_server(("127.0.0.1", 0)) as server:
        where = (meeting.listener.address.host, meeting.listener.address.port)
        cut = threading.Event()
        thread = threading.Thread(target=proxy, args=(server, where, cut))
        thread.start()
        files = TlsFiles(directory)
        address = Address("tcp", "localhost", server.getsockname()[1])
        near = dial(address, tls=files, insecure=False, timeout_ns=5 * SECOND_NS)
        os.write(near.out_fd, GREETING.encode())
        arrival = meeting.arrival()
        assert arrival is not None
        cut.set()
        thread.join()
        for connection in (near, arrival.connection):
            assert os.read(connection.in_fd, 1) == b""
            failure = connection.failed(ConnectionResetError(104, "reset"))
            assert isinstance(failure, PeerError)
            assert "TLS broke off" in str(failure)
            connection.close()


def proxy(server: socket.socket, where: tuple[str, int], cut: threading.Event) -> None:
    near, _ = server.accept()
    with near, socket.create_connection(where) as far:
        pumps = [threading.Thread(target=pump, args=pair) for pair in ((near, far), (far, near))]
        for thread in pumps:
            thread.start()
        cut.wait(10)
        for sock in (near, far):
            sock.shutdown(socket.SHUT_RDWR)
        for thread in pumps:
            thread.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        return


def test_a_peer_that_hangs_up_in_the_handshake_has_gone_and_is_no_impostor(
    directory: Path,
) -> None:
    with Meeting(TlsFiles(directory)) as meeting:
        where = (meeting.listener.address.host, meeting.listener.address.port)
        socket.create_connection(where).close()
        assert "went away during the TLS handshake" in meeting.await_stranger()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up, args=(server,))
        thread.start()
        address = Address("tcp", "localhost", server.getsockname()[1])
        with pytest.raises(PeerError, match="went away during the TLS handshake") as caught:
            dial(address, tls=TlsFiles(directory), insecure=False, timeout_ns=5 * SECOND_NS)
        assert "is TLS on" in caught.value.hint
        thread.join()


def hang_up(server: socket.socket) -> None:
    caller, _ = server.accept()
    with caller:
        caller.recv(1 << 16)


def test_a_peer_that_has_gone_costs_no_time_while_nothing_is_to_be_done(directory: Path) -> None:
    files = TlsFiles(directory)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=say_goodbye, args=(server, files))
        thread.start()
        address = Address("tcp", "localhost", server.getsockname()[1])
        near = dial(address, tls=files, insecure=False, timeout_ns=5 * SECOND_NS)
        thread.join()
    assert os.read(near.in_fd, 1) == b""
    os.write(near.out_fd, b"answered by a reset")
    before = time.process_time()
    threading.Event().wait(0.1)
    assert time.process_time() - before < 0.03
    near.abandon()


def say_goodbye(server: socket.socket, files: TlsFiles) -> None:
    """End a connection well, and be gone before the other end has."""
    caller, _ = server.accept()
    ends_ns = time.monotonic_ns() + 5 * SECOND_NS
    secured, _ = handshake(caller, files, host=None, ends_ns=ends_ns, wake_fd=-1)
    with secured, suppress(OSError):
        secured.unwrap()
