"""Both ends of a live migration in one process: two threads, real sockets between them."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import vfiomig
from devices import Simulated, seeded
from vfiomig import Cancellation, MigrationError, MigrationReport, ReceiveOptions, SendOptions
from vfiomig.report import OnEvent

# Everything else than what is waited for is over in milliseconds.
SILENCE_NS = 2_000_000_000


@dataclass
class End:
    """What one end came to: a report, or what it raised."""

    report: MigrationReport | None = None
    error: BaseException | None = None

    @property
    def done(self) -> MigrationReport:
        """The report; fails where there is none."""
        assert self.report is not None, repr(self.error)
        return self.report

    @property
    def failure(self) -> MigrationError:
        """The error; fails where there is none."""
        assert isinstance(self.error, MigrationError), repr(self.error or self.report)
        return self.error


@dataclass
class Ends:
    """The devices of both ends, which are open, and what each came to. journal: of both."""

    sources: Sequence[Simulated]
    destinations: Sequence[Simulated]
    journal: Path

    def __post_init__(self) -> None:
        self.source, self.destination = End(), End()
        self.before = [device.content() for device in self.sources]

    def run(
        self,
        send: Callable[[], MigrationReport],
        receive: Callable[[], MigrationReport],
    ) -> None:
        """Run both ends, the destination in a thread of its own."""
        thread = threading.Thread(target=_note, args=(self.destination, receive))
        thread.start()
        _note(self.source, send)
        thread.join(60)
        assert not thread.is_alive()

    def send_options(self, **options: object) -> SendOptions:
        """Return options of a test: its own journal, and short times."""
        given = {"journal": self.journal / "source", "silence_ns": SILENCE_NS, **options}
        return SendOptions(**given)  # type: ignore[arg-type]

    def receive_options(self, **options: object) -> ReceiveOptions:
        """Return options of a test: its own journal, and short times."""
        given = {"journal": self.journal / "destination", "silence_ns": SILENCE_NS, **options}
        return ReceiveOptions(**given)  # type: ignore[arg-type]

    def migrate(
        self,
        send: SendOptions | None = None,
        receive: ReceiveOptions | None = None,
        *,
        sockets: tuple[socket.socket, socket.socket] | None = None,
        on_source: OnEvent | None = None,
        on_destination: OnEvent | None = None,
        cancel_source: Cancellation | None = None,
        cancel_destination: Cancellation | None = None,
    ) -> None:
        """Migrate over one pair of sockets, by default a UNIX one."""
        near, far = sockets or socket.socketpair()

        def sending() -> MigrationReport:
            with near:
                return vfiomig.send(
                    self.sources,
                    f"fd:{near.fileno()}",
                    send or self.send_options(),
                    on_event=on_source,
                    cancellation=cancel_source,
                )

        def receiving() -> MigrationReport:
            with far:
                return vfiomig.receive(
                    self.destinations,
                    f"fd:{far.fileno()}",
                    receive or self.receive_options(),
                    on_event=on_destination,
                    cancellation=cancel_destination,
                )

        self.run(sending, receiving)

    def check_moved(self) -> None:
        """Exactly one side runs, the destination, with what the source held."""
        assert self.source.report is not None, repr(self.source.error)
        assert self.destination.report is not None, repr(self.destination.error)
        for there, before in zip(self.destinations, self.before, strict=True):
            assert there.state() is vfiomig.DeviceState.RUNNING
            assert there.content() == before
        for here in self.sources:
            assert here.state() is vfiomig.DeviceState.STOP

    def check_stayed(self) -> None:
        """Exactly one side runs with the state, the source; the destination is blank, or as was."""
        assert self.source.report is None
        for here, before in zip(self.sources, self.before, strict=True):
            assert here.state() is vfiomig.DeviceState.RUNNING
            assert here.content() == before
        for there, before in zip(self.destinations, self.before, strict=True):
            assert there.state() is vfiomig.DeviceState.RUNNING
            assert there.content() != before


def _note(end: End, job: Callable[[], MigrationReport]) -> None:
    try:
        end.report = job()
    except BaseException as err:  # noqa: BLE001  what the test looks at
        end.error = err


@contextmanager
def ends(
    journal: Path, source: str, destination: str | None = None, *, count: int = 1
) -> Iterator[Ends]:
    """Open count devices at each end: the sources seeded 1, 2, …, the destinations otherwise."""
    with ExitStack() as stack:

        def opened(url: str, seed: int) -> Simulated:
            return stack.enter_context(Simulated(seeded(url, seed)))

        sources = [opened(source, 1 + index) for index in range(count)]
        destinations = [opened(destination or source, 101 + index) for index in range(count)]
        yield Ends(sources, destinations, journal)
