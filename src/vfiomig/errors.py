"""Every exception vfiomig raises on purpose, each with the exit code of the command."""

import errno as errnos
import os

from vfiomig.uapi import DeviceState


class MigrationError(Exception):
    """Base class; what a caller needs to decide stays on the exception.

    device: name of the device, or "". errno: the kernel's, or None. wanted: the state that was
    asked for. actual: the state the device was in when last looked at; None if nobody could.
    phase: what was being done. hint: what to do about it, a sentence or "". aftermath: what was
    done to the device afterwards, a sentence or "". code: the exit code of the command.
    source_state, destination_state: of a live migration, what is known of both sides, or "".
    """

    code: int = 1

    def __init__(
        self,
        message: str,
        *,
        device: str = "",
        errno: int | None = None,
        wanted: DeviceState | None = None,
        actual: DeviceState | None = None,
        phase: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.device, self.errno, self.wanted, self.actual = device, errno, wanted, actual
        self.phase, self.hint, self.aftermath = phase, hint, ""
        self.source_state = self.destination_state = ""

    def name_stream(self, name: str) -> None:
        """Put the name of the stream in front of the message."""
        self.args = (f"{name}: {self}",)


class UsageError(MigrationError):
    """The request itself makes no sense: an unknown option, name, size or state."""

    code = 2


class NotMigratableError(MigrationError):
    """The device has no migration (v2), or not the capability that was asked for."""

    code = 3


class IllegalArcError(MigrationError):
    """The state machine has no path for the request; the device was not asked."""

    code = 3


class AccessError(MigrationError):
    """The kernel refused access (EACCES, EPERM); hint says who has to be given what."""

    code = 4


class NoSuchDeviceError(MigrationError):
    """There is no such device, or the descriptor is not a VFIO device."""

    code = 5


class DeviceBusyError(MigrationError):
    """The device is in use, or is not in the state the work has to start from."""

    code = 5


class DeviceStateError(MigrationError):
    """A device refused a state change. actual: what it said afterwards, None if nothing.

    linux/vfio.h allows any state on the path, ERROR included: look before you retry or reset.
    """

    code = 6

    def __init__(
        self, device: str, wanted: DeviceState, actual: DeviceState | None, cause: OSError
    ) -> None:
        now = "its state is unknown" if actual is None else f"it is in {actual.name}"
        super().__init__(
            f"{device}: cannot enter {wanted.name}: {cause.strerror or cause}; {now}",
            device=device,
            errno=cause.errno,
            wanted=wanted,
            actual=actual,
        )
        if cause.errno in (errnos.EMFILE, errnos.ENFILE):
            # The device may have moved: only the descriptor was missing (vfio_main.c).
            self.code = ResourceLimitError.code


class DeviceIOError(MigrationError):
    """A device failed while its state was read or written, or a query of it failed."""

    code = 6


class OutOfSyncError(DeviceIOError):
    """The device was reset behind our back: its session is not the one we left (EBADF)."""


class StaleChannelError(MigrationError):
    """A data session was used after it had ended. No system call was made."""


class StreamError(MigrationError):
    """The stream is damaged: truncated, altered, or not what its framing demands.

    offset: the byte of the stream at which it was noticed.
    """

    code = 7

    def __init__(self, message: str, *, offset: int, device: str = "", hint: str = "") -> None:
        super().__init__(f"{message} (at byte {offset})", device=device, hint=hint)
        self.offset = offset


class StreamMismatchError(MigrationError):
    """The stream is no vfiomig stream, of a newer version, or of another device."""

    code = 8


class PeerError(MigrationError):
    """The other end of a socket failed or went away."""

    code = 9


class LocalIOError(MigrationError):
    """A file or pipe on this machine failed: no space, no right, I/O error, exists already."""

    code = 10


class TimeLimitError(MigrationError):
    """It would take longer, or has taken longer, than was allowed: the downtime limit, a wait."""

    code = 11


class IncompatibleError(MigrationError):
    """The destination's device does not fit the source's.

    fields: what differs, in order: (name, value at the source, value at the destination).
    """

    code = 12

    def __init__(
        self,
        message: str,
        *,
        fields: tuple[tuple[str, str, str], ...] = (),
        device: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message, device=device, hint=hint)
        self.fields = fields


class AuthenticationError(MigrationError):
    """The peer could not prove who it is, or is not allowed; or a key file is not private."""

    code = 13


class CancelledError(MigrationError):
    """The work was cancelled, and rolled back."""

    code = 14


class ResourceLimitError(MigrationError):
    """A limit was reached: descriptors, memory, or the largest state that was allowed."""

    code = 15


class DeviceLostError(MigrationError):
    """The last word: the device is not RUNNING and could not be reset. A person has to look."""

    code = 20


class OutcomeUnknownError(MigrationError):
    """The source has said GO and does not know what came of it: its devices stay stopped.

    session: what `vfiomig resolve` takes, 32 hex digits.
    """

    code = 21

    def __init__(self, message: str, *, session: str, hint: str = "") -> None:
        super().__init__(message, phase="hand-over", hint=hint)
        self.session = session


_BY_ERRNO: dict[int, type[MigrationError]] = {
    errnos.EACCES: AccessError,
    errnos.EPERM: AccessError,
    errnos.ENOENT: NoSuchDeviceError,
    errnos.ENODEV: NoSuchDeviceError,
    errnos.ENXIO: NoSuchDeviceError,
    errnos.EBUSY: DeviceBusyError,
    errnos.EMFILE: ResourceLimitError,
    errnos.ENFILE: ResourceLimitError,
    errnos.ENOMEM: ResourceLimitError,
}


def opening_failed(what: str, cause: OSError, hint: str = "") -> MigrationError:
    """Return the error for a device that could not be opened: its class follows errno."""
    kind = _BY_ERRNO.get(cause.errno or 0, DeviceIOError)
    reason = os.strerror(cause.errno) if cause.errno else str(cause)
    return kind(f"{what}: {reason}", device=what, errno=cause.errno, hint=hint)
