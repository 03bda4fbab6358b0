"""The device that is checked: what a rule may do with it, and what it says of it."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

from vfiomig import states
from vfiomig.conform import raw
from vfiomig.conform.findings import Findings, errno_name
from vfiomig.conform.result import Stopwatch
from vfiomig.conform.streams import KeptState, Session, send
from vfiomig.device import Device, DeviceOps
from vfiomig.errors import DeviceLostError, MigrationError
from vfiomig.report import Event, StateChange
from vfiomig.uapi import DeviceState as S
from vfiomig.uapi import Feature

PAGE_BYTES = 4096  # the smallest page of DMA logging (vfio_main.c)
# VFIO_DEVICE_RESET on vfio-pci answers EAGAIN while the device's lock is busy (vfio_pci_core.c).
_RESET_ATTEMPTS, _RESET_PAUSE_S = 20, 0.05


class Subject(Findings):
    """The device that is checked. Owns the sessions and the kept state; not the device.

    Every method that asks the device something raises OSError as the kernel gave it: where a rule
    does not expect it, the rule has failed. One thread at a time.
    """

    def __init__(
        self, device: Device, check: Callable[[], None], *, max_state_bytes: int, destructive: bool
    ) -> None:
        """check: called between requests; raises CancelledError."""
        self.device, self.check, self.max_state_bytes = device, check, max_state_bytes
        self.destructive = destructive
        self.capabilities = device.capabilities
        super().__init__()
        self.stopwatch = Stopwatch()
        self.session: Session | None = None
        self._given: list[Session] = []
        self._kept: KeptState | None = None

    # What a rule does.

    @property
    def ops(self) -> DeviceOps:
        """The bare device; another one after it was opened again."""
        return self.device.ops

    @property
    def device_fd(self) -> int:
        """The device_fd, of a device of the kernel; else -1."""
        from vfiomig.backends.kernel import KernelOps

        ops = self.device.ops
        return ops.fileno() if isinstance(ops, KernelOps) else -1

    def state(self) -> S:
        """Ask for the state."""
        self.log.begin("GET of the state")
        return self.ops.get_device_state()

    def states(self) -> list[S]:
        """Return the states of this device from which it comes back without a load."""
        of_arcs = {state for arc in states.arcs(self.capabilities) for state in arc}
        return sorted(of_arcs - {S.RESUMING})

    def saving_states(self) -> list[S]:
        """Return the states of this device that hold a data_fd to read from."""
        return [state for state in self.states() if state in states.SAVING]

    @cached_property
    def has_dma_logging(self) -> bool:
        """Whether the device tracks what it writes: PROBE, or a START of nothing, does nothing."""
        if self.device_fd != -1:
            return raw.has_feature(self.device_fd, Feature.DMA_LOGGING_START)
        try:
            self.ops.start_dma_logging(PAGE_BYTES, [])
        except OSError as err:
            return err.errno != errno.ENOTTY
        return True

    def set(self, target: S) -> Session | None:
        """SET the state, by one request. Returns the session that it gave."""
        self.check()
        before = self.state()
        self.log.begin(f"SET {target.name} in {before.name}")
        started_ns = time.monotonic_ns()
        channel = self.ops.set_device_state(target)
        took_ns = time.monotonic_ns() - started_ns
        self.log.done(f"{before.name} -> {target.name}")
        if steps := states.path(self.capabilities, before, target):
            self.stopwatch.add(before, steps, took_ns)
        if channel is None:
            if target not in states.SAVING and target is not S.RESUMING:
                self.session = None
            return None
        self.session = Session(channel, self.log, self.check)
        self._given.append(self.session)
        return self.session

    def set_error(self, target: S) -> int:
        """SET the state. Returns the errno, 0 when it was taken."""
        try:
            self.set(target)
        except OSError as err:
            self.log.done(f"SET {target.name}: {errno_name(err.errno or 0)}")
            return err.errno or errno.EIO
        return 0

    def start(self, target: S) -> Session:
        """Go to a state that holds a session; see go(). Raises OSError when none was given."""
        session = self.go(target)
        if session is None:
            raise OSError(errno.EBADF, f"{target.name} was entered without a data_fd")
        return session

    def go(self, target: S) -> Session | None:
        """SET the state, after doing what leaving the present one asks for."""
        self.finish_session()
        return self.set(target)

    def finish_session(self) -> None:
        """Read a save to its end, load the device's own state: then the state can be left.

        xe answers EIO when STOP_COPY is left before that; RESUMING -> STOP commits what was loaded.
        """
        session = self.session
        if session is None or session.at_end:
            return
        state = self.state()
        if state is S.STOP_COPY:
            tally = session.read_all(self.max_state_bytes)
            if tally.error:
                raise OSError(tally.error, os.strerror(tally.error))
        elif state is S.RESUMING and not session.written_bytes:
            send(session, self.own_state().pieces())
        session.at_end = state in (S.STOP_COPY, S.RESUMING)

    def home(self) -> None:
        """Go back to RUNNING, as go() does; from a load that a rule has begun, by a reset."""
        state, session = self.state(), self.session
        begun = session is None or session.at_end or session.written_bytes
        if state is S.RESUMING and begun:
            self.reset()
        elif state is not S.RUNNING:
            self.go(S.RUNNING)

    def own_state(self) -> KeptState:
        """Return the device's state as it was when first asked for; then it must be RUNNING."""
        if self._kept is None:
            kept = KeptState()
            try:
                self.save(kept)
            except BaseException:
                kept.close()
                raise
            self._kept = kept
        return self._kept

    def save(self, into: KeptState) -> None:
        """Save the state, which must not be one with a session; leaves the device as it was."""
        before = self.state()
        session = self.start(S.STOP_COPY)
        into.fill(session, self.max_state_bytes)
        session.at_end = True
        self.set(S.STOP if before is S.STOP else S.RUNNING)

    def digest(self) -> tuple[int, int]:
        """Save the state into nothing, in STOP. Returns its bytes and XXH3-64; leaves STOP."""
        session = self.start(S.STOP_COPY)
        tally = session.read_all(self.max_state_bytes)
        if tally.error:
            raise OSError(tally.error, os.strerror(tally.error))
        session.at_end = True
        self.set(S.STOP)
        return tally.size_bytes, tally.digest

    def load(self, pieces: Iterator[bytes]) -> Session:
        """Enter RESUMING and write pieces. Returns the session; nothing is committed yet."""
        session = self.start(S.RESUMING)
        session.at_end = True  # what is written is the rule's business
        send(session, pieces)
        return session

    def reset(self) -> None:
        """VFIO_DEVICE_RESET, timed; waits while the device's lock is busy."""
        before = self.ops.get_device_state()
        self.log.begin(f"VFIO_DEVICE_RESET in {before.name}")
        self.session = None
        for attempt in range(_RESET_ATTEMPTS):
            started_ns = time.monotonic_ns()
            try:
                self.ops.reset_device()
                break
            except OSError as err:
                if err.errno != errno.EAGAIN or attempt == _RESET_ATTEMPTS - 1:
                    raise
            time.sleep(_RESET_PAUSE_S)
        self.stopwatch.add(before, (S.RUNNING,), time.monotonic_ns() - started_ns, by="reset")
        self.log.done(f"reset in {before.name}")

    def put_back(self) -> None:
        """Reset the device, and load the state it had before: rules that follow find that."""
        self.reset()
        if self._kept is not None:
            self.load(self._kept.pieces())
            self.set(S.RUNNING)

    @contextmanager
    def put_back_afterwards(self) -> Iterator[KeptState]:
        """Give the device's own state to a with block, and load it again behind it."""
        kept = self.own_state()
        try:
            yield kept
        finally:
            self.put_back()

    # What the runner does.

    def end_sessions(self) -> None:
        """Close every data_fd that a rule was given."""
        for session in self._given:
            session.close()
        self._given, self.session = [], None

    def settle(self) -> str:
        """Bring the device to RUNNING after a rule. Returns how, "" when it was there.

        First by the way that loses nothing, then by the ladder of Device.recover().
        Raises DeviceLostError.
        """
        before = self.device.state_or_none()
        if before is S.RUNNING:
            return ""
        left = f"it was left in {before.name}" if before is not None else "its state was unreadable"
        if before not in (None, S.ERROR, S.RESUMING):
            try:
                self.home()
            except (OSError, MigrationError):
                pass  # the ladder is next, which cancel must not stop either
            else:
                return f"{left}, and was set to RUNNING"
        events: list[Event] = []
        with self.device.observed(events.append):
            self.device.recover(S.RUNNING)
        was_reset = any(isinstance(event, StateChange) and event.by == "reset" for event in events)
        return f"{left}, and was {'reset: it lost its state' if was_reset else 'set to RUNNING'}"

    def reopen(self, open_again: Callable[[], Device]) -> None:
        """Put what open_again opens in the place of the device, which was closed.

        Raises DeviceLostError: it cannot be opened.
        """
        try:
            fresh = open_again()
        except MigrationError as err:
            raise DeviceLostError(
                f"{self.device.name}: it cannot be opened again: {err}",
                device=self.device.name,
                errno=err.errno,
                hint=err.hint,
            ) from err
        # The caller's Device goes on: it was closed for a moment only.
        self.device.take_over(fresh.ops)

    def close(self) -> None:
        """Close what is owned; the device stays open."""
        self.end_sessions()
        if self._kept is not None:
            self._kept.close()
            self._kept = None
