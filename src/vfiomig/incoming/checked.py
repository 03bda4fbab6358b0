"""What both framings need of a stream on its way in: exact reads, a limit, frames told."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from vfiomig._fastcopy import Digest, Outcome, StreamReader, Template
from vfiomig.errors import StreamError
from vfiomig.recorder import PROGRESS_NS


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """One sound frame, section or record as it stands in the stream. offset: of its header.

    ends_chunk: it holds the device's bytes, and the last ones of a chunk.
    """

    kind: str
    offset: int
    length_bytes: int
    device: int = 0
    detail: str = ""
    ends_chunk: bool = False


OnFrame = Callable[[FrameInfo], None]
Tell = Callable[[], None]


class Checked:
    """A stream that is read through one StreamReader. sound_bytes: how far it was sound.

    config: the opaque blob, so far. pre_copy_bytes: of the device's bytes, those that say so.
    refused_at: the byte of state that a device refused, None while it has not.
    """

    def __init__(self, reader: StreamReader, max_state_bytes: int) -> None:
        self._reader, self._max_state_bytes = reader, max_state_bytes
        self.sound_bytes = self.pre_copy_bytes = 0
        self.config = b""
        self.refused_at: int | None = None

    @property
    def frames(self) -> int:
        """Frames (native) or DATA records (qemu) so far."""
        return self._reader.sequence

    @property
    def device_bytes(self) -> int:
        """Bytes of the devices' state so far."""
        return self._reader.device_bytes

    @property
    def zero_bytes(self) -> int:
        """Of device_bytes, those that travelled as runs of zeros."""
        return self._reader.zero_bytes

    def _exactly(self, count: int, what: str) -> bytes:
        data = b""
        while piece := self._reader.take(min(count - len(data), self._reader.buffer_bytes)):
            data += piece
        if len(data) < count:
            raise StreamError(f"the stream ends inside {what}", offset=self._reader.offset)
        return data

    def _expect(self, expected: bytes, what: str) -> None:
        offset = self._reader.offset
        if self._exactly(len(expected), what) != expected:
            raise StreamError(f"{what} is damaged", offset=offset)

    def _copy_frames(
        self, data_fd: int, template: Template, digest: Digest, frames: int, tell: Tell | None
    ) -> Outcome:
        """Copy frames like template (0: as many as there are), and tell ten times a second."""
        while True:
            deadline_ns = time.monotonic_ns() + PROGRESS_NS if tell else 0
            limit = self._max_state_bytes - self.device_bytes
            try:
                outcome = self._reader.copy(
                    data_fd, template, limit, digest, frames=frames, deadline_ns=deadline_ns
                )
            except OSError:
                if self._reader.failed_fd == data_fd:
                    self.refused_at = self.device_bytes
                raise
            if tell is not None:
                tell()
            if outcome is not Outcome.DEADLINE_REACHED:
                between_frames = outcome in (Outcome.LIMIT_REACHED, Outcome.OTHER_FRAME)
                reader = self._reader
                self.sound_bytes = reader.offset if between_frames else reader.frame_offset
                return outcome

    def _check_whole(self, outcome: Outcome) -> None:
        if outcome is not Outcome.END_OF_STREAM:
            return
        where = f"{self._reader.frame_bytes} bytes of state"
        if not self._reader.left_bytes:
            where = "the padding"
        raise StreamError(f"the stream ends inside {where}", offset=self._reader.offset)

    def _check_total(self, length: int, offset: int) -> None:
        if self.device_bytes + length > self._max_state_bytes:
            raise StreamError(
                f"a length of {length} bytes makes more than the {self._max_state_bytes} that"
                " a state may have here",
                offset=offset,
                hint="raise the limit with --max-state if the device's state is really as large",
            )

    def _end(self) -> None:
        offset = self._reader.offset
        if self._reader.peek(1):
            raise StreamError("there are bytes after the end of the stream", offset=offset)
        self.sound_bytes = offset
