"""A whole migration over mutual TLS; and who cannot prove what he is never comes near a device."""

import os
import queue
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vfiomig
from devices import no_leak
from live_ends import Ends, ends
from test_live_tls import Authority
from vfiomig import Cancellation, Connected, DeviceState, MigrationError, MigrationReport
from vfiomig.live.tls import TlsFiles
from vfiomig.report import Event

SMALL = "sim:?size=300001"


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories for --tls-dir, by what is wrong with them."""
    authority = Authority(tmp_path_factory.mktemp("pki"))
    other = Authority(tmp_path_factory.mktemp("other-pki"))
    made = {
        "good": authority.directory(),
        "elsewhere": authority.directory("DNS:elsewhere.example"),
        "expired": authority.directory(days=0),
        "other": other.directory(),
        "borrowed": authority.directory(),
        "keyless": authority.directory(),
        "open": authority.directory(),
    }
    # Trusts the right authority, and shows a certificate of the other.
    for name in ("client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"):
        shutil.copy(made["other"] / name, made["borrowed"] / name)
    for role in ("client", "server"):
        (made["keyless"] / f"{role}-cert.pem").unlink()
        (made["open"] / f"{role}-key.pem").chmod(0o644)
    return made


class Listening:
    """A receiver in a thread of its own: url leads to it. Strangers are told in warnings."""

    def __init__(self, both: Ends, tls: TlsFiles | None, *, url: str = "tcp:127.0.0.1:0") -> None:
        self._both, self._tls, self._url = both, tls, url
        self._addresses: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancellation = Cancellation()
        self.thread = threading.Thread(target=self._receive)
        self.thread.start()
        self.url = self._addresses.get(timeout=30)

    def _receive(self) -> None:
        try:
            self._both.destination.report = vfiomig.receive(
                self._both.destinations,
                self._url,
                self._both.receive_options(tls=self._tls),
                on_event=self._note,
                cancellation=self.cancellation,
            )
        except MigrationError as err:
            self._both.destination.error = err
            self._addresses.put("")

    def _note(self, event: Event) -> None:
        if isinstance(event, Connected) and not event.peer:
            self._addresses.put(event.address)
        elif isinstance(event, vfiomig.Warning):
            self.warnings.put(event.text)

    def send(self, tls: TlsFiles | None, *, host: str = "127.0.0.1") -> MigrationReport:
        """Send to it. host: another name of the same host."""
        url = self.url.replace("127.0.0.1", host)
        return vfiomig.send(self._both.sources, url, self._both.send_options(tls=tls))

    def refuse(self, tls: TlsFiles | None, *, host: str = "127.0.0.1") -> MigrationError:
        """Send to it, in vain. Returns the error; nothing has happened to any device."""
        with pytest.raises(MigrationError) as caught:
            self.send(tls, host=host)
        check_untouched(self._both)
        assert caught.value.source_state.endswith("is RUNNING")
        return caught.value


@contextmanager
def listening(
    both: Ends, tls: TlsFiles | None, *, url: str = "tcp:127.0.0.1:0"
) -> Iterator[Listening]:
    receiver = Listening(both, tls, url=url)
    try:
        yield receiver
        receiver.thread.join(30)
    finally:
        receiver.cancellation.cancel()
        receiver.thread.join()
        receiver.cancellation.close()


def check_untouched(both: Ends) -> None:
    for device in (*both.sources, *both.destinations):
        assert {state for _, state in device.history} <= {DeviceState.RUNNING}
        assert device.state() is DeviceState.RUNNING


def check_second(both: Ends, receiver: Listening, good: TlsFiles) -> None:
    """The receiver still listens, and who can prove what he is is let in."""
    both.source.report = receiver.send(good)
    receiver.thread.join(30)
    both.check_moved()


@pytest.mark.parametrize("url", ["tcp:127.0.0.1:0", "tcp:localhost:0", "unix"])
def test_a_migration_over_tls(tmp_path: Path, pki: dict[str, Path], url: str) -> None:
    files = TlsFiles(pki["good"])
    url = f"unix:{tmp_path}/sock" if url == "unix" else url
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, files, url=url) as receiver:
        both.source.report = receiver.send(files)
        receiver.thread.join(30)
        both.check_moved()


def test_several_connections_of_one_session_are_all_secured(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    files = TlsFiles(pki["good"])
    with no_leak(), ends(tmp_path, SMALL, count=3) as both, listening(both, files) as receiver:
        both.source.report = receiver.send(files)
        receiver.thread.join(30)
        both.check_moved()


def test_names_that_were_allowed_are_let_in(tmp_path: Path, pki: dict[str, Path]) -> None:
    elsewhere = frozenset({"elsewhere.example"})
    here, there = TlsFiles(pki["good"], elsewhere), TlsFiles(pki["elsewhere"])
    with ends(tmp_path, SMALL) as both, listening(both, there) as receiver:
        both.source.report = receiver.send(here)
        receiver.thread.join(30)
        both.check_moved()


@pytest.mark.parametrize("attempt", range(20))
def test_the_tail_of_a_large_state_arrives(
    tmp_path: Path, pki: dict[str, Path], attempt: int
) -> None:
    files = TlsFiles(pki["good"])
    with ends(tmp_path, "sim:?size=16M") as both, listening(both, files) as receiver:
        pre_copy = None if attempt % 2 else vfiomig.PreCopyLimits()
        options = both.send_options(tls=files, pre_copy=pre_copy, switch_on_limit=True)
        both.source.report = vfiomig.send(both.sources, receiver.url, options)
        receiver.thread.join(30)
        both.check_moved()
        assert both.source.done.devices[0].digest == both.destination.done.devices[0].digest
        assert both.source.done.devices[0].device_bytes >= 16 << 20


# Who dials cannot prove what he is, or is not content with who listens. The codes are those of the
# dialer: 9 where only the connection shows it, because the listener finds out after TLS 1.3's
# handshake is over for the dialer.

DIALERS = {
    "another authority": ("other", frozenset[str](), "127.0.0.1", {13}),
    "a certificate of another authority": ("borrowed", frozenset[str](), "127.0.0.1", {9, 13}),
    "an expired certificate": ("expired", frozenset[str](), "127.0.0.1", {9, 13}),
    "wants another name": ("good", frozenset({"elsewhere.example"}), "127.0.0.1", {13}),
    "dials another name": ("good", frozenset[str](), "127.0.0.2", {13}),
}


@pytest.mark.parametrize(("directory", "peers", "host", "codes"), DIALERS.values(), ids=DIALERS)
def test_a_dialer_who_is_not_right_is_turned_away_and_the_next_is_let_in(
    tmp_path: Path,
    pki: dict[str, Path],
    directory: str,
    peers: frozenset[str],
    host: str,
    codes: set[int],
) -> None:
    good = TlsFiles(pki["good"])
    url = "tcp:0.0.0.0:0" if host == "127.0.0.2" else "tcp:127.0.0.1:0"
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, good, url=url) as receiver:
        receiver.url = receiver.url.replace("0.0.0.0", "127.0.0.1")
        err = receiver.refuse(TlsFiles(pki[directory], peers), host=host)
        assert err.code in codes, repr(err)
        assert "TLS" in str(err) or "the peer is" in str(err)
        assert "was turned away" in receiver.warnings.get(timeout=30)
        check_second(both, receiver, good)


def test_a_dialer_who_is_not_on_the_list_is_turned_away(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    choosy = TlsFiles(pki["good"], frozenset({"elsewhere.example"}))
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, choosy) as receiver:
        err = receiver.refuse(TlsFiles(pki["good"]))
        assert err.code in (9, 13)
        told = receiver.warnings.get(timeout=30)
        assert "the peer is localhost or 127.0.0.1, and not elsewhere.example" in told
        check_second(both, receiver, TlsFiles(pki["elsewhere"], frozenset({"localhost"})))


@pytest.mark.parametrize("kind", ["other", "borrowed", "expired", "elsewhere"])
def test_a_listener_who_is_not_right_gets_nothing(
    tmp_path: Path, pki: dict[str, Path], kind: str
) -> None:
    with no_leak(), ends(tmp_path, SMALL) as both:
        with listening(both, TlsFiles(pki[kind])) as receiver:
            err = receiver.refuse(TlsFiles(pki["good"]))
            assert err.code == 13
            assert err.hint
            assert "was turned away" in receiver.warnings.get(timeout=30)
            receiver.cancellation.cancel()
        check_untouched(both)
        assert both.destination.failure.code == 14


def test_tls_at_the_receiver_alone_lets_nobody_in_without(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    good = TlsFiles(pki["good"])
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, good) as receiver:
        assert receiver.refuse(None).code == 9
        assert "TLS handshake failed" in receiver.warnings.get(timeout=30)
        check_second(both, receiver, good)


def test_tls_at_the_sender_alone_sends_nothing(tmp_path: Path, pki: dict[str, Path]) -> None:
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, None) as receiver:
        assert receiver.refuse(TlsFiles(pki["good"])).code in (9, 13)
        told = receiver.warnings.get(timeout=30)
        assert "does not speak vfiomig's session protocol" in told
        both.source.report = receiver.send(None)
        receiver.thread.join(30)
        both.check_moved()


def test_who_shows_no_certificate_at_all_is_turned_away(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    good = TlsFiles(pki["good"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki["good"] / "ca-cert.pem")
    with no_leak(), ends(tmp_path, SMALL) as both, listening(both, good) as receiver:
        port = int(receiver.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as plain:
            secured = context.wrap_socket(plain, server_hostname="localhost")
            with secured, pytest.raises(OSError, match=r"alert|reset|EOF"):
                assert secured.recv(1)
        assert "certificate" in receiver.warnings.get(timeout=30).lower()
        check_untouched(both)
        check_second(both, receiver, good)


@pytest.mark.parametrize(
    ("kind", "text"), [("keyless", "cannot read .*-cert.pem"), ("open", "can be read by others")]
)
def test_files_that_cannot_be_used_are_found_at_either_end_before_anything_else(
    tmp_path: Path, pki: dict[str, Path], kind: str, text: str
) -> None:
    bad = TlsFiles(pki[kind])
    with no_leak(), ends(tmp_path, SMALL) as both:
        with pytest.raises(vfiomig.AuthenticationError, match=text) as caught:
            vfiomig.send(both.sources, "tcp:127.0.0.1:1", both.send_options(tls=bad))
        assert caught.value.hint
        with pytest.raises(vfiomig.AuthenticationError, match=text):
            vfiomig.receive(both.destinations, "tcp:127.0.0.1:0", both.receive_options(tls=bad))
        check_untouched(both)


def test_there_is_no_tls_over_what_is_connected_already(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    good = TlsFiles(pki["good"])
    near, far = socket.socketpair()
    with near, far, ends(tmp_path, SMALL) as both:
        with pytest.raises(vfiomig.UsageError, match="there is no TLS over it"):
            vfiomig.send(both.sources, f"fd:{near.fileno()}", both.send_options(tls=good))
        with pytest.raises(vfiomig.UsageError, match="there is no TLS over it"):
            vfiomig.receive(both.destinations, f"fd:{far.fileno()}", both.receive_options(tls=good))
        check_untouched(both)
        assert os.fstat(near.fileno())
