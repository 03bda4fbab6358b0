"""vfiomig at one end of a socket, and at the other whoever a test wants: frames that are wrong."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

import vfiomig
from devices import Simulated, no_leak
from session_oracle import DATA, MESSAGE, PROBE, ZEROS, Connection, Gone, Source
from test_live_oracle import Job, content
from vfiomig import Cancellation, DeviceState, MigrationError, ReceiveOptions, SendOptions

S = DeviceState
HERE, THERE = "sim:?size=100001&seed=1", "sim:?size=100001&seed=9"
STATE = bytes(range(256)) * 100
# How long a test waits for what does not come; and what a busy machine may take to notice.
SHORT_NS, SLACK_NS = 300_000_000, 3_000_000_000


class Facing:
    """vfiomig's end of a socket, at work; the other end is the test's, and so is sock."""

    def __init__(
        self, device: Simulated, sock: socket.socket, job: Job, cancellation: Cancellation
    ) -> None:
        self.device, self.sock, self._job = device, sock, job
        self.cancellation = cancellation

    def refused(self, text: str = "", code: int = 9) -> MigrationError:
        """Say no more, and return what vfiomig's end raised: a sentence."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        failure = self.failure()
        assert failure.code == code, repr(failure)
        assert text in str(failure), str(failure)
        return failure

    def failure(self) -> MigrationError:
        """Return what vfiomig's end raised, once it has."""
        return self._job.failure()

    def done(self) -> vfiomig.MigrationReport:
        """Return its report, once it has succeeded."""
        return self._job.done()


@contextmanager
def facing(
    work: Callable[[Simulated, str, Cancellation], vfiomig.MigrationReport],
    url: str,
) -> Iterator[Facing]:
    with no_leak(), Simulated(url) as device:
        near, far = socket.socketpair()
        cancellation = Cancellation()

        def job() -> vfiomig.MigrationReport:
            with far:
                return work(device, f"fd:{far.fileno()}", cancellation)

        with near:
            yield Facing(device, near, Job(job), cancellation)
        cancellation.close()


def _given(place: Path, silence_ns: int) -> dict[str, Any]:
    return {"journal": place / "journal", "silence_ns": silence_ns, "handshake_ns": silence_ns}


@contextmanager
def receiver(place: Path, *, silence_ns: int = SLACK_NS, **options: object) -> Iterator[Facing]:
    """A destination, of a device that is THERE."""
    chosen = ReceiveOptions(**_given(place, silence_ns) | options)

    def work(device: Simulated, url: str, stop: Cancellation) -> vfiomig.MigrationReport:
        return vfiomig.receive([device], url, chosen, cancellation=stop)

    with facing(work, THERE) as found:
        yield found


@contextmanager
def sender(
    place: Path, url: str = HERE, *, silence_ns: int = SLACK_NS, **options: object
) -> Iterator[Facing]:
    """A source, of a device that is HERE."""
    chosen = SendOptions(**_given(place, silence_ns) | options)

    def work(device: Simulated, fd: str, stop: Cancellation) -> vfiomig.MigrationReport:
        return vfiomig.send([device], fd, chosen, cancellation=stop)

    with facing(work, url) as found:
        yield found


def check_untouched(device: Simulated) -> None:
    """Nobody has asked anything of it."""
    assert device.history == [] or {state for _, state in device.history} == {S.RUNNING}
    assert device.content() == content(THERE)


def check_reset(device: Simulated) -> None:
    """It was in RESUMING, and has not run with anything that came."""
    states = [state for _, state in device.history]
    assert states[-1] is S.RUNNING
    assert S.RUNNING_P2P not in states[states.index(S.RESUMING) :]
    assert not any(device.content())


def source_to(sock: socket.socket) -> Source:
    return Source(lambda: sock, [STATE])


def until_left(connection: Connection) -> None:
    """Read on until the other end says farewell, or goes."""
    with suppress(Gone, OSError):
        while True:
            found = connection.next()
            if found.kind == MESSAGE and found.message["type"] == "left":
                return


def sealed(head: bytes) -> bytes:
    return head + xxhash.xxh3_64_digest(head)[::-1]


def greeting(
    magic: bytes = bytes.fromhex("89564d47530d0a1a"),
    newest: int = 1,
    oldest: int = 1,
    index: int = 0,
    count: int = 1,
    reserved: int = 0,
) -> bytes:
    numbers = (newest, oldest, index, count)
    session = bytes(range(16))
    return sealed(struct.pack("<8sIIHH16s16sI", magic, *numbers, session, bytes(16), reserved))


def frame(
    kind: int,
    stream: int,
    payload: bytes = b"",
    *,
    session: bytes,
    flags: int = 0,
    magic: bytes = b"VMse",
    number: int = 0,
    length: int | None = None,
    reserved: bytes = bytes(24),
    link: int | None = None,
) -> bytes:
    """Return a frame of a source, the first of its stream unless link says what was before."""
    size = len(payload) if length is None else length
    checksum = xxhash.xxh3_64_intdigest(payload)
    numbers = (kind, flags, stream, number, size, checksum)
    head = struct.pack("<4sBBHQQQ24s", magic, *numbers, reserved)
    seed = xxhash.xxh3_64_intdigest(session, 2 * stream + 1) if link is None else link
    head += xxhash.xxh3_64_intdigest(head, seed).to_bytes(8, "little")
    return head + payload + bytes(-len(payload) % 64)


LENGTHS = {"2^31": 1 << 31, "2^32": 1 << 32, "2^63": 1 << 63, "2^64-1": (1 << 64) - 1, "0": 0}
LARGEST = {MESSAGE: 64 << 10, DATA: 128 << 20, ZEROS: 128 << 20, PROBE: 1 << 20}


def raw(oracle: Source, kind: int, stream: int, payload: bytes = b"x", **odd: object) -> None:
    """Send a frame that continues its stream, whatever is wrong with it."""
    number, link = oracle.control._sent.get(stream, (0, None))
    given: dict[str, Any] = {"number": number, "link": link} | odd
    oracle.control.socket.sendall(frame(kind, stream, payload, session=oracle.session, **given))


@contextmanager
def grows_little() -> Iterator[None]:
    """Nothing within takes 64 MiB more than there was."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before_kib = _kib("VmHWM")
    yield
    assert _kib("VmHWM") - before_kib < 64 << 10


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
