"""The destination of a live migration: nothing runs here before everything is there, and GO.

report = receive([device], "tcp:[::]:4444", ReceiveOptions(tls=...))
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from vfiomig._version import __version__
from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    MigrationError,
    PeerError,
    UsageError,
)
from vfiomig.fit import doubt, incompatible, misfits
from vfiomig.live import handover, order
from vfiomig.live.address import Address, parse_address
from vfiomig.live.arrivals import Arrivals
from vfiomig.live.connection import Connection
from vfiomig.live.dialing import entries_of
from vfiomig.live.handover import Act, Destination, DestinationEvent
from vfiomig.live.journal import Journal, Role, journal_directory
from vfiomig.live.link import Inbox, Outbox
from vfiomig.live.messages import (
    Begin,
    Bye,
    Done,
    End,
    Go,
    Hello,
    Left,
    Mark,
    Marked,
    Message,
    Progress,
    Ready,
    Resuming,
    Status,
    Stopping,
)
from vfiomig.live.options import MAX_DEVICES, ReceiveOptions, check_protocol
from vfiomig.live.party import Party
from vfiomig.live.session import (
    Pulse,
    new_id,
)
from vfiomig.live.taker import Taker
from vfiomig.live.wire import CONTROL, FrameHeader, Greeting, Kind
from vfiomig.rates import Rates
from vfiomig.report import Connected, MigrationProgress, MigrationReport, MovedDevice, OnEvent
from vfiomig.switchover import Band
from vfiomig.threads import together
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation


def receive(
    devices: Sequence[Device],
    url: str,
    options: ReceiveOptions = ReceiveOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
    cancellation: Cancellation | None = None,
) -> MigrationReport:
    """Wait for a source at url, and take its devices' state into these, which then run.

    url: tcp:HOST:PORT (HOST "" is 127.0.0.1, PORT 0 any: Connected tells), unix:PATH,
    vsock:CID:PORT, fd:N, or -. The source's first device goes into the first here, and so on. One
    session; strangers meanwhile are turned away. Blocks; threads, events, exceptions as of send().
    Raises MigrationError: then no device runs with what came; those that were touched were reset.
    """
    options.check()
    if not 0 < len(devices) <= MAX_DEVICES:
        raise UsageError(f"{len(devices)} devices: 1 to {MAX_DEVICES}")
    for device in devices:
        check_protocol(device)
    address = parse_address(url)
    with closing(Cancellation()) as own:
        stop = cancellation or own
        return _Receiving(devices, address, options, on_event, stop).run_in_thread()


class _Receiving(Party):
    """The destination's end."""

    def __init__(
        self,
        devices: Sequence[Device],
        address: Address,
        options: ReceiveOptions,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        super().__init__(devices, address, on_event, cancellation)
        self._options, self._name = options, str(address)
        self._place = Destination.LOADING
        self._takers = [Taker(device, options.max_state_bytes) for device in devices]
        self._inboxes: Sequence[Inbox] = ()
        self._told: tuple[int, ...] = ()
        self._ran_ns = self._commit_ns = 0
        self._has_never_run = False

    def _prepare(self, stack: ExitStack) -> None:
        for device in self._devices:
            device.check_in(DeviceState.RUNNING)
        self._directory = self._options.journal or journal_directory()
        self._rates = Rates(self._directory)
        self._arrivals = stack.enter_context(
            closing(Arrivals(self._address, self._options, self._cancellation, self._stranger))
        )

    def _work(self, stack: ExitStack) -> MigrationReport:
        self._meet(stack)
        begin = self._words.wait_for(Begin)
        if not begin.lease_ns:  # it would be one without an end
            raise PeerError(f"{self._name} begins with a lease of no time")
        together([taker.resume for taker in self._takers], self._words.fail)
        self._check()
        self._send(Resuming())
        self._load()
        self._act(DestinationEvent.COMMITTED)
        if not self._words.wait(lambda: self._words.said(Go) is not None, begin.lease_ns):
            raise PeerError(f"{self._name} did not say GO within the lease")
        with self._recorder.phase("resume", self._loaded):
            self._act(DestinationEvent.GO)
        self._act(DestinationEvent.RAN)
        return self._part()

    def _stranger(self, text: str) -> None:
        self._recorder.remark(text)

    # The beginning.

    def _meet(self, stack: ExitStack) -> None:
        self._recorder.observe(Connected(str(self._arrivals.address), ""))
        connection, greeting = self._arrivals.first(stack, self._options.wait_ns)
        self._session, self._name = greeting.session, connection.name
        self._outbox = self._answer(stack, connection, greeting)
        inbox = self._inbox(connection, self._options.handshake_ns)
        hello = self._hear_hello(inbox)
        self._check_fit(hello)
        self._recorder.observe(Connected(str(self._arrivals.address), connection.peer))
        facts = {
            "devices": [device.opened_as or device.name for device in self._devices],
            "address": str(self._address),
            "peer": connection.peer,
        }
        self._journal = stack.enter_context(
            closing(Journal.create(self._directory, self._session.hex(), Role.DESTINATION, facts))
        )
        token = new_id()
        # First: who hears the token may be at the door before say() has returned.
        self._arrivals.expect(self._session, token, greeting.count)
        self._outbox.say(self._own_hello(token))
        inboxes = [inbox]
        for other, its in self._arrivals.others(stack, greeting.count - 1):
            self._answer(stack, other, its)
            inboxes.append(self._inbox(other, 0))
        self._start(inboxes)

    def _answer(self, stack: ExitStack, connection: Connection, greeting: Greeting) -> Outbox:
        outbox = Outbox(connection, self._session, self._last, from_source=False)
        stack.callback(outbox.close)
        outbox.greet(Greeting(self._session, greeting.index, greeting.count))
        return outbox

    def _inbox(self, connection: Connection, silence_ns: int) -> Inbox:
        inbox = Inbox(
            connection,
            self._cancellation,
            buffer_bytes=self._options.buffer_bytes,
            silence_ns=silence_ns,
            devices=len(self._devices),
        )
        inbox.begin(self._session, from_source=True)
        return inbox

    def _hear_hello(self, inbox: Inbox) -> Hello:
        header = inbox.header()
        message = inbox.message(header) if header.kind is Kind.MESSAGE else None
        if not isinstance(message, Hello):
            raise PeerError(f"{self._name} did not begin with its hello")
        return message

    def _check_fit(self, hello: Hello) -> None:
        if len(hello.devices) != len(self._devices):
            raise UsageError(
                f"{self._name} sends {len(hello.devices)} devices, and"
                f" {len(self._devices)} are here to receive them",
                hint="name as many devices at both ends, in the same order",
            )
        pairs = []
        for theirs, mine in zip(hello.devices, entries_of(self._devices), strict=True):
            found = misfits(theirs, mine, allow=self._options.allow_mismatch)
            pairs.append((theirs.name, mine.name, found))
            if text := doubt(theirs, mine):
                self._recorder.warn(text)
        if any(found for _, _, found in pairs):
            raise incompatible(pairs)

    def _own_hello(self, token: bytes) -> Hello:
        known = [self._rates.of_destination(device.identity) for device in self._devices]
        return Hello(
            f"vfiomig {__version__}",
            entries_of(self._devices),
            token.hex(),
            tuple(_median(found.bytes_per_s) if found else 0 for found in known),
            tuple(_median(found.fixed_ns) if found else 0 for found in known),
            self._options.max_state_bytes,
        )

    def _start(self, inboxes: Sequence[Inbox]) -> None:
        self._pulse = Pulse(
            self._cancellation,
            self._tick,
            self._beat,
            self._is_due,
            self._on_cancel,
            lambda: None,  # nothing here is torn: what the source sends is read, and dropped
        )
        self._inboxes = inboxes
        for inbox in inboxes:
            inbox.wake_on(self._wake)
            self._ears.listen(inbox, self._handle)
        inboxes[0].set_silence(self._options.silence_ns)

    # What comes, in the threads that read.

    def _handle(self, inbox: Inbox, header: FrameHeader) -> bool:
        try:
            if header.kind is Kind.MESSAGE:
                self._heed(header.stream, inbox.message(header))
            elif header.kind is Kind.PROBE:
                inbox.drop(header)
            else:
                self._takers[header.stream].take(inbox, header)
        except MigrationError as err:
            if isinstance(err, PeerError | CancelledError):
                raise
            self._words.fail(err)  # ours: read on, so that the source hears of it
            self._stop_copying()
        return True

    def _heed(self, stream: int, message: Message) -> None:
        if stream == CONTROL:
            self._words.hear(message)
        elif isinstance(message, Mark):
            self._takers[stream].settle()
            self._say(Marked(stream, message.number))
        elif isinstance(message, End):
            self._takers[stream].end(message)
            self._words.nudge()
        else:
            raise PeerError(f"{self._name} says {type(message).__name__} for a device")

    # The way.

    def _load(self) -> None:
        """Let the threads that read fill the devices, and commit them all."""
        with self._recorder.phase("load", self._loaded):
            self._words.wait(lambda: all(taker.is_ended for taker in self._takers))
        self._check()
        if self._words.said(Stopping) is None:
            raise PeerError(f"{self._name} ends a state without having stopped its devices")
        if self._words.said(Go) is not None:
            raise PeerError(f"{self._name} says GO before anything is ready")
        started_ns = time.monotonic_ns()
        with self._recorder.phase("commit", self._loaded):
            together([taker.commit for taker in self._takers], self._words.fail)
        self._commit_ns = time.monotonic_ns() - started_ns
        self._check()

    def _part(self) -> MigrationReport:
        """Wait for the source to part: what happens to it now changes nothing here."""
        self._await(Bye)
        if self._words.said(Bye) is None:
            self._recorder.remark(
                "the source has not confirmed: should it be stopped and in doubt,"
                f" vfiomig resolve {self._session.hex()} there"
            )
        return self._report()

    def _keep_rates(self, bye: Bye) -> None:
        """Keep what this told of the devices, for the next estimate."""
        fixed_ns = self._commit_ns + self._ran_ns - self._words.heard_ns(Go)
        for taker, rate in zip(self._takers, bye.rates, strict=False):
            self._rates.add(
                "destination",
                taker.device.identity,
                bytes_per_s=rate,
                fixed_ns=fixed_ns,
                moved_bytes=taker.device_bytes - taker.pre_copy_bytes,
            )

    def _act(self, event: DestinationEvent) -> None:
        place, acts = handover.at_destination(self._place, event)

        def arrive() -> None:
            self._place = place

        self._perform(acts, arrive)

    def _do(self, act: Act) -> None:
        match act:
            case Act.RECORD_READY:
                self._record("ready")
            case Act.SAY_READY:
                self._send(
                    Ready(
                        tuple(taker.device_bytes for taker in self._takers),
                        tuple(taker.digest for taker in self._takers),
                        self._commit_ns,
                    )
                )
            case Act.RECORD_GO:
                self._record("go")
            case Act.RUN:
                order.let_run(self._devices)
                self._ran_ns = time.monotonic_ns()
            case Act.RECORD_RUNNING:
                self._note("running")
            case Act.SAY_DONE:
                took_ns = self._ran_ns - self._words.heard_ns(Go)
                stopped_ns = self._ran_ns - self._words.heard_ns(Stopping)
                self._say(Done(took_ns, self._commit_ns + took_ns, stopped_ns))
            case Act.RESET:
                together([taker.undo for taker in self._takers], lambda _: None)
            case Act.RECORD_FORGETTING:
                self._note("forgetting")
            case Act.RECORD_FORGOTTEN:
                self._note("forgotten")
            case Act.SAY_NEVER_RAN:
                self._has_never_run = True  # only now: a reset that fails may leave one running
            case _:
                raise AssertionError(act)

    # The end of one that failed.

    @property
    def _is_over(self) -> bool:
        return self._place in (Destination.RUNNING, Destination.FORGOTTEN)

    @property
    def _is_held(self) -> bool:
        return False

    def _roll_back(self) -> None:
        self._act(DestinationEvent.FAILED)

    def _stop_copying(self) -> None:
        for taker in self._takers:
            taker.drop()

    def _say_left(self, states: tuple[str, ...]) -> None:
        self._say(Left(self._has_never_run, states))

    def _note_states(self, err: MigrationError, here: str, there: str) -> None:
        err.source_state, err.destination_state = there, here

    @property
    def _phase(self) -> str:
        if any(taker.is_touched for taker in self._takers):
            return {Destination.LOADING: "load", Destination.READY: "hand-over"}.get(
                self._place, "resume"
            )
        return "hello"

    def _handle_last(self, inbox: Inbox, header: FrameHeader) -> bool:
        if header.kind is Kind.MESSAGE:
            message = inbox.message(header)
            if header.stream == CONTROL:
                self._words.hear(message)
        elif header.kind is Kind.PROBE:
            inbox.drop(header)
        else:
            self._takers[header.stream].take(inbox, header)
        return True

    def _loaded(self) -> int:
        return sum(taker.device_bytes for taker in self._takers)

    # The pulse, in threads of its own.

    def _progress(self) -> MigrationProgress:
        status = self._words.said(Status)
        return MigrationProgress(
            phase=self._phase,
            round=status.round if status else 0,
            device_bytes=self._loaded(),
            pending_bytes=status.pending_bytes if status else 0,
            bytes_per_s=0,
            expected_downtime_ns=status.expected_downtime_ns if status else 0,
            elapsed_ns=self._recorder.duration_ns,
        )

    def _is_due(self) -> bool:
        return self._told != tuple(taker.device_bytes for taker in self._takers)

    def _beat(self) -> None:
        self._told = tuple(taker.device_bytes for taker in self._takers)
        self._say(Progress(self._told))

    def _on_cancel(self) -> None:
        if self._place in (Destination.LOADING, Destination.READY):
            self._cancel()
            self._stop_copying()

    def _report(self) -> MigrationReport:
        bye, stopping_ns = self._words.said(Bye), self._words.heard_ns(Stopping)
        if bye is not None:
            self._keep_rates(bye)
        moved = tuple(
            MovedDevice(
                taker.device.name,
                taker.device_bytes,
                taker.pre_copy_bytes,
                taker.zero_bytes,
                taker.digest,
                DeviceState.RUNNING,
            )
            for taker in self._takers
        )
        status, stopping = self._words.said(Status), self._words.said(Stopping)
        return MigrationReport(
            role="destination",
            session=self._session.hex(),
            peer=self._name,
            devices=moved,
            stream_bytes=sum(inbox.offset for inbox in self._inboxes),
            rounds=status.round if status else 0,
            duration_ns=self._recorder.duration_ns,
            downtime_ns=bye.downtime_ns if bye else None,
            downtime_error_ns=bye.downtime_error_ns if bye else None,
            source_downtime_ns=bye.source_downtime_ns if bye else None,
            destination_downtime_ns=self._ran_ns - stopping_ns,
            expected_downtime_ns=stopping.expected_downtime_ns if stopping else 0,
            downtime_limit_ns=None,
            bytes_per_s=0,
            phases=tuple(self._recorder.phases),
            state_changes=tuple(self._recorder.state_changes),
            warnings=tuple(self._recorder.warnings),
        )


def _median(band: Band | None) -> int:
    return band.median if band is not None else 0
