"""FILE.sim: what a simulated device with a file is and which state it is in, and the lock on it."""

import fcntl
import json
import os
from collections.abc import Mapping

from vfiomig.errors import DeviceBusyError, LocalIOError, opening_failed
from vfiomig.fd import OwnedFd
from vfiomig.uapi import DeviceState

_FORMAT = 1
# It is a few hundred bytes of our own.
_LARGEST_BYTES = 64 << 10


class Sidecar:
    """Owns the open and locked FILE.sim. Whoever has it has the device.

    The file is replaced as a whole; the new one is locked before it gets the name, so there is no
    moment in which somebody else could have it.
    """

    def __init__(self, name: str, path: str) -> None:
        """Lock it; create it when there is none. Raises DeviceBusyError, or what opening raises."""
        self.path = f"{path}.sim"
        self._name = name
        try:
            self._fd = self._lock()
        except BlockingIOError:
            raise DeviceBusyError(f"{name}: in use by another process", device=name) from None
        except OSError as err:
            raise opening_failed(name, err) from err

    def _lock(self) -> OwnedFd:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            found = OwnedFd(os.open(self.path, flags, 0o600))
            try:
                fcntl.flock(found.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_named(found.fileno()):
                    return found
            except BaseException:
                found.close()
                raise
            found.close()  # it was replaced between open and lock

    def _is_named(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def read(self) -> tuple[Mapping[str, str], DeviceState] | None:
        """Return the parameters and the device state; None when the file is new."""
        text = os.pread(self._fd.fileno(), _LARGEST_BYTES, 0)
        if not text:
            return None
        try:
            found = json.loads(text)
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']} is not known")
            parameters = {str(key): str(value) for key, value in found["parameters"].items()}
            return parameters, DeviceState[found["state"]]
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise LocalIOError(
                f"{self._name}: {self.path} does not describe a simulated device: {err}",
                device=self._name,
                hint="remove that file to make FILE a new device with the state it has",
            ) from err

    def write(self, parameters: Mapping[str, str], state: DeviceState) -> None:
        """Replace it. Raises OSError."""
        found = {"format": _FORMAT, "state": state.name, "parameters": dict(parameters)}
        temporary = f"{self.path}.new"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with OwnedFd(os.open(temporary, flags, 0o600)) as new:
            fcntl.flock(new.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(new.fileno(), json.dumps(found, indent=1).encode() + b"\n")
            os.rename(temporary, self.path)
            old, self._fd = self._fd, OwnedFd(new.detach())
        old.close()

    def remove_if_new(self) -> None:
        """Remove it again when nothing was ever written: the device could not be made."""
        if os.fstat(self._fd.fileno()).st_size == 0:
            os.unlink(self.path)

    def close(self) -> None:
        """Give up the device. Its files stay."""
        self._fd.close()
