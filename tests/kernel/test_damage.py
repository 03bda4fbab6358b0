"""Streams that are not what they should be: refused, and the destination is as it was."""

import errno
from collections.abc import Iterator

import pytest

import stream_oracle
from kernel.command import run
from kernel.mtty import DESTINATION, HEADER, SOURCE, Mtty, OpenMtty, state_bytes
from kernel.streams import QEMU, loaded, piped, saved
from vfiomig import (
    DeviceBusyError,
    DeviceIOError,
    DeviceState,
    DeviceStateError,
    LoadOptions,
    MigrationError,
    OutOfSyncError,
    SaveOptions,
    StreamError,
    StreamMismatchError,
    load,
)
from vfiomig.backends import borrow
from vfiomig.report import Chunk, Event, StateChange

# A stream of mtty is short; with so long a stride the flips and cuts still fall into every field.
STRIDE = 7


@pytest.fixture
def target(destination: Mtty) -> Iterator[OpenMtty]:
    """The destination, open: after each refusal it must be as it was."""
    with destination.opened() as mtty:
        yield mtty
        assert mtty.device.state() is DeviceState.RUNNING
        assert mtty.registers.ports() == list(DESTINATION)


def refusal(
    stream: bytes, target: OpenMtty, options: LoadOptions | None = None
) -> tuple[MigrationError, list[str]]:
    """Return how a load was refused, and the states that were asked for."""
    events: list[Event] = []
    with piped(stream) as read_end, pytest.raises(MigrationError) as caught:
        load(read_end, target.device, options or LoadOptions(), on_event=events.append)
    asked = [
        "reset" if event.by == "reset" else event.wanted.name
        for event in events
        if isinstance(event, StateChange)
    ]
    return caught.value, asked


def check(stream: bytes, target: OpenMtty, kinds: tuple[type[MigrationError], ...]) -> None:
    err, asked = refusal(stream, target)
    assert isinstance(err, kinds), err
    assert asked in ([], ["RUNNING_P2P", "STOP", "RESUMING", "reset"])
    if asked:
        assert (err.code, err.actual) == (7, DeviceState.RUNNING)
        assert "was reset and is RUNNING; nothing is loaded" in err.aftermath
    assert target.device.state() is DeviceState.RUNNING
    assert target.registers.scratch == [port.scratch for port in DESTINATION]


def test_a_stream_that_is_cut_anywhere_is_refused(stream: bytes, target: OpenMtty) -> None:
    for end in [*range(0, len(stream), STRIDE), len(stream) - 1]:
        check(stream[:end], target, (StreamError,))


def test_qemus_sections_that_are_cut_anywhere_are_refused(source: Mtty, target: OpenMtty) -> None:
    sections = saved(source, QEMU)
    for end in [*range(0, len(sections), STRIDE), len(sections) - 1]:
        check(sections[:end], target, (StreamError,))


def flipped(stream: bytes, at: int) -> bytes:
    return stream[:at] + bytes([stream[at] ^ 1 << at % 8]) + stream[at + 1 :]


def test_a_bit_that_is_flipped_anywhere_is_refused(stream: bytes, target: OpenMtty) -> None:
    state_at = stream.index(state_bytes(SOURCE))
    for at in range(0, len(stream), STRIDE):
        if not state_at <= at < state_at + HEADER.size:
            # The magic of the stream, altered, is of no stream of ours.
            check(flipped(stream, at), target, (StreamError, StreamMismatchError))


def test_every_byte_of_the_ports_is_guarded(stream: bytes, target: OpenMtty) -> None:
    state_at = stream.index(state_bytes(SOURCE))
    for at in range(state_at + HEADER.size, state_at + 96):
        err, asked = refusal(flipped(stream, at), target)
        assert isinstance(err, StreamError)
        assert asked[-2:] == ["RESUMING", "reset"]


def test_a_flipped_bit_that_the_driver_refuses_itself_is_reported_as_damage(
    stream: bytes, target: OpenMtty
) -> None:
    state_at = stream.index(state_bytes(SOURCE))
    for at in range(state_at, state_at + HEADER.size):
        err, asked = refusal(flipped(stream, at), target)
        assert (type(err), err.code, asked[-1]) == (StreamError, 7, "reset")
        assert isinstance(err.__cause__, OSError)
        assert err.__cause__.errno == errno.EFAULT


def test_a_byte_behind_the_end_is_refused(stream: bytes, target: OpenMtty) -> None:
    check(stream + b"\0", target, (StreamError,))


def test_a_newer_version_is_refused_before_the_device_is_touched(
    stream: bytes, target: OpenMtty
) -> None:
    newer = stream_oracle.prologue(64, version=2) + stream[64:]
    err, asked = refusal(newer, target)
    assert isinstance(err, StreamMismatchError)
    assert "version 2" in str(err)
    assert (err.code, asked) == (8, [])


@pytest.mark.parametrize("to_larger", [True, False], ids=["mtty-1 to mtty-2", "mtty-2 to mtty-1"])
def test_the_state_of_another_model_is_refused_before_the_device_is_touched(
    source: Mtty, small_source: Mtty, *, to_larger: bool
) -> None:
    giver, taker = (small_source, source) if to_larger else (source, small_source)
    stream = saved(giver)
    with taker.opened() as target:
        err, asked = refusal(stream, target)
    assert isinstance(err, StreamMismatchError)
    assert f"model '{giver.kind}' is not '{taker.kind}'" in str(err)
    assert "--allow-mismatch model" in err.hint
    assert (err.code, asked) == (8, [])


@pytest.mark.parametrize("framing", ["native", "qemu"])
@pytest.mark.parametrize(
    ("to_larger", "expected"),
    [(True, errno.EFAULT), (False, errno.ENOMEM)],
    ids=["mtty-1 to mtty-2", "mtty-2 to mtty-1"],
)
def test_where_nothing_but_the_driver_sees_it_the_device_is_reset(
    source: Mtty, small_source: Mtty, framing: str, expected: int, *, to_larger: bool
) -> None:
    giver, taker = (small_source, source) if to_larger else (source, small_source)
    stream = saved(giver, QEMU if framing == "qemu" else SaveOptions())
    held = list(SOURCE if to_larger else SOURCE[:1])
    with taker.opened() as target:
        options = LoadOptions(allow_mismatch=frozenset({"model"}))
        err, asked = refusal(stream, target, options)
        assert isinstance(err, DeviceIOError)
        assert (err.code, err.errno, err.actual) == (6, expected, DeviceState.RUNNING)
        assert asked[-1] == "reset"
        assert target.device.state() is DeviceState.RUNNING
        assert target.registers.ports() == held


def test_a_header_that_the_driver_refuses_is_never_committed(
    source: Mtty, target: OpenMtty
) -> None:
    # mtty forgives: it would take what follows, and load it (linux/vfio.h leaves that open).
    sections = saved(source, QEMU)
    at = sections.index(state_bytes(SOURCE))
    wrong = sections[:at] + b"\xff" + sections[at + 1 :]
    err, asked = refusal(wrong, target)
    assert (err.code, err.errno) == (6, errno.EFAULT)
    assert asked[-1] == "reset"


def test_a_state_that_the_driver_finds_short_at_the_commit_is_dropped(target: OpenMtty) -> None:
    short = stream_oracle.write(
        [stream_oracle.data(state_bytes(SOURCE)[:60])], _manifest_of("mtty-2")
    )
    err, asked = refusal(short, target)
    assert isinstance(err, DeviceStateError)
    assert (err.code, err.errno, err.wanted) == (6, errno.EINVAL, DeviceState.STOP)
    assert asked[-3:] == ["RESUMING", "STOP", "reset"]


def test_a_stream_written_by_another_program_loads(destination: Mtty) -> None:
    pieces = [stream_oracle.data(bytes([byte])) for byte in state_bytes(SOURCE)]
    written = stream_oracle.write(pieces, _manifest_of("mtty-2"))
    assert loaded(written, destination).frames == 98
    assert destination.is_untouched(SOURCE)


def test_a_reset_by_somebody_else_during_a_load_is_noticed(stream: bytes, target: OpenMtty) -> None:
    with borrow(f"fd:{target.device_fd}") as other, piped(stream) as read_end:

        def meddle(event: Event) -> None:
            if isinstance(event, StateChange) and event.wanted is DeviceState.RESUMING:
                other.reset()

        with pytest.raises(DeviceIOError) as caught:
            load(read_end, target.device, on_event=meddle)
    assert (caught.value.code, caught.value.errno) == (6, errno.ENODEV)


def test_a_reset_by_somebody_else_before_the_commit_is_noticed(
    stream: bytes, target: OpenMtty
) -> None:
    with borrow(f"fd:{target.device_fd}") as other, piped(stream) as read_end:

        def meddle(event: Event) -> None:
            if isinstance(event, Chunk):
                other.reset()

        with pytest.raises(OutOfSyncError) as caught:
            load(read_end, target.device, LoadOptions(chunk_events=True), on_event=meddle)
    assert caught.value.code == 6


def test_the_command_says_what_became_of_the_device(stream: bytes, destination: Mtty) -> None:
    with piped(stream[:-1]) as read_end:
        done = run("load", "-", destination.uuid, stdin=read_end.fileno())
    assert done.code == 7
    assert "was reset and is RUNNING; nothing is loaded" in done.err
    with piped(stream[:-1]) as read_end:
        done = run("load", "-", destination.uuid, "--json", stdin=read_end.fileno())
    error = done.of_type("error")[0]
    assert (done.code, error["code"], error["actual_state"]) == (7, 7, "RUNNING")
    assert destination.is_untouched(DESTINATION)


def test_a_device_that_is_not_running_is_not_loaded(stream: bytes, destination: Mtty) -> None:
    with destination.opened() as mtty:
        mtty.device.set_state(DeviceState.STOP)
        with piped(stream) as read_end, pytest.raises(DeviceBusyError, match="is in STOP") as busy:
            load(read_end, mtty.device)
        assert mtty.device.state() is DeviceState.STOP
    assert busy.value.code == 5


def _manifest_of(model: str) -> dict[str, object]:
    described = stream_oracle.manifest()
    described["devices"][0]["identity"] |= {"driver": "mtty", "model": model}
    return described
