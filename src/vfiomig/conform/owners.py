"""The group "owners": a second opening, and what a killed process leaves behind.

For the latter the device is closed here, and opened again by its name.
"""

from vfiomig.backends import open_device
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import Subject
from vfiomig.errors import DeviceBusyError, MigrationError
from vfiomig.uapi import DeviceState as S

GROUP = "owners"
_KILLING = "the device is closed, opened by a process that is killed, and then reset"
_OPEN = "drivers/vfio/group.c and device_cdev.c; state after open: all drivers, measured"


@rule(
    "second-open",
    group=GROUP,
    text="A device that is open cannot be opened by its name a second time, and is not disturbed.",
    source="drivers/vfio/group.c: EBUSY; device_cdev.c: EINVAL",
    needs=[Need.NAME],
)
def _second_open(subject: Subject) -> None:
    before = subject.state()
    try:
        second = open_device(subject.device.opened_as)
    except DeviceBusyError as err:
        subject.saw(f"refused: {err}")
    except MigrationError as err:
        subject.note(f"refused, but not as busy: {err}")
    else:
        second.close()
        subject.deviates("it was opened twice")
    subject.log.done("opened it again by its name")
    actual = subject.state()
    subject.expect(actual is before, f"it was in {before.name}, and is in {actual.name}")


@rule(
    "killed-in-stop-copy",
    group=GROUP,
    text="When its owner is killed in STOP_COPY, the next one finds the device RUNNING.",
    source=_OPEN,
    needs=[Need.NAME],
    losing=_KILLING,
)
def _killed_in_stop_copy(subject: Subject) -> None:
    _kill_owner(subject, S.STOP_COPY)


@rule(
    "killed-in-resuming",
    group=GROUP,
    text="When its owner is killed in RESUMING, the next one finds the device RUNNING.",
    source=_OPEN,
    needs=[Need.NAME],
    losing=_KILLING,
)
def _killed_in_resuming(subject: Subject) -> None:
    _kill_owner(subject, S.RESUMING)


def _kill_owner(subject: Subject, state: S) -> None:
    device = subject.device
    subject.end_sessions()
    device.close()
    try:
        told = _own_and_kill(device.opened_as, state)
        subject.log.done(f"killed a process that had it in {state.name}")
    finally:
        subject.reopen(lambda: open_device(device.opened_as))
    if told != "ready":
        # Its words, and those of the driver.
        raise OSError(0, f"another process could not bring it to {state.name}: {told}")
    found = subject.state()
    # Not by SET: leaving a RESUMING that is left over oopses mtty's kernel.
    if found is S.RUNNING:
        subject.saw("the next opening finds it RUNNING")
    else:
        subject.note(f"the next opening finds it in {found.name}, as it was left")
    subject.reset()
    actual = subject.state()
    subject.expect(actual is S.RUNNING, f"after a reset it is in {actual.name}")


def _own_and_kill(name: str, state: S) -> str:
    """Let another process bring the device to a state, and kill it. Returns what it said last."""
    import subprocess
    import sys

    words = [sys.executable, "-m", "vfiomig.conform.owner", name, state.name]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as owner:
        try:
            assert owner.stdout is not None
            said = owner.stdout.readline().decode(errors="replace").strip()
            if said != "ready":
                rest = owner.stdout.read().decode(errors="replace").strip()
                said = (rest or said).splitlines()[-1] if rest or said else "it said nothing"
        finally:
            owner.kill()
    return said
