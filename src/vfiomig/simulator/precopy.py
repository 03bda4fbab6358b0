"""What a simulated device gives to read in PRE_COPY, and what is left for STOP_COPY."""

import time
from collections.abc import Sequence

from vfiomig.channel import PrecopyInfo
from vfiomig.simulator.content import Dirtier
from vfiomig.simulator.feeder import PipedSave
from vfiomig.simulator.profiles import Precopy
from vfiomig.simulator.updates import RECORD, Segment, UpdateLog
from vfiomig.simulator.url import Parameters
from vfiomig.uapi import DeviceState as S

# drivers/vfio/pci/virtio/migrate.c asks the device at most once a second.
_COPY_EVERY_NS = 10**9


class PrecopySource:
    """The data of one save session that began in PRE_COPY. Not for several threads at once.

    The device changes its state only while it runs; how much is worked out when somebody looks.
    """

    def __init__(
        self, parameters: Parameters, state_fd: int, size_bytes: int, session: PipedSave
    ) -> None:
        """Borrow the state and the session."""
        self._parameters, self._fd, self._size_bytes = parameters, state_fd, size_bytes
        self._session, self._form = session, parameters.profile.precopy
        header_bytes = parameters.profile.header_bytes
        self._header_bytes = min(header_bytes, size_bytes)
        self._log = UpdateLog()
        self._dirtier = Dirtier(state_fd, header_bytes, size_bytes, parameters.seed + 1)
        self._running_since_ns: int | None = None
        self._copied_ns = time.monotonic_ns()
        self._initial_end = 0
        self._is_last_appended = False

    def start(self) -> None:
        """Append what is to be read first."""
        first, initial = self._first(), self._parameters.initial
        self._initial_end = _length(first) if initial is None else initial
        self._session.append(first, self._parameters.drained_errno)

    def advance(self, before: S, target: S) -> None:
        """Follow the device from before to target: it changes its state in PRE_COPY alone."""
        if before is S.PRE_COPY:
            self._change()
            self._running_since_ns = None
        if target is S.PRE_COPY:
            self._running_since_ns = time.monotonic_ns()
        elif target is S.STOP_COPY:
            self._session.append(self._last(), None)
            self._is_last_appended = True

    def info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO: the call that makes new data, once the old has been read."""
        self._change()
        is_running = self._running_since_ns is not None
        if is_running and not self._session.unread_bytes():
            self._session.append(self._more(), self._parameters.drained_errno)
        unread = self._session.unread_bytes()
        initial = min(max(self._initial_end - self._session.read_bytes(), 0), unread)
        dirty = self._dirtier.dirty_bytes if is_running and self._form is Precopy.DIRTY else 0
        return PrecopyInfo(initial, unread - initial + dirty)

    def remaining_bytes(self) -> int:
        """Return what STOP_COPY would still give if it were entered now: MIG_DATA_SIZE."""
        self._change()
        last_bytes = 0 if self._is_last_appended else self._last_bytes()
        return self._session.unread_bytes() + last_bytes

    def start_over(self) -> PrecopyInfo:
        """Append the whole state once more, as initial data: VFIO_PRECOPY_INFO_REINIT.

        A stream of fixed form cannot begin again, and goes on.
        """
        if self._form is Precopy.HEADER:
            return self.info()
        self._session.append(self._whole(), self._parameters.drained_errno)
        unread = self._session.unread_bytes()
        self._initial_end = self._session.read_bytes() + unread
        return PrecopyInfo(unread, 0, reinit=True)

    def close(self) -> None:
        """Free what the session was fed from: it must have ended."""
        self._log.close()

    def _first(self) -> list[Segment]:
        if self._form is Precopy.HEADER:
            return [Segment(self._fd, 0, self._header_bytes)]
        return self._log.begin(self._size_bytes) + self._whole()

    def _more(self) -> list[Segment]:
        if self._form is Precopy.HEADER:
            return []
        if self._form is Precopy.DIRTY:
            return self._dirty()
        now_ns = time.monotonic_ns()
        if now_ns - self._copied_ns < _COPY_EVERY_NS:
            return []
        self._copied_ns = now_ns
        return self._whole()

    def _last(self) -> list[Segment]:
        if self._form is Precopy.HEADER:
            rest = self._size_bytes - self._header_bytes
            return [Segment(self._fd, self._header_bytes, rest)]
        changed = self._dirty() if self._form is Precopy.DIRTY else self._whole()
        return changed + self._log.end()

    def _last_bytes(self) -> int:
        """Return how long _last() would be."""
        if self._form is Precopy.HEADER:
            return self._size_bytes - self._header_bytes
        if self._form is Precopy.COPIES:
            return RECORD.size + self._size_bytes + RECORD.size
        records = len(self._dirtier.ranges()) + 1
        return records * RECORD.size + self._dirtier.dirty_bytes

    def _whole(self) -> list[Segment]:
        return self._log.data(self._fd, 0, self._size_bytes)

    def _dirty(self) -> list[Segment]:
        found = []
        for offset, length in self._dirtier.take():
            found += self._log.data(self._fd, offset, length)
        return found

    def _change(self) -> None:
        if self._running_since_ns is None or not self._parameters.dirty:
            return
        now_ns = time.monotonic_ns()
        length = self._parameters.dirty * (now_ns - self._running_since_ns) // 10**9
        if length:
            self._running_since_ns = now_ns
            self._dirtier.change(length)


def _length(segments: Sequence[Segment]) -> int:
    return sum(segment.length for segment in segments)
