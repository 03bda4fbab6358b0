"""The destination of a live migration: nothing runs here before everything is there, and GO.

report = receive([device], "tcp:[::]:4444", ReceiveOptions(tls=...))
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress

from vfiomig._version import __version__
from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceLostError,
    LocalIOError,
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
from vfiomig.live.options import MAX_DEVICES, ReceiveOptions
from vfiomig.live.session import (
    FAREWELL_NS,
    Ears,
    Pulse,
    Words,
    fail_of,
    new_id,
    state_text,
    states_text,
)
from vfiomig.live.taker import Taker
from vfiomig.live.wire import CONTROL, FrameHeader, Greeting, Kind
from vfiomig.rates import Rates
from vfiomig.recorder import Recorder
from vfiomig.report import Connected, MigrationProgress, MigrationReport, MovedDevice, OnEvent
from vfiomig.switchover import Band
from vfiomig.threads import together
from vfiomig.uapi import DeviceState
from vfiomig.worker import Cancellation, run_shielded


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
    address = parse_address(url)
    with closing(Cancellation()) as own:
        stop = cancellation or own
        job = _Receiving(devices, address, options, on_event, stop)
        try:
            return run_shielded(job.run, stop)
        except BaseException:
            # An exception in this thread that came too late to cancel: what is done is done.
            if job.report is not None:
                return job.report
            raise


class _Receiving:
    """One session. Runs in the working thread."""

    def __init__(
        self,
        devices: Sequence[Device],
        address: Address,
        options: ReceiveOptions,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        self._devices, self._address, self._options = devices, address, options
        self._cancellation = cancellation
        self._recorder = Recorder(", ".join(device.name for device in devices), on_event)
        self._words = Words(str(address), len(devices))
        self._place = Destination.LOADING
        self._takers = [Taker(device, options.max_state_bytes) for device in devices]
        self._outbox: Outbox | None = None
        self._journal: Journal | None = None
        self._told: tuple[int, ...] = ()
        self.report: MigrationReport | None = None
        self._ran_ns = self._commit_ns = 0
        self._session, self._name = b"", str(address)

    def run(self) -> MigrationReport:
        with ExitStack() as stack:
            self._wake = stack.enter_context(closing(Cancellation()))
            self._last = stack.enter_context(closing(Cancellation()))
            for device in self._devices:
                stack.enter_context(device.observed(self._recorder.observe))
                device.check_in(DeviceState.RUNNING)
            self._directory = self._options.journal or journal_directory()
            self._rates = Rates(self._directory)
            self._ears = Ears(self._words)
            self._arrivals = stack.enter_context(
                closing(Arrivals(self._address, self._options, self._cancellation, self._stranger))
            )
            try:
                self._meet(stack)
                return self._take_over()
            except BaseException as err:
                self._give_up(err)
                self._recorder.note_on(err)
                raise
            finally:
                self._last.cancel()
                self._end_threads()

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
        self._outbox.say(self._own_hello(token))
        self._arrivals.expect(self._session, token, greeting.count)
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
            for taker in self._takers:
                taker.drop()
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

    def _take_over(self) -> MigrationReport:
        begin = self._words.wait_for(Begin)
        together([taker.resume for taker in self._takers], self._words.fail)
        self._check()
        self._say(Resuming())
        with self._recorder.phase("load", self._loaded):
            self._words.wait(lambda: all(taker.is_ended for taker in self._takers))
        self._check()
        started_ns = time.monotonic_ns()
        with self._recorder.phase("commit", self._loaded):
            together([taker.commit for taker in self._takers], self._words.fail)
        self._commit_ns = time.monotonic_ns() - started_ns
        self._check()
        self._act(DestinationEvent.COMMITTED)
        if not self._words.wait(lambda: self._words.said(Go) is not None, begin.lease_ns):
            raise PeerError(f"{self._name} did not say GO within the lease")
        with self._recorder.phase("resume", self._loaded):
            self._act(DestinationEvent.GO)
        self._act(DestinationEvent.RAN)
        return self._part()

    def _part(self) -> MigrationReport:
        """Wait for the source to part: what happens to it now changes nothing here."""
        self._words.wait(lambda: self._words.said(Bye) is not None, FAREWELL_NS, heed=False)
        if self._words.said(Bye) is None:
            self._recorder.remark(
                "the source has not confirmed: should it be stopped and in doubt,"
                f" vfiomig resolve {self._session.hex()} there"
            )
        self.report = self._report()
        return self.report

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
        """Do what handover.py's table says. The place changes when its first act is done."""
        place, acts = handover.at_destination(self._place, event)
        for act in acts:
            self._do(act)
            self._place = place

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
                self._reset()
            case Act.RECORD_FORGETTING:
                self._note("forgetting")
            case Act.RECORD_FORGOTTEN:
                self._note("forgotten")
            case Act.SAY_NEVER_RAN:
                states = tuple(state_text(device, self._recorder) for device in self._devices)
                self._say(Left(never_ran=True, states=states))
            case _:
                raise AssertionError(act)

    def _record(self, event: str) -> None:
        assert self._journal is not None
        self._journal.record(event)

    def _note(self, event: str) -> None:
        """Record what is true whether it can be recorded or not."""
        try:
            if self._journal is not None:
                self._journal.record(event)
        except LocalIOError as err:
            self._recorder.remark(f"{event} could not be recorded: {err}")

    # The end.

    def _give_up(self, err: BaseException) -> None:
        """Reset what was touched, tell the source, and say on err what both were left in."""
        if self._place in (Destination.RUNNING, Destination.FORGOTTEN):
            return
        self._words.fail(err)
        self._say(fail_of(err, self._phase))
        self._restart_ears()
        try:
            self._act(DestinationEvent.FAILED)
        except DeviceLostError as lost:
            self._farewell(lost)
            raise lost from err
        self._farewell(err)

    @property
    def _phase(self) -> str:
        if any(taker.is_touched for taker in self._takers):
            return {Destination.LOADING: "load", Destination.READY: "hand-over"}.get(
                self._place, "resume"
            )
        return "hello"

    def _restart_ears(self) -> None:
        for taker in self._takers:
            taker.drop()
        self._wake.cancel()
        inboxes = self._ears.join()  # a reset closes descriptors: not while they are written to
        self._words.listen_again()
        if self._words.lost is None:
            for inbox in inboxes:
                inbox.wake_on(self._last)
                self._ears.listen(inbox, self._handle_last)

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

    def _farewell(self, err: BaseException) -> None:
        if self._ears.are_open:
            self._words.wait(lambda: self._words.said(Left) is not None, FAREWELL_NS, heed=False)
        if isinstance(err, MigrationError):
            states = [state_text(device, self._recorder) for device in self._devices]
            there = states_text(self._words.said(Left))
            err.source_state, err.destination_state = there, ", ".join(states)
            err.actual, err.phase = self._devices[0].state_or_none(), err.phase or self._phase
            unknown = "what became of the source is not known"
            if self._outbox is None:
                unknown = "no source has come"
            err.aftermath = "; ".join((*states, f"there: {there}" if there else unknown))

    def _reset(self) -> None:
        together([taker.undo for taker in self._takers], lambda _: None)

    def _check(self) -> None:
        self._recorder.check()
        self._words.check()

    def _loaded(self) -> int:
        return sum(taker.device_bytes for taker in self._takers)

    def _send(self, message: Message) -> None:
        assert self._outbox is not None
        self._outbox.say(message)

    def _say(self, message: Message) -> None:
        """Say it if there is somebody to hear it; that nobody is there shows elsewhere."""
        if self._outbox is not None:
            with suppress(PeerError, CancelledError):
                self._outbox.say(message)

    # The pulse, in threads of its own.

    def _tick(self) -> None:
        status = self._words.said(Status)
        event = MigrationProgress(
            phase="load" if self._place is Destination.LOADING else self._place.name.lower(),
            round=status.round if status else 0,
            device_bytes=self._loaded(),
            pending_bytes=status.pending_bytes if status else 0,
            bytes_per_s=0,
            expected_downtime_ns=status.expected_downtime_ns if status else 0,
            elapsed_ns=self._recorder.duration_ns,
        )
        self._recorder.observe(event)
        try:
            self._recorder.check()
        except BaseException as err:  # noqa: BLE001  the caller's own: it ends the work
            self._words.fail(err)

    def _is_due(self) -> bool:
        return self._told != tuple(taker.device_bytes for taker in self._takers)

    def _beat(self) -> None:
        self._told = tuple(taker.device_bytes for taker in self._takers)
        self._say(Progress(self._told))

    def _on_cancel(self) -> None:
        if self._place in (Destination.LOADING, Destination.READY):
            self._words.fail(CancelledError("cancelled", device=self._devices[0].name))
            for taker in self._takers:
                taker.drop()

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
            stream_bytes=0,
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

    def _end_threads(self) -> None:
        if hasattr(self, "_pulse"):
            self._pulse.stop()
        self._wake.cancel()
        self._ears.join()


def _median(band: Band | None) -> int:
    return band.median if band is not None else 0
