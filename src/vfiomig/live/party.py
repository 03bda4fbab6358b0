"""One end of a session, whichever: its threads, its words to the other end, and its roll-back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress

from vfiomig.device import Device
from vfiomig.errors import (
    CancelledError,
    DeviceLostError,
    LocalIOError,
    MigrationError,
)
from vfiomig.live.address import Address
from vfiomig.live.handover import Act
from vfiomig.live.journal import Journal
from vfiomig.live.link import Inbox, Outbox
from vfiomig.live.messages import Bye, Left, Message
from vfiomig.live.session import FAREWELL_NS, Ears, Pulse, Words, fail_of, state_text
from vfiomig.live.wire import FrameHeader
from vfiomig.recorder import Recorder
from vfiomig.report import MigrationProgress, MigrationReport, OnEvent
from vfiomig.worker import Cancellation, run_shielded


class Party(ABC):
    """One session's end. run() in the working thread; the rest where it says so.

    report: what it came to, once the devices run where they should; then nothing undoes it.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        address: Address,
        on_event: OnEvent | None,
        cancellation: Cancellation,
    ) -> None:
        self._devices, self._address, self._cancellation = devices, address, cancellation
        self._recorder = Recorder(", ".join(device.name for device in devices), on_event)
        self._words = Words(str(address), len(devices))
        self._ears = Ears(self._words)
        self._session = b""
        self._journal: Journal | None = None
        self._outbox: Outbox | None = None
        self._pulse: Pulse | None = None
        self.report: MigrationReport | None = None

    def run_in_thread(self) -> MigrationReport:
        """Run in a thread that no signal reaches; an exception in this one cancels, if it can."""
        try:
            return run_shielded(self._run, self._cancellation)
        except BaseException:
            # An exception in this thread that came too late to cancel: what is done is done.
            if self.report is not None:
                return self.report
            raise

    def _run(self) -> MigrationReport:
        with ExitStack() as stack:
            self._wake = stack.enter_context(closing(Cancellation()))
            self._last = stack.enter_context(closing(Cancellation()))
            for device in self._devices:
                stack.enter_context(device.observed(self._recorder.observe))
            try:
                self._prepare(stack)
            except MigrationError as err:
                self._tell_states(err)
                raise
            try:
                self.report = self._worked(stack)
                return self.report
            except BaseException as err:
                self._give_up(err)
                self._recorder.note_on(err)
                raise
            finally:
                self._last.cancel()
                if self._pulse is not None:
                    self._pulse.stop()
                self._wake.cancel()
                self._ears.join()

    def _worked(self, stack: ExitStack) -> MigrationReport:
        try:
            return self._work(stack)
        except CancelledError:
            self._check()  # who was woken does not know why
            raise

    @abstractmethod
    def _prepare(self, stack: ExitStack) -> None:
        """Do what has to succeed before there is a session."""

    @abstractmethod
    def _work(self, stack: ExitStack) -> MigrationReport:
        """Do everything, up to the hand-over. Whatever is raised is rolled back."""

    @property
    @abstractmethod
    def _phase(self) -> str:
        """What is being done."""

    # The hand-over.

    @abstractmethod
    def _do(self, act: Act) -> None:
        """Do what handover.py demands."""

    def _perform(self, acts: Sequence[Act], arrive: Callable[[], None]) -> None:
        """Do acts in order. The place changes, by arrive(), when the first of them is done."""
        for act in acts:
            self._do(act)
            arrive()

    def _record(self, event: str) -> None:
        """Record what must not be done unless it is recorded. Raises LocalIOError."""
        assert self._journal is not None
        self._journal.record(event)

    def _note(self, event: str) -> None:
        """Record what is true whether it can be recorded or not."""
        if self._journal is not None:
            try:
                self._journal.record(event)
            except LocalIOError as err:
                self._recorder.remark(f"{event} could not be recorded: {err}")

    # The end of one that failed.

    @property
    @abstractmethod
    def _is_over(self) -> bool:
        """Whether nothing can be undone any more."""

    @property
    @abstractmethod
    def _is_held(self) -> bool:
        """Whether the other end alone knows what comes next."""

    @abstractmethod
    def _roll_back(self) -> None:
        """Bring the devices to where they belong. Raises DeviceLostError."""

    @abstractmethod
    def _stop_copying(self) -> None:
        """Let what reads connections write nothing any more."""

    @abstractmethod
    def _handle_last(self, inbox: Inbox, header: FrameHeader) -> bool:
        """Heed what still comes, and drop the rest."""

    @abstractmethod
    def _say_left(self, states: tuple[str, ...]) -> None:
        """Say what the devices were left in."""

    @abstractmethod
    def _note_states(self, err: MigrationError, here: str, there: str) -> None:
        """Put what is known of both ends on an error."""

    def _give_up(self, err: BaseException) -> None:
        """Roll back, tell the peer, and say on err what both ends were left in."""
        if self._is_over:
            return
        if isinstance(err, MigrationError):
            err.phase = err.phase or self._phase  # the roll-back is another
        self._words.fail(err)
        if not self._is_held:
            self._say(fail_of(err, self._phase))
        self._restart_ears()
        try:
            self._roll_back()
        except DeviceLostError as lost:
            self._farewell(lost)
            raise lost from err
        self._farewell(err)
        if self._outbox is None and self._journal is not None:
            self._journal.remove()

    def _restart_ears(self) -> None:
        """Let nobody copy any more, and listen on for the peer's last words."""
        self._stop_copying()
        self._wake.cancel()
        inboxes = self._ears.join()  # a reset closes descriptors: not while they are written to
        self._words.listen_again()
        if self._words.lost is None:
            for inbox in inboxes:
                inbox.wake_on(self._last)
                self._ears.listen(inbox, self._handle_last)

    def _farewell(self, err: BaseException) -> None:
        states = tuple(state_text(device, self._recorder) for device in self._devices)
        if not self._is_held:
            self._say_left(states)
            if self._ears.are_open:
                self._words.wait(
                    lambda: self._words.said(Left) is not None, FAREWELL_NS, heed=False
                )
        if isinstance(err, MigrationError):
            self._tell_states(err)

    def _tell_states(self, err: MigrationError) -> None:
        """Say on err what both ends were left in."""
        states = [state_text(device, self._recorder) for device in self._devices]
        left = self._words.said(Left)
        # A refusal at the very beginning brings it along: nobody listened yet.
        there = ", ".join(left.states) if left is not None else err.destination_state
        self._note_states(err, ", ".join(states), there)
        err.actual, err.phase = self._devices[0].state_or_none(), err.phase or self._phase
        unknown = "what became of the other end is not known"
        if self._outbox is None:
            unknown = "the other end has had no part in it"
        err.aftermath = "; ".join((*states, f"there: {there}" if there else unknown))

    def _await(self, kind: type[Left | Bye]) -> None:
        """Wait for the peer's last words, for a while, whatever is wrong."""
        self._words.wait(lambda: self._words.said(kind) is not None, FAREWELL_NS, heed=False)

    # What is said, and noticed.

    def _check(self) -> None:
        """Raise what ends the session."""
        self._recorder.check()
        self._words.check()

    def _send(self, message: Message) -> None:
        """Say something. Raises PeerError, CancelledError."""
        assert self._outbox is not None
        self._outbox.say(message)

    def _say(self, message: Message) -> None:
        """Say it if there is somebody to hear it; that nobody is there shows elsewhere."""
        if self._outbox is not None:
            with suppress(MigrationError):  # over TLS it may be an AuthenticationError
                self._outbox.say(message)

    @abstractmethod
    def _progress(self) -> MigrationProgress:
        """Return where the session stands; in any thread."""

    def _tick(self) -> None:
        """Tell where the session stands, and notice a peer that has gone; in the pulse's thread."""
        lost = self._words.lost
        has_gone = lost is not None and not isinstance(lost, CancelledError)  # our own doing
        if has_gone or self._is_stuck():
            # Who waits for it to read must not wait for ever: of a peer that hangs, a socket tells
            # nothing.
            self._wake.cancel()
            self._last.cancel()
        self._recorder.observe(self._progress())
        try:
            self._recorder.check()
        except BaseException as err:  # noqa: BLE001  the caller's own: it ends the work
            self._words.fail(err)

    def _is_stuck(self) -> bool:
        """Whether this goes no further, and the peer does not even read that it does not."""
        if self._words.failure is None or self._outbox is None or self._is_held:
            return False
        return self._outbox.stuck_ns >= FAREWELL_NS

    def _cancel(self) -> None:
        self._words.fail(CancelledError("cancelled", device=self._devices[0].name))
