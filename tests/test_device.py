"""Device over a scripted DeviceOps: what it asks, what it refuses, and how it climbs the ladder."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise

import pytest

from vfiomig import device as device_module
from vfiomig import errors, states
from vfiomig.channel import DataChannel, FdChannel
from vfiomig.device import Device
from vfiomig.identity import Identity
from vfiomig.report import Event, StateChange
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S


class Ops:
    """Obeys every SET, except for what the test wrote into it. Sessions are real descriptors."""

    protocol = "v2"
    region_bytes = 0

    def __init__(self, flags: int = 7) -> None:  # all three of Capability
        self.flags, self.current = flags, S.RUNNING
        self.asked, self.sessions = list[S](), list[FdChannel]()
        self.resets, self.closed, self.resets_to = 0, 0, S.RUNNING
        self.refuses: dict[S, tuple[int, S]] = {}  # by target: errno, and the state it leaves
        self.errors: dict[str, int] = {}
        self.reset_errors, self.gives_channels = list[int](), True

    def _fail(self, call: str) -> None:
        if code := self.errors.get(call, 0):
            raise OSError(code, os.strerror(code))

    def get_migration_flags(self) -> int:
        self._fail("flags")
        return self.flags

    def get_device_state(self) -> S:
        self._fail("state")
        return self.current

    def set_device_state(self, state: S) -> DataChannel | None:
        self.asked.append(state)
        before = self.current
        self.errors["set"], self.current = self.refuses.get(state, (0, state))
        if self.errors["set"] == errno.ENOTCONN:  # gone: it does not even say its state
            self.errors["state"] = errno.ENOTCONN
        self._fail("set")
        if not (self.gives_channels and states.starts_session(before, state)):
            return None
        self.sessions.append(FdChannel("dev0", os.memfd_create("data_fd")))
        return self.sessions[-1]

    def get_data_size(self) -> int:
        self._fail("size")
        return 4096

    def set_precopy_info_v2(self) -> bool:
        self._fail("v2")
        return True

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def stop_dma_logging(self) -> None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def reset_device(self) -> None:
        self.resets += 1
        self.errors["reset"] = self.reset_errors.pop(0) if self.reset_errors else 0
        self._fail("reset")
        self.current = self.resets_to

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_module, "_RESET_PAUSE_S", 0.0)
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def ops() -> Ops:
    return Ops()


@pytest.fixture
def device(ops: Ops) -> Iterator[Device]:
    with Device("dev0", Identity("scripted"), ops) as opened:
        yield opened


def is_closed(channel: DataChannel | None) -> bool:
    assert channel is not None
    with suppress(errors.StaleChannelError):
        return channel.fileno() == -1
    return True


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOTTY, errors.NotMigratableError, "driver scripted has no migration"),
        (errno.EIO, errors.DeviceIOError, "cannot ask for its capabilities"),
        (0, errors.NotMigratableError, "does not offer STOP_COPY"),
    ],
)
def test_a_device_without_migration_is_closed(
    ops: Ops, code: int, kind: type[errors.MigrationError], words: str
) -> None:
    ops.flags, ops.errors["flags"] = Capability.P2P, code
    with pytest.raises(kind, match=words) as caught:
        Device("dev0", Identity("scripted"), ops)
    assert (caught.value.errno or 0, ops.closed) == (code, 1)


def test_unknown_capability_bits_are_ignored() -> None:
    with Device("dev0", Identity("scripted"), Ops(flags=1 << 40 | 0b1001)) as opened:
        assert opened.capability_names == "STOP_COPY"


@pytest.mark.parametrize(
    ("start", "target"),
    [(S.STOP_COPY, S.PRE_COPY), (S.ERROR, S.RUNNING), (S.RUNNING, S.ERROR), (S(42), S.RUNNING)],
)
def test_illegal_arcs_are_refused_unasked(device: Device, ops: Ops, start: S, target: S) -> None:
    ops.current = start
    with pytest.raises(errors.IllegalArcError) as caught:
        device.set_state(target)
    assert (caught.value.wanted, caught.value.actual, ops.asked) == (target, start, [])


def test_the_arcs_of_the_path_are_asked_for_in_turn(device: Device, ops: Ops) -> None:
    assert device.set_state(S.RUNNING) is None
    assert ops.asked == []
    assert device.set_state(S.STOP_COPY) is ops.sessions[0]
    assert ops.asked == [S.RUNNING_P2P, S.STOP, S.STOP_COPY]


@pytest.mark.parametrize(
    ("code", "left"), [(errno.EMFILE, S.STOP_COPY), (errno.EIO, S.ERROR), (errno.ENOTCONN, None)]
)
def test_a_failed_set_reads_the_state_back(
    device: Device, ops: Ops, code: int, left: S | None
) -> None:
    # EMFILE and EFAULT leave the device in the target, with no data_fd: Linux 6.12, vfio_main.c.
    ops.refuses[S.STOP_COPY] = (code, S.STOP if left is None else left)
    with pytest.raises(errors.DeviceStateError) as caught:
        device.set_state(S.STOP_COPY)
    found = caught.value
    assert (found.errno, found.wanted, found.actual) == (code, S.STOP_COPY, left)
    assert isinstance(found.__cause__, OSError)
    assert ("unknown" if left is None else left.name) in str(found)


def test_the_session_lasts_from_pre_copy_through_stop_copy(device: Device, ops: Ops) -> None:
    channel = device.set_state(S.PRE_COPY)
    assert device.set_state(S.STOP_COPY) is channel
    assert not is_closed(channel)


@pytest.mark.parametrize(
    "end", [Device.close, Device.reset, lambda device: device.set_state(S.STOP)]
)
def test_a_channel_is_stale_once_its_session_has_ended(
    device: Device, end: Callable[[Device], None]
) -> None:
    channel = device.set_state(S.RESUMING)
    assert channel is not None
    end(device)
    with pytest.raises(errors.StaleChannelError):
        channel.fileno()
    with pytest.raises(errors.StaleChannelError):
        channel.precopy_info()


@pytest.mark.parametrize(
    ("target", "left", "ended"),
    [
        (S.PRE_COPY_P2P, S.PRE_COPY, False),
        (S.PRE_COPY_P2P, S.ERROR, True),
        (S.PRE_COPY_P2P, S.RUNNING, True),
        (S.RUNNING, S.PRE_COPY, True),
    ],
)
def test_after_a_failed_set_only_a_sure_session_is_kept(
    device: Device, ops: Ops, target: S, left: S, *, ended: bool
) -> None:
    channel = device.set_state(S.PRE_COPY)
    ops.refuses[target] = (errno.EIO, left)
    with pytest.raises(errors.DeviceStateError):
        device.set_state(target)
    assert is_closed(channel) is ended


def test_a_second_session_while_one_is_open_is_out_of_sync(device: Device, ops: Ops) -> None:
    device.set_state(S.STOP_COPY)
    ops.current = S.RUNNING  # reset behind our back
    with pytest.raises(errors.OutOfSyncError, match="out of sync") as caught:
        device.set_state(S.STOP_COPY)
    assert (caught.value.errno, caught.value.actual) == (errno.EBADF, S.STOP_COPY)
    assert all(map(is_closed, ops.sessions))


def test_a_session_without_a_channel_is_out_of_sync(device: Device, ops: Ops) -> None:
    ops.gives_channels = False
    with pytest.raises(errors.OutOfSyncError, match="no data_fd"):
        device.set_state(S.STOP_COPY)


@pytest.mark.parametrize(("answer", "resets"), [({}, 0), ({S.STOP: (errno.EIO, S.ERROR)}, 1)])
def test_recover_resets_only_what_refuses(
    device: Device, ops: Ops, answer: dict[S, tuple[int, S]], resets: int
) -> None:
    device.set_state(S.STOP_COPY)
    ops.refuses |= answer
    assert device.recover(S.RUNNING) is S.RUNNING
    assert (ops.resets, ops.current) == (resets, S.RUNNING)


@pytest.mark.parametrize("start", [S.RESUMING, S.ERROR])
@pytest.mark.parametrize("wanted", [S.RUNNING, S.STOP])
def test_recover_leaves_resuming_and_error_by_reset_alone(
    device: Device, ops: Ops, start: S, wanted: S
) -> None:
    ops.current = start
    assert device.recover(wanted) is S.RUNNING
    assert (ops.asked, ops.resets) == ([], 1)


def test_when_the_reset_fails_the_device_is_lost(device: Device, ops: Ops) -> None:
    channel = device.set_state(S.STOP_COPY)
    ops.refuses[S.STOP], ops.reset_errors = (errno.EIO, S.ERROR), [errno.EINVAL]
    seen: list[Event] = []
    with (
        device.observed(seen.append),
        pytest.raises(errors.DeviceLostError, match="in ERROR") as caught,
    ):
        device.recover(S.RUNNING)
    found = caught.value
    assert (found.code, found.errno, found.actual) == (20, errno.EINVAL, S.ERROR)
    assert isinstance(told := seen[-1], StateChange)
    assert (told.by, told.errno, told.actual) == ("reset", errno.EINVAL, S.ERROR)
    assert is_closed(channel)


def test_recover_ends_a_session_that_a_reset_took(device: Device, ops: Ops) -> None:
    first = device.set_state(S.STOP_COPY)
    ops.current = S.RUNNING
    assert device.recover(S.RUNNING) is S.RUNNING
    assert is_closed(first)
    assert device.set_state(S.STOP_COPY) is ops.sessions[1]


@pytest.mark.parametrize(
    ("answers", "tries"), [([errno.EAGAIN] * 2, 3), ([errno.EAGAIN] * 99, 20), ([errno.EIO], 1)]
)
def test_only_a_busy_reset_is_tried_again(
    device: Device, ops: Ops, answers: list[int], tries: int
) -> None:
    ops.reset_errors = list(answers)
    with nullcontext() if tries == 3 else pytest.raises(errors.DeviceLostError):
        device.reset()
    assert (ops.resets, len(ops.reset_errors)) == (tries, max(len(answers) - tries, 0))


def test_a_reset_must_lead_to_running(device: Device, ops: Ops) -> None:
    ops.resets_to = S.ERROR
    with pytest.raises(errors.DeviceLostError, match="did not bring it back"):
        device.reset()
    ops.errors["state"] = errno.EIO
    with pytest.raises(errors.DeviceLostError, match="cannot be read"):
        device.recover(S.RUNNING)
    assert (ops.asked, ops.resets) == ([], 2)


def test_every_set_is_told_with_what_came_of_it(device: Device, ops: Ops) -> None:
    ops.refuses[S.STOP] = (errno.ETIMEDOUT, S.RUNNING_P2P)
    seen: list[Event] = []
    with device.observed(seen.append):
        with pytest.raises(errors.DeviceStateError):
            device.set_state(S.STOP_COPY)
        device.reset()
    device.set_state(S.RUNNING_P2P)  # observed no longer
    changes = [event for event in seen if isinstance(event, StateChange)]
    assert [(c.before, c.wanted, c.actual, c.errno, c.by) for c in changes] == [
        (S.RUNNING, S.RUNNING_P2P, S.RUNNING_P2P, None, "set"),
        (S.RUNNING_P2P, S.STOP, S.RUNNING_P2P, errno.ETIMEDOUT, "set"),
        (S.RUNNING_P2P, S.RUNNING, S.RUNNING, None, "reset"),
    ]
    assert all(c.device == "dev0" and c.duration_ns >= 0 for c in changes)
    assert all(a.started_ns + a.duration_ns <= b.started_ns for a, b in pairwise(changes))


def test_queries_that_fail_name_device_and_errno(device: Device, ops: Ops) -> None:
    ops.errors = {"v2": errno.EIO, "state": errno.ENODEV, "size": errno.ENOTTY}
    assert device.stop_copy_length() is None
    for query, code in ((device.set_precopy_info_v2, errno.EIO), (device.state, errno.ENODEV)):
        with pytest.raises(errors.DeviceIOError, match="dev0") as caught:
            query()
        assert caught.value.errno == code
