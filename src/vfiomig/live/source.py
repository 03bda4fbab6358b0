"""The source of a live migration: the devices run here, then they run there.

    report = send([device], "tcp:[::1]:4444")

Pre-copy rounds while they run, all stopped in the order of P2P, the rest copied, and the hand-over
of handover.py: whatever fails before GO is recorded, they run here again.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress

from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceLostError,
    LocalIOError,
    MigrationError,
    NotMigratableError,
    OutcomeUnknownError,
    PeerError,
    UsageError,
)
from vfiomig.live import handover, order
from vfiomig.live.address import Address, parse_address
from vfiomig.live.dialing import Dialer, Met
from vfiomig.live.forecast import Forecast, forecast_text, probe_link
from vfiomig.live.handover import Act, Source, SourceEvent
from vfiomig.live.journal import Journal, Role, journal_directory
from vfiomig.live.link import Inbox
from vfiomig.live.messages import (
    Begin,
    Bye,
    Done,
    Fail,
    Go,
    Left,
    Message,
    Progress,
    Ready,
    Resuming,
    Status,
    Stopping,
)
from vfiomig.live.mover import Mover
from vfiomig.live.options import MAX_DEVICES, SendOptions
from vfiomig.live.session import (
    FAREWELL_NS,
    Ears,
    Pulse,
    Words,
    fail_of,
    new_id,
    peer_failed,
    state_text,
    states_text,
)
from vfiomig.live.wire import FrameHeader, Kind
from vfiomig.options import PreCopyLimits
from vfiomig.rates import Rates
from vfiomig.recorder import Recorder
from vfiomig.report import (
    Connected,
    MigrationProgress,
    MigrationReport,
    MovedDevice,
    OnEvent,
    StoppingSoon,
)
from vfiomig.switchover import Decision
from vfiomig.threads import together
from vfiomig.uapi import Capability, DeviceState
from vfiomig.worker import Cancellation, run_shielded

# How long to wait where a round of pre-copy found nothing: a device is not asked in a spin.
_IDLE_NS = 100_000_000


def send(
    devices: Sequence[Device],
    url: str,
    options: SendOptions = SendOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
    cancellation: Cancellation | None = None,
) -> MigrationReport:
    """Migrate devices to the receiver at url. They are STOP here afterwards, and run there.

    url: tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N (a socket), or - (standard input and
    output). Blocks; may be called from any thread, several at once for different devices.
    on_event is called in threads of the session, one at a time, and must not block; what it raises
    cancels. So does an exception in the calling thread.
    Raises MigrationError. Unless its code is 20 (DeviceLostError) or 21 (OutcomeUnknownError: the
    devices are STOP, `vfiomig resolve`), the devices run here, and what was sent was reset there.
    """
    options.check()
    check_devices(devices, options)
    address = parse_address(url)
    with closing(Cancellation()) as own:
        stop = cancellation or own
        job = _Sending(devices, address, options, on_event, stop)
        try:
            return run_shielded(job.run, stop)
        except BaseException:
            # An exception in this thread that came too late to cancel: what is done is done.
            if job.report is not None:
                return job.report
            raise


def check_devices(devices: Sequence[Device], options: SendOptions) -> None:
    """Raise DeviceBusyError or NotMigratableError for what cannot be sent."""
    if not 0 < len(devices) <= MAX_DEVICES:
        raise UsageError(f"{len(devices)} devices: 1 to {MAX_DEVICES}")
    for device in devices:
        device.check_in(DeviceState.RUNNING)
        has_p2p = device.capabilities & Capability.P2P
        if len(devices) > 1 and not has_p2p and not options.without_p2p:
            raise NotMigratableError(
                f"{device.name} has no P2P: it cannot be stopped together with others without a"
                " moment in which one may still write to another",
                device=device.name,
                hint="send it by itself; or --without-p2p, if they do not talk to each other",
            )


class _Sending:
    """One session. Runs in the working thread."""

    def __init__(
        self,
        devices: Sequence[Device],
        address: Address,
        options: SendOptions,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        self._devices, self._address, self._options = devices, address, options
        self._cancellation = cancellation
        self._recorder = Recorder(", ".join(device.name for device in devices), on_event)
        self._session = new_id()
        self._words = Words(str(address), len(devices))
        self._ears = Ears(self._words)
        self._place = Source.BEFORE
        self._movers: list[Mover] = []
        self._met: Met | None = None
        self._pulse: Pulse | None = None
        self._forecast: Forecast | None = None
        self._phase, self._round, self._mark = "hello", 0, 0
        self._stopping_ns = self._going_ns = self._moved_ns = 0
        self._is_too_late = False
        self.report: MigrationReport | None = None

    def run(self) -> MigrationReport:
        with ExitStack() as stack:
            self._wake = stack.enter_context(closing(Cancellation()))
            self._last = stack.enter_context(closing(Cancellation()))
            for device in self._devices:
                stack.enter_context(device.observed(self._recorder.observe))
            directory = self._options.journal or journal_directory()
            self._rates = Rates(directory)
            names = [device.opened_as or device.name for device in self._devices]
            facts = {"devices": names, "address": str(self._address)}
            self._journal = stack.enter_context(
                closing(Journal.create(directory, self._session.hex(), Role.SOURCE, facts))
            )
            try:
                self._connect(stack)
                return self._migrate()
            except BaseException as err:
                self._give_up(err)
                self._recorder.note_on(err)
                raise
            finally:
                self._last.cancel()
                self._end_threads()

    def _connect(self, stack: ExitStack) -> None:
        dialer = Dialer(self._address, self._session, self._options, self._cancellation, self._last)
        met = self._met = dialer.meet(stack, self._devices)
        self._recorder.observe(Connected(met.name, met.peer))
        for index, device in enumerate(self._devices):
            mover = Mover(
                device,
                index,
                met.outboxes[index % len(met.outboxes)],
                self._options,
                self._wake,
                self._check,
                share=len(self._devices),
            )
            stack.callback(mover.close)
            self._movers.append(mover)
            self._doubt_size(device, met.hello.max_state_bytes)
        self._forecast = Forecast(self._movers, self._rates, met.hello, self._options)
        self._pulse = Pulse(
            self._cancellation,
            self._tick,
            self._beat,
            lambda: False,
            self._on_cancel,
            self._on_grace_over,
        )
        met.inbox.set_silence(self._options.silence_ns)
        met.inbox.wake_on(self._wake)
        self._ears.listen(met.inbox, self._handle)

    def _doubt_size(self, device: Device, most_bytes: int) -> None:
        length = device.stop_copy_length() or 0  # a hint, which a driver may get wrong
        if most_bytes and most_bytes < length < 1 << 63:
            self._recorder.warn(
                f"{device.name} says that its state has {length} bytes, and {self._address} takes"
                f" {most_bytes}: --max-state there allows more"
            )

    def _handle(self, inbox: Inbox, header: FrameHeader) -> bool:
        if header.kind is not Kind.MESSAGE:
            raise PeerError(f"{self._address} sent {header.kind.name} to a source")
        self._words.hear(inbox.message(header))
        return True

    # The way there.

    def _migrate(self) -> MigrationReport:
        self._send(Begin(self._options.lease_ns))
        self._words.wait_for(Resuming)
        with self._timed("pre-copy"):
            if copying := self._pre_copying():
                self._pre_copy(copying, self._options.pre_copy or PreCopyLimits())
            else:
                self._decide_at_once()
        with self._timed("stop-copy"):
            self._stop()
        with self._timed("hand-over"):
            done = self._hand_over()
        self.report = self._report(done)
        return self.report

    def _pre_copying(self) -> list[Mover]:
        if self._options.pre_copy is None:
            return []
        return [mover for mover in self._movers if mover.has_pre_copy]

    def _pre_copy(self, movers: Sequence[Mover], limits: PreCopyLimits) -> None:
        together([mover.start_pre_copy for mover in movers], self._words.fail)
        ends_ns = time.monotonic_ns() + limits.duration_ns
        while True:
            self._ask()
            left = limits.device_bytes - sum(mover.device_bytes for mover in movers)
            over = self._round >= limits.rounds or time.monotonic_ns() >= ends_ns or left <= 0
            if self._reckoning.decide(exhausted=over) is Decision.SWITCH:
                return
            self._round += 1
            self._copy_round(movers, left, ends_ns)

    def _ask(self) -> None:
        """Ask every device what is left, each in its own thread: it may take a device's time."""
        together([mover.ask for mover in self._movers], self._words.fail)

    def _copy_round(self, movers: Sequence[Mover], most_bytes: int, ends_ns: int) -> None:
        self._mark += 1
        started_ns, before = time.monotonic_ns(), self._sent_bytes()
        share = max(most_bytes // len(movers), 1)
        jobs = [mover.round_job(self._mark, share, ends_ns) for mover in movers]
        together(jobs, self._words.fail)
        self._await_marks(movers)
        moved = self._sent_bytes() - before
        self._reckoning.measured(moved, time.monotonic_ns() - started_ns)
        if not moved:
            self._words.wait(lambda: False, _IDLE_NS)
            self._check()

    def _await_marks(self, movers: Sequence[Mover]) -> None:
        indices = [mover.index for mover in movers]
        self._words.wait(lambda: all(self._words.marks[at] >= self._mark for at in indices))
        for mover in movers:
            mover.acknowledged()

    def _decide_at_once(self) -> None:
        """Without pre-copy: nothing but the link can be measured before the stop."""
        self._ask()
        mover, self._mark = self._movers[0], self._mark + 1
        sent, started_ns = probe_link(mover, sum(each.pending_bytes for each in self._movers))
        mover.mark(self._mark)
        self._await_marks([mover])
        self._reckoning.probed(sent, time.monotonic_ns() - started_ns)
        self._reckoning.decide(exhausted=True)

    @property
    def _reckoning(self) -> Forecast:
        assert self._forecast is not None
        return self._forecast

    def _stop(self) -> None:
        expected = self._reckoning.expected
        self._send(Stopping(expected.downtime_ns))
        self._recorder.observe(StoppingSoon(expected.downtime_ns, forecast_text(expected)))
        self._check()
        self._stopping_ns = time.monotonic_ns()
        if len(self._movers) > 1:
            together([mover.quiesce for mover in self._movers], self._words.fail)
        together([mover.stop_copy for mover in self._movers], self._words.fail)
        ready = self._words.wait_for(Ready)
        theirs = list(zip(ready.device_bytes, ready.digests, strict=False))
        ours = [(mover.device_bytes, mover.digest) for mover in self._movers]
        if theirs != ours:
            raise PeerError(f"{self._address} has not loaded what was sent: {theirs}, not {ours}")
        copying_ns = max(mover.stopped_ns for mover in self._movers)
        self._moved_ns = self._words.heard_ns(Ready) - copying_ns - ready.commit_ns
        self._reckoning.measured(self._stopped_bytes(), self._moved_ns)

    def _stopped_bytes(self) -> int:
        return sum(mover.device_bytes - mover.pre_copy_bytes for mover in self._movers)

    def _hand_over(self) -> Done:
        self._is_too_late = True
        self._check()  # the last moment to cancel
        self._act(SourceEvent.READY)
        self._words.wait(self._is_answered, heed=False)
        done = self._words.said(Done)
        if done is None:
            raise self._unanswered()
        self._act(SourceEvent.DONE)
        return done

    def _is_answered(self) -> bool:
        return self._words.said(Done) is not None or self._words.said(Left) is not None

    def _unanswered(self) -> MigrationError:
        if self._never_ran():
            fail = self._words.said(Fail)
            if fail is not None:
                return peer_failed(fail, str(self._address))
            return PeerError(f"{self._address} was told to run, and did not")
        session = self._session.hex()
        return OutcomeUnknownError(
            f"{self._address} was told to run, and has not said whether it does:"
            f" {self._words.lost}",
            session=session,
            hint=f"vfiomig resolve {session}, on that host first, then here with what it says",
        )

    def _never_ran(self) -> bool:
        left = self._words.said(Left)
        return left is not None and left.never_ran

    def _act(self, event: SourceEvent) -> None:
        """Do what handover.py's table says. The place changes when its first act is done."""
        place, acts = handover.at_source(self._place, event)
        for act in acts:
            self._do(act)
            self._place = place

    def _do(self, act: Act) -> None:
        match act:
            case Act.RECORD_GO:
                self._journal.record("go")
            case Act.SAY_GO:
                self._going_ns = time.monotonic_ns()
                self._say(Go())  # where it cannot be said, the wait for DONE finds out
            case Act.RECORD_RELEASED:
                self._note("released")
                self._release()
            case Act.RUN:
                order.bring_back(self._devices)
            case Act.RECORD_BACK:
                self._note("back")
            case Act.HOLD:
                with suppress(MigrationError):  # STOP_COPY is as good: it does not run
                    order.leave(self._devices, resetting=False)
            case _:
                raise AssertionError(act)

    def _note(self, event: str) -> None:
        """Record what is true whether it can be recorded or not."""
        try:
            self._journal.record(event)
        except LocalIOError as err:
            self._recorder.remark(f"{event} could not be recorded: {err}")

    def _release(self) -> None:
        try:
            order.leave(self._devices, resetting=self._options.reset_after)
        except MigrationError as err:
            # It runs there: whatever is wrong here, that is no failure of the migration.
            self._recorder.remark(f"it runs there, and could not be left in order: {err}")

    # The end of one that failed.

    def _give_up(self, err: BaseException) -> None:
        """Roll back, tell the peer, and say on err what both ends were left in."""
        if self._place in (Source.RELEASED, Source.BACK):
            return
        self._words.fail(err)
        if self._place is Source.BEFORE:
            self._say(fail_of(err, self._phase))
        self._restart_ears()
        try:
            self._act(SourceEvent.NEVER_RAN if self._never_ran() else SourceEvent.FAILED)
        except DeviceLostError as lost:
            self._farewell(lost)
            raise lost from err
        self._farewell(err)

    def _restart_ears(self) -> None:
        """Let nobody copy any more, and listen on for the peer's last words."""
        self._wake.cancel()
        self._ears.join()
        self._words.listen_again()
        if self._met is not None and self._words.lost is None:
            self._met.inbox.wake_on(self._last)
            self._ears.listen(self._met.inbox, self._handle)

    def _farewell(self, err: BaseException) -> None:
        states = tuple(state_text(device, self._recorder) for device in self._devices)
        if self._place is not Source.GOING:
            self._say(Left(never_ran=False, states=states))
            if self._ears.are_open:
                self._words.wait(
                    lambda: self._words.said(Left) is not None, FAREWELL_NS, heed=False
                )
        if isinstance(err, MigrationError):
            there = states_text(self._words.said(Left))
            err.source_state, err.destination_state = ", ".join(states), there
            err.actual, err.phase = self._devices[0].state_or_none(), err.phase or self._phase
            unknown = "what became of the other end is not known"
            if self._met is None:
                unknown = "nothing was sent"
            err.aftermath = "; ".join((*states, f"there: {there}" if there else unknown))

    def _end_threads(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        self._wake.cancel()
        self._ears.join()

    def _check(self) -> None:
        self._recorder.check()
        self._words.check()

    def _send(self, message: Message) -> None:
        assert self._met is not None
        self._met.outboxes[0].say(message)

    def _say(self, message: Message) -> None:
        """Say it if there is somebody to hear it; that nobody is there shows elsewhere."""
        if self._met is not None:
            with suppress(PeerError, CancelledError):
                self._send(message)

    def _sent_bytes(self) -> int:
        return sum(mover.device_bytes for mover in self._movers)

    # The pulse, in threads of its own.

    def _tick(self) -> None:
        progress, forecast = self._words.said(Progress), self._reckoning
        event = MigrationProgress(
            phase=self._phase,
            round=self._round,
            device_bytes=sum(progress.loaded_bytes) if progress else 0,
            pending_bytes=forecast.pending_bytes,
            bytes_per_s=forecast.bytes_per_s,
            expected_downtime_ns=forecast.expected.downtime_ns,
            elapsed_ns=self._recorder.duration_ns,
        )
        self._recorder.observe(event)
        try:
            self._recorder.check()
        except BaseException as err:  # noqa: BLE001  the caller's own: it ends the work
            self._words.fail(err)

    def _beat(self) -> None:
        forecast = self._reckoning
        expected_ns = forecast.expected.downtime_ns
        self._say(Status(self._phase, self._round, forecast.pending_bytes, expected_ns))

    def _on_cancel(self) -> None:
        if not self._is_too_late:
            self._words.fail(CancelledError("cancelled", device=self._devices[0].name))

    def _on_grace_over(self) -> None:
        if not self._is_too_late:
            self._wake.cancel()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._phase = phase
        with self._recorder.phase(phase, self._sent_bytes):
            yield

    # The end of one that succeeded.

    def _report(self, done: Done) -> MigrationReport:
        source_ns = self._words.heard_ns(Done) - self._stopping_ns
        least_ns = self._going_ns + done.ran_after_ns - self._stopping_ns
        downtime_ns, error_ns = (least_ns + source_ns) // 2, max((source_ns - least_ns) // 2, 0)
        rates = self._keep_rates(downtime_ns, done)
        self._say(Bye(downtime_ns, error_ns, source_ns, rates))
        limit_ns = self._options.downtime_limit_ns
        if downtime_ns > limit_ns:
            self._recorder.remark("the downtime was longer than allowed")
        assert self._met is not None
        return MigrationReport(
            role="source",
            session=self._session.hex(),
            peer=self._met.name,
            devices=tuple(self._moved(mover) for mover in self._movers),
            stream_bytes=sum(mover.stream_bytes for mover in self._movers),
            rounds=self._round,
            duration_ns=self._recorder.duration_ns,
            downtime_ns=downtime_ns,
            downtime_error_ns=error_ns,
            source_downtime_ns=source_ns,
            destination_downtime_ns=done.stopped_ns,
            expected_downtime_ns=self._reckoning.expected.downtime_ns,
            downtime_limit_ns=limit_ns,
            bytes_per_s=self._reckoning.overall_bytes_per_s,
            phases=tuple(self._recorder.phases),
            state_changes=tuple(self._recorder.state_changes),
            warnings=tuple(self._recorder.warnings),
        )

    def _keep_rates(self, downtime_ns: int, done: Done) -> tuple[int, ...]:
        """Keep what this stop told of the devices, for the next estimate."""
        fixed_ns = max(downtime_ns - self._moved_ns - done.fixed_ns, 0)
        rates = []
        for mover in self._movers:
            moved = mover.device_bytes - mover.pre_copy_bytes
            rates.append(moved * 10**9 // max(self._moved_ns, 1))
            self._rates.add(
                "source",
                mover.device.identity,
                bytes_per_s=rates[-1],
                fixed_ns=fixed_ns,
                moved_bytes=moved,
            )
        return tuple(rates)

    def _moved(self, mover: Mover) -> MovedDevice:
        return MovedDevice(
            name=mover.device.name,
            device_bytes=mover.device_bytes,
            pre_copy_bytes=mover.pre_copy_bytes,
            zero_bytes=mover.zero_bytes,
            digest=mover.digest,
            state=mover.device.state(),
        )
