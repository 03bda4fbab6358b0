from _thread import LockType
from enum import IntEnum
from threading import Thread
from typing import Self, final

class Outcome(IntEnum):
    END_OF_STREAM = 0
    DRAINED = 1
    LIMIT_REACHED = 2
    DEADLINE_REACHED = 3

def xxh3_64(data: bytes | bytearray | memoryview, seed: int = 0) -> int: ...
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
    ) -> None: ...

@final
class FrameWriter:
    def __new__(cls, out_fd: int, buffer_bytes: int, *, wake_fd: int = -1) -> Self: ...
    sequence: int
    chain: int
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def stream_bytes(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def spliced_bytes(self) -> int: ...
    @property
    def failed_fd(self) -> int: ...
    def close(self) -> None: ...
    def put(self, data: bytes | bytearray | memoryview) -> None: ...
    def put_frame(self, template: Template, data: bytes | bytearray | memoryview) -> None: ...
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
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def failed_fd(self) -> int: ...
    def peek(self, count: int) -> bytes: ...
    def take(self, count: int) -> bytes: ...
    def forward(self, dst: int, count: int, digest: Digest | None = None) -> int: ...
    def zeros(self, dst: int, count: int, digest: Digest | None = None) -> None: ...
