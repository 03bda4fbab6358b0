from _thread import LockType
from enum import IntEnum
from threading import Thread
from typing import Self, final

class Outcome(IntEnum):
    END_OF_STREAM = 0
    DRAINED = 1
    LIMIT_REACHED = 2
    DEADLINE_REACHED = 3
    OTHER_FRAME = 4
    OTHER_TAIL = 5
    DAMAGED = 6
    PADDING_DAMAGED = 7

def xxh3_64(data: bytes | bytearray | memoryview, seed: int = 0) -> int: ...
def is_fixed_cost_high(quarter_ns: int, full_ns: int) -> bool: ...
def start_and_wait(
    thread: Thread,
    gate: LockType,
    abandoned: list[bool],
    done_fd: int,
    wake_fd: int,
) -> BaseException | None: ...

@final
class Digest:
    def update(self, data: bytes | bytearray | memoryview) -> None: ...
    @property
    def value(self) -> int: ...

@final
class Turns:
    @property
    def is_torn(self) -> bool: ...

@final
class Template:
    def __init__(
        self,
        head: bytes,
        tail: bytes = b"",
        *,
        align: int = 1,
        length_at: int,
        big_endian: bool = False,
        sequence_at: int = -1,
        checksum_at: int = -1,
        chain_at: int = -1,
        kind_at: int = -1,
        zeros_kind: int = -1,
        flags_at: int = -1,
        continued: int = 0,
        largest_bytes: int = 0,
    ) -> None: ...

@final
class FrameWriter:
    def __new__(
        cls,
        out_fd: int,
        buffer_bytes: int,
        *,
        wake_fd: int = -1,
        ring_slots: int = 1,
        writers: int = 1,
        grown_bytes: int = 0,
        leave_holes: bool = False,
        turns: Turns | None = None,
    ) -> Self: ...
    sequence: int
    chain: int
    bytes_per_s: int
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def zero_bytes(self) -> int: ...
    @property
    def stream_bytes(self) -> int: ...
    @property
    def direct_bytes(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def spliced_bytes(self) -> int: ...
    @property
    def failed_fd(self) -> int: ...
    def close(self) -> None: ...
    def flush(self) -> None: ...
    def put(self, data: bytes | bytearray | memoryview) -> None: ...
    def put_frame(self, template: Template, data: bytes | bytearray | memoryview) -> None: ...
    def put_chunk(
        self,
        template: Template,
        data: bytes | bytearray | memoryview,
        digest: Digest | None = None,
    ) -> None: ...
    def copy(
        self,
        src: int,
        template: Template,
        limit: int,
        digest: Digest | None = None,
        *,
        deadline_ns: int = 0,
        splicing: bool = False,
    ) -> Outcome: ...

@final
class StreamReader:
    def __new__(cls, in_fd: int, buffer_bytes: int, *, wake_fd: int = -1) -> Self: ...
    sequence: int
    chain: int
    silence_ns: int
    wake_fd: int
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def frame_offset(self) -> int: ...
    @property
    def frame_bytes(self) -> int: ...
    @property
    def left_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def zero_bytes(self) -> int: ...
    @property
    def failed_fd(self) -> int: ...
    def peek(self, count: int) -> bytes: ...
    def take(self, count: int) -> bytes: ...
    def copy(
        self,
        dst: int,
        template: Template,
        limit: int,
        digest: Digest | None = None,
        *,
        frames: int = 0,
        deadline_ns: int = 0,
    ) -> Outcome: ...
