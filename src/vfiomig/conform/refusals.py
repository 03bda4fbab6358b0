"""The group "refusals": requests that the state machine has no way for.

They are destructive, because of one driver: xe stops its VF at any refused target, and only a reset
helps (drivers/vfio/pci/xe/main.c). From ERROR nothing is asked: that makes the kernel WARN.
"""

import errno
from collections.abc import Sequence

from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import Subject
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

GROUP = "refusals"
_STOPPING = "a driver may stop the device at a refused request (xe), and then only a reset helps"
_NEXT_STATE = "drivers/vfio/vfio_main.c, vfio_mig_get_next_state()"


@rule(
    "refuse-error",
    group=GROUP,
    text="ERROR cannot be asked for: EINVAL, and nothing changes.",
    source='linux/vfio.h, "any -> ERROR"',
    losing=_STOPPING,
)
def _error(subject: Subject) -> None:
    _ask(subject, S.RUNNING, [S.ERROR])


@rule(
    "refuse-unknown-state",
    group=GROUP,
    text="A state that the header does not have is refused with EINVAL, and nothing changes.",
    source=_NEXT_STATE,
    losing=_STOPPING,
)
def _unknown(subject: Subject) -> None:
    _ask(subject, S.RUNNING, [S(8), S(0xFFFFFFFF)])


@rule(
    "refuse-unsupported-state",
    group=GROUP,
    text="A state that the capabilities do not have is refused with EINVAL, and nothing changes.",
    source='linux/vfio.h, "optional states cannot be used with SET_STATE"',
    losing=_STOPPING,
)
def _unsupported(subject: Subject) -> None:
    missing = []
    if not subject.capabilities & Capability.P2P:
        missing.append(S.RUNNING_P2P)
    if not subject.capabilities & Capability.PRE_COPY:
        missing.append(S.PRE_COPY)
    if missing:
        missing.append(S.PRE_COPY_P2P)
    if not missing:
        raise SkipRule("the device has every capability")
    _ask(subject, S.RUNNING, missing)


@rule(
    "refuse-stop-copy-to-pre-copy",
    group=GROUP,
    text="STOP_COPY -> PRE_COPY and PRE_COPY_P2P are refused with EINVAL, and nothing changes.",
    source='linux/vfio.h, STOP_COPY -> PRE_COPY: "not permitted and return error"',
    needs=[Need.PRE_COPY],
    losing=_STOPPING,
)
def _back_to_precopy(subject: Subject) -> None:
    targets = [S.PRE_COPY]
    if subject.capabilities & Capability.P2P:
        targets.append(S.PRE_COPY_P2P)
    _ask(subject, S.STOP_COPY, targets)


def _ask(subject: Subject, start: S, targets: Sequence[S]) -> None:
    for target in targets:
        subject.home()
        subject.go(start)
        subject.finish_session()
        what = f"SET {target.name} in {start.name}"
        if not subject.expect_error(subject.set_error(target), [errno.EINVAL], what):
            subject.put_back()
            continue
        actual = subject.state()
        subject.expect(actual is start, f"{what} was refused, and left it in {actual.name}")
        _expect_alive(subject, what)


def _expect_alive(subject: Subject, what: str) -> None:
    """Expect the device to go to STOP and back."""
    for target in (S.STOP, S.RUNNING):
        if found := subject.set_error(target):
            text = f"after {what} was refused, SET {target.name}: {errno_name(found)}"
            subject.deviates(f"{text}, until a reset")
            subject.put_back()
            return
