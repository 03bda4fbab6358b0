"""The group "paths": every way through the state machine, and where it gives a data_fd."""

import errno
from collections.abc import Iterator
from functools import partial

from vfiomig import states
from vfiomig.conform.findings import errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import Subject
from vfiomig.uapi import DeviceState as S

GROUP = "paths"
_FSM = (
    "linux/vfio.h, enum vfio_device_mig_state; drivers/vfio/vfio_main.c, vfio_mig_get_next_state()"
)
_NEEDS = {
    S.STOP: [],
    S.RUNNING: [],
    S.STOP_COPY: [],
    S.RUNNING_P2P: [Need.P2P],
    S.PRE_COPY: [Need.PRE_COPY],
    S.PRE_COPY_P2P: [Need.P2P, Need.PRE_COPY],
}
_LOADING = "a load takes the place of the device's state"


def _pairs(subject: Subject) -> Iterator[tuple[S, S]]:
    """Yield start and target of every way that needs no load; the device is in start."""
    for target in subject.states():
        yield from ((start, target) for start in _starts(subject, target))


def _starts(subject: Subject, target: S) -> Iterator[S]:
    """Yield every state with a way to target, with the device in it."""
    for start in subject.states():
        if states.path(subject.capabilities, start, target) is not None:
            subject.home()
            subject.go(start)
            yield start


def _walk_to(target: S, subject: Subject) -> None:
    ways = 0
    for start in _starts(subject, target):
        subject.go(target)
        _expect_in(subject, start, target)
        ways += 1
    subject.saw(f"reached from {ways} states, each by one request")


def _expect_in(subject: Subject, start: S, target: S) -> None:
    actual = subject.state()
    text = f"SET {target.name} in {start.name} succeeded, and GET says {actual.name}"
    subject.expect(actual is target, text)


for _target, _needs in _NEEDS.items():
    rule(
        f"path-to-{_target.name.lower().replace('_', '-')}",
        group=GROUP,
        text=f"From every state with a way to {_target.name}, one request leads there.",
        source=_FSM,
        needs=_needs,
    )(partial(_walk_to, _target))


@rule(
    "path-to-resuming",
    group=GROUP,
    text="From every state with a way to RESUMING, one request leads there.",
    source=_FSM,
    losing=_LOADING,
)
def _to_resuming(subject: Subject) -> None:
    subject.own_state()
    _walk_to(S.RESUMING, subject)


@rule(
    "path-from-resuming",
    group=GROUP,
    text="From RESUMING, with a whole state loaded, one request leads to every other state.",
    source=_FSM,
    losing=_LOADING,
)
def _from_resuming(subject: Subject) -> None:
    subject.own_state()
    for target in subject.states():
        subject.home()
        subject.go(S.RESUMING)
        subject.go(target)
        _expect_in(subject, S.RESUMING, target)
    subject.saw(f"{len(subject.states())} states reached")


@rule(
    "data-fd-given",
    group=GROUP,
    text="A request that ends in a new saving session gives its data_fd.",
    source="linux/vfio.h, struct vfio_device_feature_mig_state",
)
def _data_fd_given(subject: Subject) -> None:
    _compare_sessions(subject, wanted=True)


@rule(
    "data-fd-not-given",
    group=GROUP,
    text="A request that starts no session gives a data_fd of -1.",
    source="linux/vfio.h, struct vfio_device_feature_mig_state",
)
def _data_fd_not_given(subject: Subject) -> None:
    _compare_sessions(subject, wanted=False)


def _compare_sessions(subject: Subject, *, wanted: bool) -> None:
    asked = 0
    for start, target in _pairs(subject):
        if _gives_session(subject, start, target) is not wanted:
            continue
        given = subject.go(target) is not None
        asked += 1
        what = f"{start.name} -> {target.name}"
        subject.expect(given is wanted, f"{what} gave {'a' if given else 'no'} data_fd")
    subject.saw(f"{asked} requests, {'each with' if wanted else 'none with'} a data_fd")


def _gives_session(subject: Subject, start: S, target: S) -> bool:
    steps = states.path(subject.capabilities, start, target) or ()
    if not steps:
        return False
    return states.starts_session((start, *steps)[-2], target)


@rule(
    "data-fd-goes-on",
    group=GROUP,
    text="Between the saving states one data_fd goes on; the last of it is read in STOP_COPY.",
    source='linux/vfio.h, "saving group" of enum vfio_device_mig_state',
    needs=[Need.PRE_COPY],
)
def _data_fd_goes_on(subject: Subject) -> None:
    ways = [S.PRE_COPY_P2P, S.PRE_COPY] if Need.P2P.is_met(subject) else []
    session = subject.start(S.PRE_COPY)
    for target in [*ways, S.STOP_COPY]:
        given = subject.set(target)
        subject.expect(given is None, f"{target.name} gave another data_fd")
    subject.log.begin("a read of the data_fd that PRE_COPY gave, in STOP_COPY")
    tally = session.read_all(subject.max_state_bytes)
    session.at_end = True
    subject.expect(not tally.error, f"it ended with {errno_name(tally.error)} in STOP_COPY")
    if not tally.size_bytes:
        subject.home()
        subject.go(S.STOP)
        size_bytes, _ = subject.digest()
        subject.expect(not size_bytes, f"it gave nothing, and a session of its own {size_bytes}")
    subject.saw(f"{tally.size_bytes} bytes through the data_fd that PRE_COPY gave")


@rule(
    "same-state",
    group=GROUP,
    text="A request for the state that the device is in succeeds, and gives no data_fd.",
    source="drivers/vfio/vfio_main.c, vfio_mig_get_next_state(); measured",
)
def _same_state(subject: Subject) -> None:
    for state in subject.states():
        subject.home()
        subject.go(state)
        first = subject.session
        again = subject.set(state)
        subject.expect(again is None, f"SET {state.name} in {state.name} gave a data_fd")
        _expect_in(subject, state, state)
        subject.session = first
    subject.saw(f"asked in {len(subject.states())} states")


@rule(
    "data-fd-dead-afterwards",
    group=GROUP,
    text="When the session has ended, its data_fd gives no bytes any more, but ENODEV.",
    source='linux/vfio.h, "will terminate a data transfer session"; the errno: measured',
)
def _dead_afterwards(subject: Subject) -> None:
    for state in subject.saving_states():
        session = subject.start(state)
        subject.home()
        _expect_dead(subject, session.read_error(), f"of {state.name}, in RUNNING")


def _expect_dead(subject: Subject, found: int | None, what: str) -> None:
    if subject.expect(found is not None, f"the data_fd {what}: it still gives bytes"):
        if found != errno.ENODEV:
            subject.note(f"the data_fd {what}: {errno_name(found or 0)}, not ENODEV")
        else:
            subject.saw(f"the data_fd {what}: ENODEV")


@rule(
    "load-fd-dead-afterwards",
    group=GROUP,
    text="When a load has been committed, its data_fd takes no bytes any more, but gives ENODEV.",
    source='linux/vfio.h, RESUMING -> STOP: "terminates a data transfer session"; measured',
    losing=_LOADING,
)
def _load_fd_dead_afterwards(subject: Subject) -> None:
    subject.own_state()
    session = subject.start(S.RESUMING)
    subject.go(S.STOP)
    found = session.write_error()
    if subject.expect(found != 0, "it took a byte in STOP") and found != errno.ENODEV:
        subject.note(f"a write in STOP: {errno_name(found)}, not ENODEV")
    subject.saw(f"a write in STOP: {errno_name(found)}")
