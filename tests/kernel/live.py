"""Both ends of a live migration by the command, and devices that other processes hold for them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernel.command import Finished, Running, run, start
from kernel.mtty import Mtty, Port, Registers
from live_commands import Proxy, proxy
from vfiomig import lending

# A sender that stays in PRE_COPY: 96 bytes would take longer at this rate than is allowed.
STAYING = ("--max-bandwidth", "1K", "--downtime-limit", "1ms")
STAYING_LONG = ("--pre-copy-rounds", "1000000", "--pre-copy-time", "1h")
# The lab stalls.
PATIENT = ("--silence", "30s")


@dataclass(frozen=True)
class Held:
    """An mtty-2 that a process keeps open, and lends at a socket. name: to borrow it by."""

    path: Path

    @property
    def name(self) -> str:
        """What a command calls it."""
        return f"unix:{self.path}"

    def state(self) -> str:
        """Return the state it is in."""
        return run("state", self.name).text.strip()

    def ports(self) -> list[Port]:
        """Return what its ports hold; the FIFOs are empty afterwards."""
        _, _, device_fd = lending.borrow(str(self.path))
        with device_fd:
            return Registers(device_fd.fileno(), 2).ports()

    def is_running(self, ports: Sequence[Port]) -> bool:
        """Whether it is RUNNING, and its ports hold these."""
        return (self.state(), self.ports()) == ("RUNNING", list(ports))


@contextmanager
def holding(mtty: Mtty, path: Path) -> Iterator[Held]:
    """Hold a device in a process of its own."""
    with start("hold", mtty.uuid, "--socket", str(path), "-v") as process:
        process.wait_for_talk("holding")
        yield Held(path)


@dataclass(frozen=True)
class Moved:
    """What both ends said."""

    sent: Finished
    received: Finished

    @property
    def codes(self) -> tuple[int, int]:
        """Their exit codes."""
        return self.sent.code, self.received.code


@dataclass(frozen=True)
class Ends:
    """The commands of both ends, with --json. folder: of their journals, and of sockets."""

    folder: Path

    @property
    def socket(self) -> str:
        """The URL of a socket where nobody listens yet."""
        return f"unix:{self.folder}/session.sock"

    @contextmanager
    def receiving(self, *words: str) -> Iterator[tuple[Running, str]]:
        """Start a receiver. words: its devices, its URL, its options. Yields where it listens."""
        with start("receive", *words, *PATIENT, *self._common("there")) as process:
            told = process.wait_for_output('"listening"')
            listening = Finished(0, told[: told.rindex("\n")].encode(), "").of_type("listening")
            yield process, listening[0]["address"]

    @contextmanager
    def sending(self, *words: str) -> Iterator[Running]:
        """Start a sender."""
        with start("send", *words, *PATIENT, *self._common("here")) as process:
            yield process

    def move(self, sources: Sequence[str], destinations: Sequence[str], *words: str) -> Moved:
        """Migrate over a UNIX socket. words: the sender's options."""
        with (
            self.receiving(*destinations, self.socket) as (receiver, address),
            self.sending(*sources, address, "--downtime-limit", "1m", *words) as sender,
        ):
            return Moved(sender.finish(), receiver.finish())

    @contextmanager
    def staying(self, source: str, destination: str) -> Iterator[tuple[Running, Running]]:
        """Start a migration that stays in PRE_COPY, and in RESUMING. Yields sender and receiver."""
        with (
            self.receiving(destination, self.socket) as (receiver, address),
            self.sending(source, address, *STAYING, *STAYING_LONG) as sender,
        ):
            receiver.wait_for_output('"wanted": "RESUMING"')
            sender.wait_for_output('"wanted": "PRE_COPY"')
            yield sender, receiver

    @contextmanager
    def withheld(
        self, word: str, source: str, destination: str
    ) -> Iterator[tuple[Running, Running, Proxy]]:
        """Start a migration that waits for a word of the hand-over: ready, go or done.

        It was said, and is not heard. Yields sender and receiver, and what is between them.
        """
        with ExitStack() as stack:
            there = self.receiving(destination, self.socket)
            receiver, address = stack.enter_context(there)
            listen, connect = f"{self.folder}/proxy.sock", address.removeprefix("unix:")
            text = f'"type":"{word}"'.encode()
            between = stack.enter_context(proxy(text, listen=listen, connect=connect))
            sender = stack.enter_context(self.sending(source, f"unix:{listen}"))
            assert between.held.wait(30)
            yield sender, receiver, between

    def resolve(self, side: str, *words: str) -> Finished:
        """Resolve the session at "here" or "there"."""
        return run("resolve", self.session(side), *words, *self._common(side))

    def session(self, side: str) -> str:
        """Return the one session that has a journal at that side."""
        (listed,) = run("resolve", *self._common(side)).of_type("result")
        (found,) = listed["sessions"]
        return str(found["session"])

    def _common(self, side: str) -> tuple[str, ...]:
        return "--journal", str(self.folder / side), "--json"
