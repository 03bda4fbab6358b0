"""The group "reset": VFIO_DEVICE_RESET, the way out of every state."""

import errno

from vfiomig.conform.findings import errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.streams import CHUNK_BYTES
from vfiomig.conform.subject import Subject
from vfiomig.ioctl import get_device_info
from vfiomig.uapi import DeviceInfoFlag
from vfiomig.uapi import DeviceState as S

GROUP = "reset"
_RESETTING = "a reset loses the device's state"
_RESET = 'linux/vfio.h, "any -> ERROR": "VFIO_DEVICE_RESET must be used"; RESUMING: "must be reset"'


@rule(
    "reset-runs",
    group=GROUP,
    text="A reset makes the device RUNNING, whatever state it is in.",
    source=_RESET,
    losing=_RESETTING,
)
def _reset_runs(subject: Subject) -> None:
    for state in [*subject.states(), S.RESUMING]:
        _begin(subject, state)
        subject.reset()
        actual = subject.state()
        # After a reset that was none, nothing else that is asked here says anything.
        if not subject.expect(actual is S.RUNNING, f"in {state.name}: then {actual.name}"):
            return
    subject.saw(f"RUNNING from {len(subject.states()) + 1} states")


@rule(
    "reset-ends-session",
    group=GROUP,
    text="A reset ends the session: its data_fd is ENODEV, whatever was left to read or write.",
    source="drivers/vfio/pci/*, *_disable_fd() at the reset; measured",
    losing=_RESETTING,
)
def _reset_ends_session(subject: Subject) -> None:
    for state in [*subject.saving_states(), S.RESUMING]:
        _begin(subject, state)
        if (session := subject.session) is None:
            raise OSError(errno.EBADF, f"{state.name} was entered without a data_fd")
        subject.reset()
        found = session.write_error() if state is S.RESUMING else session.read_error()
        alive = found == 0 if state is S.RESUMING else found is None
        what = f"the data_fd of {state.name}"
        if not subject.expect(not alive, f"{what} still moves bytes"):
            continue
        if found != errno.ENODEV:
            subject.note(f"{what}: {errno_name(found or 0)}, not ENODEV")
        else:
            subject.saw(f"{what}: ENODEV")


def _begin(subject: Subject, state: S) -> None:
    """Go to a state and leave its session in the middle."""
    kept = subject.own_state()
    subject.home()
    session = subject.go(state)
    if session is None:
        return
    session.at_end = True  # it is not brought to its end
    if state is S.RESUMING and kept.size_bytes > 1:
        session.write(next(kept.pieces(end=min(kept.size_bytes // 2, CHUNK_BYTES))))


@rule(
    "new-session-after-reset",
    group=GROUP,
    text="After a reset in the middle of a load, the device can be saved and loaded.",
    source=_RESET,
    losing=_RESETTING,
)
def _new_session_after_reset(subject: Subject) -> None:
    kept = subject.own_state()
    _begin(subject, S.RESUMING)
    subject.reset()
    subject.set(S.STOP)
    size_bytes, _ = subject.digest()
    subject.set(S.RUNNING)
    subject.load(kept.pieces())
    subject.set(S.STOP)
    same = subject.digest() == (kept.size_bytes, kept.digest)
    subject.expect(same, "what was loaded then is not what is saved")
    subject.saw(f"{size_bytes} bytes saved, {kept.size_bytes} loaded")


@rule(
    "reset-flag",
    group=GROUP,
    text="VFIO_DEVICE_GET_INFO says that the device can be reset, as a device with migration must.",
    source='linux/vfio.h, VFIO_DEVICE_FLAGS_RESET: "Device supports reset"',
    needs=[Need.KERNEL],
    losing=_RESETTING,
)
def _reset_flag(subject: Subject) -> None:
    subject.log.begin("VFIO_DEVICE_GET_INFO")
    flags, _, _ = get_device_info(subject.device_fd)
    subject.log.done("VFIO_DEVICE_GET_INFO")
    subject.reset()
    shown = bool(flags & DeviceInfoFlag.RESET)
    if subject.expect(shown, f"a reset works, and flags {flags:#x} do not have RESET"):
        subject.saw(f"flags {flags:#x}")
