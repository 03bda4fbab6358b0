"""The state of a simulated device: its bytes, the staging a load writes to, and the commit.

In memory both are memfds. With a file, the state is FILE, the staging is FILE.resuming until a
rename makes it the state, so that the old state is whole until the commit.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from vfiomig.fd import OwnedFd
from vfiomig.simulator.content import begin, fill
from vfiomig.simulator.profiles import Profile
from vfiomig.simulator.url import Parameters

_BLOCK_BYTES = 1 << 20


class Storage(Protocol):
    """Where the files of a device are."""

    def create(self, part: str) -> int:
        """Return a new empty file, read and write, that the caller owns. Raises OSError."""
        ...

    def reopen(self, part: str) -> int | None:
        """Return such a file that an earlier process left, None if there is none."""
        ...

    def install(self, part: str) -> None:
        """Make that file the state. Raises OSError."""
        ...

    def discard(self, part: str) -> None:
        """Forget that file, if there is one."""
        ...


class MemoryStorage:
    """Files without a name: gone with the process."""

    def create(self, part: str) -> int:
        """Return a new memfd."""
        return os.memfd_create(f"vfiomig-sim-{part}", os.MFD_CLOEXEC)

    def reopen(self, part: str) -> int | None:
        """Return None: nothing outlives the process."""
        return None

    def install(self, part: str) -> None:
        """Do nothing: SimState holds the memfd."""

    def discard(self, part: str) -> None:
        """Do nothing: closing the memfd frees it."""


class FileStorage:
    """FILE, FILE.resuming and FILE.new. Whoever holds FILE.sim's lock owns them all."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self, part: str) -> int:
        """Return a new file beside FILE, empty."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._path_of(part), flags, 0o600)

    def reopen(self, part: str) -> int | None:
        """Return the file that an earlier process left beside FILE."""
        try:
            return os.open(self._path_of(part), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def install(self, part: str) -> None:
        """Rename it to FILE: what was there before is whole until this moment."""
        os.rename(self._path_of(part), self.path)

    def discard(self, part: str) -> None:
        """Remove it."""
        with suppress(FileNotFoundError):
            os.unlink(self._path_of(part))

    def _path_of(self, part: str) -> str:
        return f"{self.path}.{part}"


class SimState:
    """Owns the file of the state and that of the staging. Not for several threads at once."""

    def __init__(self, storage: Storage, state_fd: int) -> None:
        self._storage, self._state = storage, OwnedFd(state_fd)
        self._staging = OwnedFd(-1)

    @classmethod
    def fill_new(cls, storage: Storage, parameters: Parameters) -> "SimState":
        """Return a device's first state, filled from its seed. Raises OSError."""
        state = cls(storage, -1)
        state._build(lambda fd: fill(fd, parameters))
        return state

    @property
    def fd(self) -> int:
        """The file of the state, still owned here; another one after a commit or a reset."""
        return self._state.fileno()

    @property
    def size(self) -> int:
        """Bytes of the state."""
        return os.fstat(self.fd).st_size

    @property
    def staging_fd(self) -> int:
        """The file a load is written to, still owned here; -1 when there is none."""
        return self._staging.fileno()

    def stage(self) -> None:
        """Begin a load: an empty staging."""
        self.discard_staging()
        self._staging = OwnedFd(self._storage.create("resuming"))

    def reopen_staging(self) -> None:
        """Take up the staging of a process that died in RESUMING, or an empty one."""
        fd = self._storage.reopen("resuming")
        self._staging = OwnedFd(self._storage.create("resuming") if fd is None else fd)

    def commit_staging(self) -> None:
        """Make the staging the state."""
        self._storage.install("resuming")
        self._replace(self._staging)
        self._staging = OwnedFd(-1)

    def commit_built(self, build: Callable[[int], None]) -> None:
        """Make a new file the state, once build has filled it; drop the staging."""
        self._build(build)
        self.discard_staging()

    def discard_staging(self) -> None:
        """Drop a load that was not committed."""
        self._staging.close()
        self._storage.discard("resuming")

    def blank(self, profile: Profile, size_bytes: int) -> None:
        """Lose the state: what a reset leaves. Old descriptors of it then read nothing."""
        old_fd = os.dup(self.fd)
        with OwnedFd(old_fd):
            self._build(lambda fd: begin(fd, profile, size_bytes))
            os.ftruncate(old_fd, 0)

    def _build(self, build: Callable[[int], None]) -> None:
        with OwnedFd(self._storage.create("new")) as new:
            try:
                build(new.fileno())
                self._storage.install("new")
            except BaseException:
                self._storage.discard("new")
                raise
            self._replace(OwnedFd(new.detach()))

    def _replace(self, new: OwnedFd) -> None:
        old, self._state = self._state, new
        old.close()

    def digest(self) -> str:
        """Return the BLAKE2b-128 of the state."""
        from hashlib import blake2b  # OpenSSL comes with it, for what tests and demos ask alone

        digest = blake2b(digest_size=16)
        offset = 0
        while block := os.pread(self.fd, _BLOCK_BYTES, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()

    def read(self) -> bytes:
        """Return the whole state."""
        pieces = []
        offset = 0
        while piece := os.pread(self.fd, self.size - offset, offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the files. A staging on disk stays, as the device stays in RESUMING."""
        self._state.close()
        self._staging.close()


def reopened(fd: int, flags: int) -> int:
    """Return a descriptor of the same file with an offset of its own. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
