"""The group "load": what RESUMING takes, and when it notices that a stream is not whole.

The header has a driver fail RESUMING -> STOP when data "is found to be" incomplete or invalid. It
does not say that all must be found: what is not noticed is a note. What was refused in a write, and
is taken at the commit all the same, was found, and is a deviation.
"""

from collections.abc import Callable, Iterator

from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import rule
from vfiomig.conform.streams import KeptState, odd_sizes, send
from vfiomig.conform.subject import Subject
from vfiomig.uapi import DeviceState as S

GROUP = "load"
_LOADING = "a load takes the place of the device's state"
_DAMAGED = "a damaged state is loaded, then the device is reset and its own state loaded again"
_COMMIT = "linux/vfio.h, RESUMING -> STOP"
_FLIPPED = bytes(byte ^ 0xFF for byte in range(256))
_MORE = b"\xff" * 64


@rule(
    "load-own-state",
    group=GROUP,
    text="A device takes the state that it gave.",
    source='linux/vfio.h, STOP -> RESUMING: "taken from the data transfer output"',
    losing=_LOADING,
)
def _load_own_state(subject: Subject) -> None:
    kept = subject.own_state()
    subject.load(kept.pieces())
    subject.set(S.STOP)
    subject.expect(subject.state() is S.STOP, "SET STOP succeeded, and it is not in STOP")
    subject.set(S.RUNNING)
    subject.saw(f"{kept.size_bytes} bytes loaded")


@rule(
    "load-gives-it-back",
    group=GROUP,
    text="A state that was loaded is the one that is saved next.",
    source=f'{_COMMIT}: "incorporation of data written into the device internal state"',
    losing=_LOADING,
)
def _load_gives_it_back(subject: Subject) -> None:
    kept = subject.own_state()
    subject.load(kept.pieces())
    subject.set(S.STOP)
    _expect_same(subject, kept)


@rule(
    "any-write-size",
    group=GROUP,
    text="A stream may be written in pieces of any size.",
    source='linux/vfio.h, MIG_DEVICE_STATE: "not required to preserve buffer segmentation"',
    losing=_LOADING,
)
def _any_write_size(subject: Subject) -> None:
    kept = subject.own_state()
    subject.load(kept.pieces(sizes=odd_sizes()))
    subject.set(S.STOP)
    _expect_same(subject, kept)
    subject.saw("by writes of 1 byte, of 4093, and of 1 MiB")


def _expect_same(subject: Subject, kept: KeptState) -> None:
    size_bytes, digest = subject.digest()
    same = (size_bytes, digest) == (kept.size_bytes, kept.digest)
    text = f"{size_bytes} bytes, xxh3:{digest:016x}, and xxh3:{kept.digest:016x} had been loaded"
    if subject.expect(same, text):
        subject.saw(f"the same {size_bytes} bytes")


@rule(
    "load-empty",
    group=GROUP,
    text="A load of nothing at all is refused at the commit.",
    source=f'{_COMMIT}: "found to be incomplete"',
    losing=_DAMAGED,
)
def _load_empty(subject: Subject) -> None:
    with subject.put_back_afterwards() as kept:
        if not kept.size_bytes:
            raise SkipRule("the state has 0 bytes")
        _judge(subject, "0 bytes", iter(()))


@rule(
    "load-truncated",
    group=GROUP,
    text="A stream that was cut in the middle, or before its last byte, is refused.",
    source=f'{_COMMIT}: "found to be incomplete"',
    losing=_DAMAGED,
)
def _load_truncated(subject: Subject) -> None:
    kept = subject.own_state()
    if not kept.size_bytes:
        raise SkipRule("the state has 0 bytes")
    for length in sorted({kept.size_bytes // 2, kept.size_bytes - 1}):
        with subject.put_back_afterwards():
            what = f"the first {length} of {kept.size_bytes} bytes"
            _judge(subject, what, kept.pieces(end=length))


@rule(
    "load-corrupted",
    group=GROUP,
    text="A stream with a byte changed, the first, a middle or the last one, is refused.",
    source=f'{_COMMIT}: "inconsistent, or otherwise invalid"',
    losing=_DAMAGED,
)
def _load_corrupted(subject: Subject) -> None:
    kept = subject.own_state()
    if not kept.size_bytes:
        raise SkipRule("the state has 0 bytes")
    for at in sorted({0, kept.size_bytes // 2, kept.size_bytes - 1}):
        with subject.put_back_afterwards():
            _judge(subject, f"byte {at} changed", _flipped(kept, at))


@rule(
    "refused-stays-refused",
    group=GROUP,
    text="What was refused in a write is not taken at the commit.",
    source=f'{_COMMIT}: "must fail the SET_STATE ioctl"',
    losing=_DAMAGED,
)
def _refused_stays_refused(subject: Subject) -> None:
    kept = subject.own_state()
    for at in sorted({0, kept.size_bytes // 2} if kept.size_bytes else ()):
        with subject.put_back_afterwards():
            written = _write(subject, _flipped(kept, at))
            if not written:
                continue
            # A driver may go on taking bytes: then the load has its full length.
            done = subject.session.written_bytes if subject.session is not None else 0
            _write_rest(subject, kept.pieces(start=done))
            committed = subject.set_error(S.STOP)
            what = f"byte {at} changed: {errno_name(written)} in the write"
            if subject.expect(committed != 0, f"{what}, and the commit succeeds"):
                subject.saw(f"{what}, {errno_name(committed)} at the commit")
    if not (subject.seen or subject.deviations):
        raise SkipRule("no write was refused: load-corrupted has what the commit says")


@rule(
    "load-too-long",
    group=GROUP,
    text="Bytes behind the end of the state are refused.",
    source=f'{_COMMIT}: "otherwise invalid"',
    losing=_DAMAGED,
)
def _load_too_long(subject: Subject) -> None:
    with subject.put_back_afterwards() as kept:

        def pieces() -> Iterator[bytes]:
            yield from kept.pieces()
            yield _MORE

        # The bytes of the state may be taken for themselves: what counts is that it is said.
        _judge(subject, f"{len(_MORE)} bytes behind the {kept.size_bytes}", pieces())


@rule(
    "close-keeps-resuming",
    group=GROUP,
    text="Closing the data_fd of a load changes no state.",
    source="drivers/vfio/vfio_main.c: the file of the session is not the device; measured",
    losing="RESUMING is left by a reset",
)
def _close_keeps_resuming(subject: Subject) -> None:
    with subject.put_back_afterwards() as kept:
        session = subject.load(kept.pieces())
        session.close()
        subject.log.done("closed the data_fd")
        actual = subject.state()
        subject.expect(actual is S.RESUMING, f"it is in {actual.name}")
        subject.saw(f"it is in {actual.name}")


def _judge(subject: Subject, what: str, pieces: Iterator[bytes]) -> None:
    """Load what is damaged, and say when it was noticed."""
    if written := _write(subject, pieces):
        subject.saw(f"{what}: {errno_name(written)} in the write")
        return
    committed = subject.set_error(S.STOP)
    actual = subject.state()
    if not committed:
        subject.note(f"{what}: not noticed")
        return
    subject.saw(f"{what}: {errno_name(committed)} at the commit")
    kept = actual in (S.RESUMING, S.ERROR)
    subject.expect(kept, f"{what}: the commit failed, and it is in {actual.name}")


def _write(subject: Subject, pieces: Iterator[bytes]) -> int:
    """Begin a load and write pieces. Returns the errno of a write, 0 when all were taken."""
    session = subject.start(S.RESUMING)
    session.at_end = True  # what is not written is not missing
    return _error_of(lambda: send(session, pieces))


def _write_rest(subject: Subject, pieces: Iterator[bytes]) -> None:
    if (session := subject.session) is not None:
        _error_of(lambda: send(session, pieces))


def _error_of(ask: Callable[[], None]) -> int:
    try:
        ask()
    except OSError as err:
        return err.errno or -1
    return 0


def _flipped(kept: KeptState, at: int) -> Iterator[bytes]:
    """Yield the state with one byte changed."""
    yield from kept.pieces(end=at)
    yield from (piece.translate(_FLIPPED) for piece in kept.pieces(start=at, end=at + 1))
    yield from kept.pieces(start=at + 1)
