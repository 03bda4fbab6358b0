"""A device that is open: legal state changes only, one data session, and the recovery ladder."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, Self

from vfiomig import states
from vfiomig.channel import DataChannel
from vfiomig.errors import (
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceStateError,
    IllegalArcError,
    NotMigratableError,
    OutOfSyncError,
)
from vfiomig.identity import Identity
from vfiomig.uapi import Capability, DeviceState

if TYPE_CHECKING:
    from vfiomig.report import OnEvent

# VFIO_DEVICE_RESET on vfio-pci answers EAGAIN while the device's lock is busy (vfio_pci_core.c).
_RESET_ATTEMPTS, _RESET_PAUSE_S = 20, 0.05


class DeviceOps(Protocol):
    """What a device can be asked, as the kernel is: KernelOps and the simulator answer alike.

    Every method raises OSError with the errno of the kernel's contract, and nothing else.
    protocol: "v2", or "v1", then driven through a migration region of region_bytes (else 0).
    """

    protocol: str
    region_bytes: int

    def get_migration_flags(self) -> int:
        """VFIO_DEVICE_FEATURE_MIGRATION; ENOTTY when there is no migration."""
        ...

    def get_device_state(self) -> DeviceState:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET."""
        ...

    def set_device_state(self, state: DeviceState) -> DataChannel | None:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET; a channel when a session starts."""
        ...

    def get_data_size(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, in bytes."""
        ...

    def set_precopy_info_v2(self) -> bool:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2; False where there is none."""
        ...

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_START; the page size that the device chose."""
        ...

    def stop_dma_logging(self) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP; nothing once closed: closing has stopped it."""
        ...

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: sets the bits of pages that were written."""
        ...

    def reset_device(self) -> None:
        """VFIO_DEVICE_RESET."""
        ...

    def close(self) -> None:
        """Close the device; of a vfio-pci device the last close is a reset."""
        ...


class Device:
    """A migratable device. Owns its ops, and the one data session it may have.

    Not for several threads at once: one thread asks for state changes. Leave it by close() or with;
    close() changes no state. opened_as: what open_device() takes to open it again in another
    process, "" where nothing does. protocol: "v2", or "v1" (linux/vfio.h before 5.18), then with
    the size of its migration region in region_bytes.
    """

    def __init__(self, name: str, identity: Identity, ops: DeviceOps) -> None:
        """Take over ops. Raises NotMigratableError (then ops is closed)."""
        self.name, self.identity, self._ops = name, identity, ops
        self.protocol, self.region_bytes = ops.protocol, ops.region_bytes
        self.opened_as = ""
        self._channel: DataChannel | None = None
        self._on_change: Callable[..., None] | None = None
        try:
            self.capabilities = self._query_capabilities()
        except BaseException:
            ops.close()
            raise

    def _query_capabilities(self) -> Capability:
        try:
            flags = self._ops.get_migration_flags()
        except OSError as err:
            if err.errno != errno.ENOTTY:
                raise self._failed("cannot ask for its capabilities", err) from err
            raise NotMigratableError(
                f"{self.name}: the driver {self.identity.driver or 'in use'} has no migration",
                device=self.name,
                errno=err.errno,
                hint="bind it to a driver with migration; vfiomig info says which there are",
            ) from err
        if not flags & Capability.STOP_COPY:
            raise NotMigratableError(
                f"{self.name}: the driver does not offer STOP_COPY (flags {flags:#x})",
                device=self.name,
            )
        # linux/vfio.h: unknown bits are of a newer kernel, and no reason to refuse.
        return Capability(flags & (Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY))

    @property
    def ops(self) -> DeviceOps:
        """The bare device, still owned here: for who checks a driver, and owns what SET gives.

        A state change by it ends the session that start_session() gave, and nobody is told.
        """
        return self._ops

    def take_over(self, ops: DeviceOps) -> None:
        """Go on with ops, which opened the same device again after this one was closed."""
        self._ops = ops

    @contextmanager
    def observed(self, on_event: "OnEvent | None") -> Iterator[None]:
        """Send every state change to on_event for the length of a with block."""
        # Only who observes needs it; and no state change should have to wait for an import.
        from vfiomig.report import StateChange

        before = self._on_change
        if on_event is None:
            self._on_change = None
        else:
            self._on_change = lambda *change: on_event(StateChange(*change))
        try:
            yield
        finally:
            self._on_change = before

    def state(self) -> DeviceState:
        """Return the state the device says it is in. Blocks while a state change runs."""
        try:
            return self._ops.get_device_state()
        except OSError as err:
            raise self._failed("cannot read its state", err) from err

    def state_or_none(self) -> DeviceState | None:
        """Return the state, or None when the device does not even say that."""
        try:
            return self._ops.get_device_state()
        except OSError:
            return None  # the caller reports the state as unknown

    def check_in(self, *allowed: DeviceState) -> DeviceState:
        """Return the state. Raises DeviceBusyError when it is none of allowed."""
        state = self.state()
        if state not in allowed:
            raise DeviceBusyError(
                f"{self.name} is in {state.name} and not {allowed[0].name}: somebody is at work"
                " on it, or left it so",
                device=self.name,
                wanted=allowed[0],
                actual=state,
                hint="vfiomig state shows it; vfiomig reset makes it RUNNING, and loses its state",
            )
        return state

    def check_session(self, state: DeviceState, wanted: DeviceState) -> None:
        """Raise OutOfSyncError unless the device is still in state, on its way to wanted.

        A reset by somebody else leaves it RUNNING, from where wanted may be reached as well.
        """
        actual = self.state()
        if actual is not state:
            raise OutOfSyncError(
                f"{self.name}: out of sync: it is in {actual.name}, and was in {state.name};"
                " somebody else reset it",
                device=self.name,
                errno=errno.EBADF,
                wanted=wanted,
                actual=actual,
            )

    def stop_copy_length(self) -> int | None:
        """Return the device's estimate of its state in bytes, None where it gives none.

        A hint for progress and estimates; never a size to allocate or a bound of a loop.
        """
        try:
            return self._ops.get_data_size()
        except OSError:
            return None  # reported as "size unknown"; the copy does not need it

    def set_precopy_info_v2(self) -> bool:
        """Opt in to re-initialised initial_bytes; False where there is no such thing."""
        try:
            return self._ops.set_precopy_info_v2()
        except OSError as err:
            raise self._failed("cannot opt in to MIG_PRECOPY_INFOv2", err) from err

    def set_state(self, target: DeviceState) -> DataChannel | None:
        """Go to target, one arc at a time. Returns the channel when a session starts at target.

        The device owns the channel: it is closed, and dead, as soon as the session ends. Blocks as
        long as the driver does. Raises IllegalArcError before the device is asked anything,
        DeviceStateError when it refuses, OutOfSyncError when it is not where it was.
        """
        steps = self.path_to(target)
        channel = None
        for step in steps:
            channel = self._step(step)
        return channel

    def start_session(self, target: DeviceState) -> DataChannel:
        """Go to target, a state that holds a data session, as set_state(). Returns its channel."""
        channel = self.set_state(target)
        if channel is None:
            raise DeviceIOError(
                f"{self.name}: there is no data session in {target.name}", device=self.name
            )
        return channel

    def path_to(self, target: DeviceState) -> tuple[DeviceState, ...]:
        """Return the steps from the present state to target. Raises IllegalArcError if none are."""
        before = self.state()
        steps = states.path(self.capabilities, before, target, self.protocol)
        if steps is None:
            hint = "only a reset leaves ERROR" if before is DeviceState.ERROR else ""
            raise IllegalArcError(
                f"{self.name}: no way from {before.name} to {target.name}"
                f" with {self.capability_names}",
                device=self.name,
                wanted=target,
                actual=before,
                hint=hint,
            )
        return steps

    @property
    def committed_in(self) -> DeviceState:
        """The state whose step from RESUMING commits a load: STOP; by protocol v1, RUNNING."""
        return DeviceState.STOP if self.protocol == "v2" else DeviceState.RUNNING

    @property
    def capability_names(self) -> str:
        """The capabilities as a person reads them: "STOP_COPY, P2P, PRE_COPY"."""
        return ", ".join(self.capabilities.names)

    def _step(self, target: DeviceState) -> DataChannel | None:
        before = self.state()
        kept = not states.ends_session(before, target)
        started_ns = time.monotonic_ns()
        try:
            channel = self._ops.set_device_state(target)
        except OSError as err:
            actual = self.state_or_none()
            # A session that may have ended is not used again, whatever the device says.
            if not kept or actual is not before:
                self._end_session()
            self._tell(before, target, actual, err.errno, started_ns)
            raise DeviceStateError(self.name, target, actual, err) from err
        self._tell(before, target, target, None, started_ns)
        if not kept:
            self._end_session()
        if channel is not None and self._channel is not None:
            # The seed's EBADF: a second session means that a reset ended the first unseen.
            channel.close()
            self._end_session()
            raise OutOfSyncError(
                f"{self.name}: out of sync: a second data session while one was open;"
                " the device was reset by somebody else",
                device=self.name,
                errno=errno.EBADF,
                wanted=target,
                actual=self.state_or_none(),
            )
        if channel is None and states.starts_session(before, target):
            raise OutOfSyncError(
                f"{self.name}: entered {target.name} but gave no data_fd",
                device=self.name,
                errno=errno.EBADF,
                wanted=target,
                actual=self.state_or_none(),
            )
        if channel is not None:
            self._channel = channel
        return self._channel

    def reset(self) -> None:
        """Reset the device: its state is lost, it is RUNNING. Raises DeviceLostError."""
        self._end_session()
        before = self.state_or_none()
        started_ns = time.monotonic_ns()
        try:
            self._reset_until_not_busy()
        except OSError as err:
            actual = self.state_or_none()
            self._tell(before, DeviceState.RUNNING, actual, err.errno, started_ns, by="reset")
            raise self.lost("it cannot be reset", err) from err
        actual = self.state_or_none()
        self._tell(before, DeviceState.RUNNING, actual, None, started_ns, by="reset")
        if actual is not DeviceState.RUNNING:
            raise self.lost("a reset did not bring it back", None)

    def _reset_until_not_busy(self) -> None:
        for attempt in range(_RESET_ATTEMPTS):
            try:
                return self._ops.reset_device()
            except OSError as err:
                if err.errno != errno.EAGAIN or attempt == _RESET_ATTEMPTS - 1:
                    raise
            time.sleep(_RESET_PAUSE_S)

    def recover(self, wanted: DeviceState) -> DeviceState:
        """Bring the device to wanted after a failure, or reset it: the ladder of last resorts.

        Looks first, then acts on what is true. RESUMING is only left by a reset: RESUMING -> STOP
        is the commit. Returns the state reached: wanted, or RUNNING by a reset, which lost the
        device's own state. Raises DeviceLostError when even the reset fails.
        """
        actual = self.state_or_none()
        if actual not in states.SAVING:
            self._end_session()  # a reset that nobody here asked for leaves a dead one
        if actual not in (None, DeviceState.ERROR, DeviceState.RESUMING):
            try:
                self.set_state(wanted)
            except (DeviceStateError, DeviceIOError, IllegalArcError):
                pass  # told by the events; the next rung is the reset
            else:
                return wanted
        self.reset()
        return DeviceState.RUNNING

    def lost(self, what: str, cause: OSError | None) -> DeviceLostError:
        """Return the last word: what is left to a person."""
        actual = self.state_or_none()
        now = "its state cannot be read" if actual is None else f"it is in {actual.name}"
        reason = f" ({cause.strerror or cause})" if cause else ""
        return DeviceLostError(
            f"{self.name}: {what}{reason}; {now}",
            device=self.name,
            errno=cause.errno if cause else None,
            wanted=DeviceState.RUNNING,
            actual=actual,
            hint="stop its user, then reset it by hand (echo 1 > /sys/bus/pci/devices/BDF/reset)"
            " or unbind and bind its driver; nothing more was tried",
        )

    def close(self) -> None:
        """End the session and close the device. Of a vfio-pci device the last close is a reset."""
        self._end_session()
        self._ops.close()

    def _end_session(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _failed(self, what: str, err: OSError) -> DeviceIOError:
        return DeviceIOError(
            f"{self.name}: {what}: {err.strerror or err}", device=self.name, errno=err.errno
        )

    def _tell(
        self,
        before: DeviceState | None,
        wanted: DeviceState,
        actual: DeviceState | None,
        error: int | None,
        started_ns: int,
        by: str = "set",
    ) -> None:
        if self._on_change is not None:
            took_ns = time.monotonic_ns() - started_ns
            self._on_change(self.name, before, wanted, actual, error, started_ns, took_ns, by)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
