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
    MigrationError,
    NotMigratableError,
    OutcomeUnknownError,
    PeerError,
    UsageError,
)
from vfiomig.live import handover, order
from vfiomig.live.address import Address, parse_address
from vfiomig.live.dialing import Dialer
from vfiomig.live.forecast import Forecast, forecast_text
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
    Progress,
    Ready,
    Resuming,
    Status,
    Stopping,
)
from vfiomig.live.mover import Mover
from vfiomig.live.options import MAX_DEVICES, SendOptions, check_protocol
from vfiomig.live.party import Party
from vfiomig.live.rounds import Rounds
from vfiomig.live.session import (
    Pulse,
    new_id,
    peer_failed,
)
from vfiomig.live.wire import CONTROL, FrameHeader, Kind
from vfiomig.rates import Rates
from vfiomig.report import (
    Connected,
    MigrationProgress,
    MigrationReport,
    MovedDevice,
    OnEvent,
    StoppingSoon,
)
from vfiomig.threads import together
from vfiomig.uapi import Capability, DeviceState
from vfiomig.worker import Cancellation


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
        return _Sending(devices, address, options, on_event, stop).run_in_thread()


def check_devices(devices: Sequence[Device], options: SendOptions) -> None:
    """Raise DeviceBusyError or NotMigratableError for what cannot be sent."""
    if not 0 < len(devices) <= MAX_DEVICES:
        raise UsageError(f"{len(devices)} devices: 1 to {MAX_DEVICES}")
    for device in devices:
        device.check_in(DeviceState.RUNNING)
        check_protocol(device)
        has_p2p = device.capabilities & Capability.P2P
        if len(devices) > 1 and not has_p2p and not options.without_p2p:
            raise NotMigratableError(
                f"{device.name} has no P2P: it cannot be stopped together with others without a"
                " moment in which one may still write to another",
                device=device.name,
                hint="send it by itself; or --without-p2p, if they do not talk to each other",
            )


class _Sending(Party):
    """The source's end."""

    def __init__(
        self,
        devices: Sequence[Device],
        address: Address,
        options: SendOptions,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        super().__init__(devices, address, on_event, cancellation)
        self._options = options
        self._place = Source.BEFORE
        self._movers: list[Mover] = []
        self._now = "hello"
        self._stopping_ns = self._going_ns = self._moved_ns = 0
        self._is_too_late = False

    def _prepare(self, stack: ExitStack) -> None:
        directory = self._options.journal or journal_directory()
        self._rates, self._session = Rates(directory), new_id()
        names = [device.opened_as or device.name for device in self._devices]
        facts = {"devices": names, "address": str(self._address)}
        self._journal = stack.enter_context(
            closing(Journal.create(directory, self._session.hex(), Role.SOURCE, facts))
        )

    @property
    def _phase(self) -> str:
        return self._now

    def _work(self, stack: ExitStack) -> MigrationReport:
        self._connect(stack)
        self._send(Begin(self._options.lease_ns))
        self._words.wait_for(Resuming)
        with self._timed("pre-copy"):
            self._rounds.run(self._options.pre_copy)
        with self._timed("stop-copy"):
            self._stop()
        with self._timed("hand-over"):
            done = self._hand_over()
        return self._report(done)

    def _connect(self, stack: ExitStack) -> None:
        dialer = Dialer(self._address, self._session, self._options, self._cancellation, self._last)
        met = dialer.meet(stack, self._devices)
        self._name, self._outbox = met.name, met.outboxes[0]
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
        forecast = Forecast(self._movers, self._rates, met.hello, self._options)
        self._rounds = Rounds(self._movers, self._words, forecast, self._check)
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
        if header.kind is not Kind.MESSAGE or header.stream != CONTROL:
            what = f"{header.kind.name} of stream {header.stream}"
            raise PeerError(f"{self._address} sent {what} to a source")
        self._words.hear(inbox.message(header))
        return True

    # The way there.

    def _stop(self) -> None:
        if self._words.said(Ready) is not None:
            raise PeerError(f"{self._address} says READY before it has everything")
        expected = self._rounds.forecast.expected
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
        self._rounds.forecast.measured(self._stopped_bytes(), self._moved_ns)

    def _stopped_bytes(self) -> int:
        return sum(mover.device_bytes - mover.pre_copy_bytes for mover in self._movers)

    def _hand_over(self) -> Done:
        self._is_too_late = True
        self._check()  # the last moment to cancel
        if self._words.said(Done) is not None:
            raise PeerError(f"{self._address} says DONE, and was not told to run")
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
        place, acts = handover.at_source(self._place, event)

        def arrive() -> None:
            self._place = place

        self._perform(acts, arrive)

    def _do(self, act: Act) -> None:
        match act:
            case Act.RECORD_GO:
                self._record("go")
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

    def _release(self) -> None:
        try:
            order.leave(self._devices, resetting=self._options.reset_after)
        except MigrationError as err:
            # It runs there: whatever is wrong here, that is no failure of the migration.
            self._recorder.remark(f"it runs there, and could not be left in order: {err}")

    # The end of one that failed.

    @property
    def _is_over(self) -> bool:
        return self._place in (Source.RELEASED, Source.BACK)

    @property
    def _is_held(self) -> bool:
        return self._place is Source.GOING

    def _roll_back(self) -> None:
        self._act(SourceEvent.NEVER_RAN if self._never_ran() else SourceEvent.FAILED)

    def _stop_copying(self) -> None:
        """Do nothing: what copies has ended, together()."""

    def _handle_last(self, inbox: Inbox, header: FrameHeader) -> bool:
        return self._handle(inbox, header)

    def _say_left(self, states: tuple[str, ...]) -> None:
        self._say(Left(never_ran=False, states=states))

    def _note_states(self, err: MigrationError, here: str, there: str) -> None:
        err.source_state, err.destination_state = here, there

    def _sent_bytes(self) -> int:
        return sum(mover.device_bytes for mover in self._movers)

    # The pulse, in threads of its own.

    def _progress(self) -> MigrationProgress:
        progress, forecast = self._words.said(Progress), self._rounds.forecast
        return MigrationProgress(
            phase=self._phase,
            round=self._rounds.count,
            device_bytes=sum(progress.loaded_bytes) if progress else 0,
            pending_bytes=forecast.pending_bytes,
            bytes_per_s=forecast.bytes_per_s,
            expected_downtime_ns=forecast.expected.downtime_ns,
            elapsed_ns=self._recorder.duration_ns,
        )

    def _beat(self) -> None:
        forecast = self._rounds.forecast
        expected_ns = forecast.expected.downtime_ns
        self._say(Status(self._phase, self._rounds.count, forecast.pending_bytes, expected_ns))

    def _on_cancel(self) -> None:
        if not self._is_too_late:
            self._cancel()

    def _on_grace_over(self) -> None:
        if not self._is_too_late:
            self._wake.cancel()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._now = phase
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
        return MigrationReport(
            role="source",
            session=self._session.hex(),
            peer=self._name,
            devices=tuple(self._moved(mover) for mover in self._movers),
            stream_bytes=sum(mover.stream_bytes for mover in self._movers),
            rounds=self._rounds.count,
            duration_ns=self._recorder.duration_ns,
            downtime_ns=downtime_ns,
            downtime_error_ns=error_ns,
            source_downtime_ns=source_ns,
            destination_downtime_ns=done.stopped_ns,
            expected_downtime_ns=self._rounds.forecast.expected.downtime_ns,
            downtime_limit_ns=limit_ns,
            bytes_per_s=self._rounds.forecast.overall_bytes_per_s,
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
