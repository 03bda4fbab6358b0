"""The source's beginning: its connections, greetings both ways, and who is at the other end."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from vfiomig._version import __version__
from vfiomig.device import Device
from vfiomig.errors import MigrationError, PeerError
from vfiomig.framing.manifest import DeviceEntry
from vfiomig.live import wire
from vfiomig.live.address import Address
from vfiomig.live.connection import Connection, dial, from_descriptors
from vfiomig.live.link import Inbox, Outbox
from vfiomig.live.messages import Fail, Hello, Left
from vfiomig.live.options import SendOptions
from vfiomig.live.session import peer_failed
from vfiomig.live.wire import Greeting, Kind
from vfiomig.worker import Cancellation


class Met(NamedTuple):
    """Who is there. Everything is the stack's. outboxes: of each connection; inbox: the first's."""

    name: str
    peer: str
    outboxes: list[Outbox]
    inbox: Inbox
    hello: Hello


class Dialer:
    """Makes the connections of one session. cancellation ends its waits, last its words."""

    def __init__(
        self,
        address: Address,
        session: bytes,
        options: SendOptions,
        cancellation: Cancellation,
        last: Cancellation,
    ) -> None:
        self._address, self._session, self._options = address, session, options
        self._cancellation, self._last = cancellation, last

    def meet(self, stack: ExitStack, devices: Sequence[Device]) -> Met:
        """Say hello for devices, and hear the answer. Raises MigrationError, the peer's too."""
        count = self._count(len(devices))
        first, outbox, inbox = self._greet(stack, len(devices), 0, count, b"")
        outbox.say(Hello(f"vfiomig {__version__}", entries_of(devices)))
        hello = _hear_hello(inbox, first.name, len(devices))
        outboxes = [outbox]
        token = _token(hello, first.name)
        for index in range(1, count):
            outboxes.append(self._greet(stack, len(devices), index, count, token)[1])
        return Met(first.name, first.peer, outboxes, inbox, hello)

    def _count(self, devices: int) -> int:
        if self._address.is_open:
            return 1
        return min(self._options.connections or devices, devices, wire.MAX_CONNECTIONS)

    def _greet(
        self, stack: ExitStack, devices: int, index: int, count: int, token: bytes
    ) -> tuple[Connection, Outbox, Inbox]:
        connection = self._connect()
        stack.callback(connection.close)
        outbox = Outbox(connection, self._session, self._last, from_source=True)
        stack.callback(outbox.close)
        inbox = Inbox(
            connection,
            self._cancellation,
            buffer_bytes=wire.MAX_MESSAGE_BYTES,
            silence_ns=self._options.handshake_ns,
            devices=devices,
        )
        token = token.ljust(wire.SESSION_BYTES, b"\0")
        outbox.greet(Greeting(self._session, index, count, token))
        if inbox.greeting().session != self._session:
            raise PeerError(f"{connection.name} answers for another session")
        inbox.begin(self._session, from_source=False)
        return connection, outbox, inbox

    def _connect(self) -> Connection:
        if self._address.is_open:
            return from_descriptors(self._address, self._options.tls)
        return dial(
            self._address,
            tls=self._options.tls,
            insecure=self._options.insecure,
            timeout_ns=self._options.handshake_ns,
            wake_fd=self._cancellation.fileno(),
        )


def entries_of(devices: Sequence[Device]) -> tuple[DeviceEntry, ...]:
    """Return what a hello says of devices."""
    return tuple(
        DeviceEntry(
            device.name, device.identity, device.capabilities.names, device.stop_copy_length()
        )
        for device in devices
    )


def _hear_hello(inbox: Inbox, name: str, devices: int) -> Hello:
    header = inbox.header()
    message = inbox.message(header) if header.kind is Kind.MESSAGE else None
    if isinstance(message, Fail):
        raise _refused(inbox, message, name)
    if not isinstance(message, Hello):
        raise PeerError(f"{name} did not answer with its hello")
    if len(message.devices) != devices:
        raise PeerError(f"{name} answers with {len(message.devices)} devices, not {devices}")
    return message


def _refused(inbox: Inbox, fail: Fail, name: str) -> MigrationError:
    """Return the peer's refusal, with what it says of its devices, if it does."""
    error = peer_failed(fail, name)
    with suppress(MigrationError):
        last = inbox.message(inbox.header())
        if isinstance(last, Left):
            error.destination_state = ", ".join(last.states)
    return error


def _token(hello: Hello, name: str) -> bytes:
    try:
        token = bytes.fromhex(hello.token)
    except ValueError:
        token = b""
    if len(token) != wire.SESSION_BYTES:
        raise PeerError(f"{name} gave no token for further connections")
    return token
