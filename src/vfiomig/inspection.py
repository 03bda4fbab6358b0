"""What a stream holds, how far it is sound, how two differ. Needs no device and no privileges."""

import os
import threading
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

from vfiomig._fastcopy import StreamReader
from vfiomig.errors import CancelledError, MigrationError, StreamError, StreamMismatchError
from vfiomig.fd import OwnedFd
from vfiomig.framing.manifest import Manifest
from vfiomig.incoming import Incoming, open_incoming
from vfiomig.incoming.checked import OnFrame
from vfiomig.options import DEFAULT_BUFFER_BYTES, DEFAULT_MAX_STATE_BYTES
from vfiomig.transport import Stream, Target, open_source
from vfiomig.worker import Cancellation, run_shielded


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a stream.

    sound: every header, checksum, order and total was right, to the end. sound_bytes: how far into
    the stream that holds. problem, problem_offset: what is wrong at which byte; "" and None when
    sound. code: the exit code that loading it would give. digest: of the device bytes up to there.
    pre_copy_bytes, zero_bytes: of the device's bytes, those read in PRE_COPY, and those that travel
    as runs of zeros (native framing says both).
    """

    name: str
    framing: str
    sound: bool
    sound_bytes: int
    device_bytes: int
    frames: int
    digest: str
    config: bytes
    manifest: Manifest | None = None
    section_id: int | None = None
    idstr: str | None = None
    pre_copy_bytes: int = 0
    zero_bytes: int = 0
    problem: str = ""
    problem_offset: int | None = None
    code: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON; config by its length."""
        plain = asdict(self)
        plain["config_bytes"] = len(plain.pop("config"))
        return plain


def inspect(
    source: Target,
    *,
    on_frame: OnFrame | None = None,
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES,
    cancellation: Cancellation | None = None,
) -> Inspection:
    """Read a stream to its end, check all of it, and say what it holds. A damaged one is no error.

    on_frame is called for each sound frame, in the working thread. Blocks. Raises LocalIOError when
    the file cannot be read, StreamMismatchError when it is no such stream or a newer version.
    """
    with closing(Cancellation()) as own, open_source(source) as stream:
        stop = cancellation or own
        job = _Inspecting(stream, max_state_bytes, on_frame, stop)
        return run_shielded(job.run, stop)


class _Inspecting:
    def __init__(
        self,
        stream: Stream,
        max_state_bytes: int,
        on_frame: OnFrame | None,
        cancellation: Cancellation,
    ) -> None:
        self._stream, self._max_state_bytes = stream, max_state_bytes
        self._on_frame, self._cancellation = on_frame, cancellation
        self._reader = StreamReader(
            stream.fileno(), DEFAULT_BUFFER_BYTES, wake_fd=cancellation.fileno()
        )

    def run(self) -> Inspection:
        incoming, problem = None, None
        try:
            incoming = open_incoming(self._reader, self._max_state_bytes)
            incoming.transfer(-1, self._on_frame)
        except StreamError as err:
            problem = err
        except StreamMismatchError as err:
            err.name_stream(self._stream.name)
            raise
        except OSError as err:
            if self._cancellation.cancelled:
                raise CancelledError("cancelled while reading") from err
            raise self._stream.failed(err) from err
        return self._result(incoming, problem)

    def _result(self, incoming: Incoming | None, problem: StreamError | None) -> Inspection:
        section = incoming.section if incoming else None
        return Inspection(
            name=self._stream.name,
            framing=incoming.framing if incoming else "",
            sound=problem is None,
            sound_bytes=incoming.sound_bytes if incoming else 0,
            device_bytes=incoming.device_bytes if incoming else 0,
            frames=incoming.frames if incoming else 0,
            digest=f"{incoming.digest:016x}" if incoming else "",
            config=incoming.config if incoming else b"",
            manifest=incoming.manifest if incoming else None,
            section_id=section.section_id if section else None,
            idstr=section.idstr if section else None,
            pre_copy_bytes=incoming.pre_copy_bytes if incoming else 0,
            zero_bytes=incoming.zero_bytes if incoming else 0,
            problem=str(problem) if problem else "",
            problem_offset=problem.offset if problem else None,
            code=problem.code if problem else 0,
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How the device bytes of two sound streams differ. first_offset: None when they are equal."""

    device_bytes: tuple[int, int]
    digests: tuple[str, str]
    first_offset: int | None
    fields: tuple[tuple[str, str, str], ...]

    @property
    def same_state(self) -> bool:
        """Whether both hold the same bytes of state, however they are framed."""
        return self.first_offset is None


def diff(one: Target, other: Target) -> Difference:
    """Compare the states that two files hold, byte for byte, in whatever framing each is.

    Reads both once, in constant memory. Raises StreamError when one of them is not sound.
    """
    with ExitStack() as stack:
        readers = [_Piped(stack, target) for target in (one, other)]
        with ExitStack() as threads:
            # Only now: what fails above closes descriptors, and no thread may use them any more.
            for reader in readers:
                reader.start()
                threads.callback(reader.join)
            first = _first_difference(readers[0].fileno(), readers[1].fileno())
        results = [reader.result() for reader in readers]
    lengths = (results[0].device_bytes, results[1].device_bytes)
    digests = (f"{results[0].digest:016x}", f"{results[1].digest:016x}")
    return Difference(lengths, digests, first, tuple(_fields(*results)))


class _Piped:
    """A thread that writes the device bytes of a stream into a pipe."""

    def __init__(self, stack: ExitStack, target: Target) -> None:
        stream = stack.enter_context(open_source(target))
        self._reader = StreamReader(stream.fileno(), DEFAULT_BUFFER_BYTES)
        try:
            self._incoming = open_incoming(self._reader, DEFAULT_MAX_STATE_BYTES)
        except OSError as err:
            raise stream.failed(err) from err
        except (StreamError, StreamMismatchError) as err:
            err.name_stream(stream.name)
            raise
        read_fd, write_fd = os.pipe()
        self._read = stack.enter_context(OwnedFd(read_fd))
        self._write = stack.enter_context(OwnedFd(write_fd))
        self._stream = stream
        self._error: MigrationError | None = None
        self._thread = threading.Thread(target=self._run, name="vfiomig-diff")

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        with self._write:
            try:
                self._incoming.transfer(self._write.fileno())
            except OSError as err:
                self._error = self._stream.failed(err)
            except MigrationError as err:
                err.name_stream(self._stream.name)
                self._error = err

    def fileno(self) -> int:
        return self._read.fileno()

    def join(self) -> None:
        while os.read(self._read.fileno(), 1 << 16):
            pass  # what is left after a difference: the digests want all of it
        self._thread.join()

    def result(self) -> Incoming:
        if self._error is not None:
            raise self._error
        return self._incoming


def _first_difference(one_fd: int, other_fd: int) -> int | None:
    at = 0
    with open(one_fd, "rb", closefd=False) as one, open(other_fd, "rb", closefd=False) as other:
        while True:
            mine, theirs = one.read(1 << 16), other.read(1 << 16)
            if mine != theirs:
                pairs = zip(mine, theirs, strict=False)
                short = min(len(mine), len(theirs))
                return at + next((i for i, (a, b) in enumerate(pairs) if a != b), short)
            if not mine:
                return None
            at += len(mine)


def _fields(one: Incoming, other: Incoming) -> list[tuple[str, str, str]]:
    """Return what the two say of themselves and not alike: name, one's value, the other's."""
    described = [_described(incoming) for incoming in (one, other)]
    names = sorted(set(described[0]) | set(described[1]))
    rows = [(name, described[0].get(name, ""), described[1].get(name, "")) for name in names]
    return [row for row in rows if row[1] != row[2]]


def _described(incoming: Incoming) -> dict[str, str]:
    found = {"framing": incoming.framing, "config_bytes": str(len(incoming.config))}
    if incoming.manifest is not None:
        entry = incoming.manifest.devices[0]
        found |= {"name": entry.name, "capabilities": ",".join(entry.capabilities)}
        found |= {field: str(value) for field, value in asdict(entry.identity).items()}
    if incoming.section is not None:
        found["idstr"] = incoming.section.idstr
    return found
