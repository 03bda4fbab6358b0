"""The group "pre-copy": what is read while the device runs, and VFIO_MIG_GET_PRECOPY_INFO."""

import errno
import struct
import time

from vfiomig import uapi
from vfiomig.conform import raw
from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.streams import CHUNK_BYTES, KeptState, Session
from vfiomig.conform.subject import Subject
from vfiomig.threads import start_thread
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

GROUP = "pre-copy"
_INFO = "linux/vfio.h, struct vfio_precopy_info"
# Estimates, but of something: an errno that was cast is more than this.
_NO_SIZE_BYTES = 1 << 62
# Ours: a device that changes its state faster than it is read is never drained.
_PATIENCE_NS = 3_000_000_000
_GARBAGE = 0xDEADBEEF
_ASKED_TIMES = 4


def _drained(subject: Subject, session: Session) -> tuple[int, int | None]:
    """Read until nothing comes. Returns bytes and errno (0: end of file), None: it never ended."""
    ends_ns, size_bytes = time.monotonic_ns() + _PATIENCE_NS, 0
    while size_bytes < subject.max_state_bytes and time.monotonic_ns() < ends_ns:
        try:
            data = session.read()
        except OSError as err:
            if err.errno != errno.ENOMSG:
                raise
            return size_bytes, err.errno
        if not data:
            return size_bytes, 0
        size_bytes += len(data)
    return size_bytes, None


@rule(
    "info-in-pre-copy",
    group=GROUP,
    text="VFIO_MIG_GET_PRECOPY_INFO answers with sizes in the PRE_COPY states; some are initial.",
    source=f'{_INFO}: "mandatory"; "should have a non-zero initial value"',
    needs=[Need.PRE_COPY],
)
def _info_in_precopy(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    info = session.precopy_info()
    subject.saw(f"initial {info.initial_bytes}, dirty {info.dirty_bytes} bytes in PRE_COPY")
    most = max(info.initial_bytes, info.dirty_bytes)
    subject.expect(most < _NO_SIZE_BYTES, f"it says {most} bytes, which no state has")
    if not info.initial_bytes:
        subject.note("initial_bytes is 0 from the start")
    if subject.capabilities & Capability.P2P:
        subject.set(S.PRE_COPY_P2P)
        info = session.precopy_info()
        subject.saw(f"initial {info.initial_bytes}, dirty {info.dirty_bytes} in PRE_COPY_P2P")


@rule(
    "initial-bytes-fall",
    group=GROUP,
    text="initial_bytes falls to 0 as the data is read.",
    source=f'{_INFO}: "decrease as migration data is read from the device"',
    needs=[Need.PRE_COPY],
)
def _initial_bytes_fall(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    first = session.precopy_info().initial_bytes
    size_bytes, error = _drained(subject, session)
    last = session.precopy_info().initial_bytes
    what = f"initial_bytes is {first}, and {last} after {size_bytes} bytes were read"
    if error is None:
        raise SkipRule(f"there was always more to read; {what}")
    subject.expect(last < first or not last, what)
    if 0 < last < first:
        subject.note(what)
    subject.saw(f"from {first} to {last}, {size_bytes} bytes read")


@rule(
    "drained-enomsg",
    group=GROUP,
    text="In PRE_COPY a read says ENOMSG when there is nothing now, and not 0.",
    source=f'{_INFO}: "should return ENOMSG from read()"',
    needs=[Need.PRE_COPY],
)
def _drained_enomsg(subject: Subject) -> None:
    size_bytes, error = _drained(subject, subject.start(S.PRE_COPY))
    if error is None:
        raise SkipRule(f"there was always more to read: {size_bytes} bytes")
    if error == 0:
        subject.note(f"a read gave 0 after {size_bytes} bytes: it looks like the end, and is not")
    else:
        subject.saw(f"ENOMSG after {size_bytes} bytes")


@rule(
    "info-refused-in-stop-copy",
    group=GROUP,
    text="VFIO_MIG_GET_PRECOPY_INFO is EINVAL in STOP_COPY.",
    source=f'{_INFO}: "should return -EINVAL from any other migration state"',
    needs=[Need.PRE_COPY],
)
def _info_in_stop_copy(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    subject.set(S.STOP_COPY)
    _expect_refused(subject, session, "after PRE_COPY", [errno.EINVAL])
    subject.home()
    session = subject.start(S.STOP_COPY)
    _expect_refused(subject, session, "without PRE_COPY before", [errno.EINVAL])


@rule(
    "info-refused-afterwards",
    group=GROUP,
    text="VFIO_MIG_GET_PRECOPY_INFO is ENODEV or EINVAL when the session has ended.",
    source=f"{_INFO}; the errno: all drivers, measured",
    needs=[Need.PRE_COPY],
)
def _info_afterwards(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    subject.home()
    _expect_refused(subject, session, "in RUNNING", [errno.ENODEV, errno.EINVAL])


@rule(
    "info-on-load-fd",
    group=GROUP,
    text="VFIO_MIG_GET_PRECOPY_INFO on the data_fd of a load is refused.",
    source=f'{_INFO}: "valid only in PRE_COPY states"; ENOTTY: measured',
    needs=[Need.PRE_COPY],
    losing="RESUMING is left by a reset",
)
def _info_on_load_fd(subject: Subject) -> None:
    with subject.put_back_afterwards():
        session = subject.start(S.RESUMING)
        _expect_refused(subject, session, "in RESUMING", [errno.ENOTTY, errno.EINVAL])


def _expect_refused(subject: Subject, session: Session, where: str, usual: list[int]) -> None:
    found = session.info_error()
    subject.log.done(f"VFIO_MIG_GET_PRECOPY_INFO {where}: {errno_name(found)}")
    if not subject.expect(found != 0, f"it answers {where}"):
        return
    if found in usual:
        subject.saw(f"{where}: {errno_name(found)}")
    else:
        subject.note(f"{where}: {errno_name(found)}, not {' or '.join(map(errno_name, usual))}")


@rule(
    "info-argsz",
    group=GROUP,
    text="VFIO_MIG_GET_PRECOPY_INFO with an argsz below 24 is EINVAL, at a bad address EFAULT.",
    source=_INFO,
    needs=[Need.PRE_COPY, Need.KERNEL],
)
def _info_argsz(subject: Subject) -> None:
    data_fd = subject.start(S.PRE_COPY).fileno()
    for argsz in (0, 8, 23):
        arg = bytearray(uapi.PRECOPY_INFO.pack(argsz, 0, 0, 0))
        found = raw.ioctl_error(data_fd, uapi.VFIO_MIG_GET_PRECOPY_INFO, arg)
        subject.expect_error(found, [errno.EINVAL], f"argsz {argsz}")
    found = raw.ioctl_error(data_fd, uapi.VFIO_MIG_GET_PRECOPY_INFO, raw.BAD_ADDRESS)
    subject.expect_error(found, [errno.EFAULT], "a bad address")


@rule(
    "data-fd-ioctls",
    group=GROUP,
    text="A data_fd knows no other ioctl, and the device_fd not this one: ENOTTY.",
    source="ioctl(2); measured",
    needs=[Need.PRE_COPY, Need.KERNEL],
)
def _data_fd_ioctls(subject: Subject) -> None:
    data_fd = subject.start(S.PRE_COPY).fileno()
    arg = bytearray(
        uapi.FEATURE.pack(16, uapi.Feature.GET | uapi.Feature.MIG_DEVICE_STATE) + bytes(8)
    )
    found = raw.ioctl_error(data_fd, uapi.VFIO_DEVICE_FEATURE, arg)
    subject.expect_error(found, [errno.ENOTTY], "VFIO_DEVICE_FEATURE on the data_fd")
    arg = bytearray(uapi.PRECOPY_INFO.pack(24, 0, 0, 0))
    found = raw.ioctl_error(subject.device_fd, uapi.VFIO_MIG_GET_PRECOPY_INFO, arg)
    subject.expect_error(found, [errno.ENOTTY], "VFIO_MIG_GET_PRECOPY_INFO on the device_fd")


@rule(
    "reinit-not-unasked",
    group=GROUP,
    text="Without the opt-in the flags of the pre-copy information come back as they went in.",
    source="linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 (Linux 7.1); measured",
    needs=[Need.PRE_COPY],
)
def _reinit_not_unasked(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    for _ in range(_ASKED_TIMES):
        subject.expect(not session.precopy_info().reinit, "REINIT without the opt-in")
        _drained(subject, session)
    subject.saw(f"asked {_ASKED_TIMES} times")
    if subject.device_fd != -1:
        flags = _flags_of(session, _GARBAGE)
        subject.saw(f"flags {_GARBAGE:#x} came back as {flags:#x}")
        if flags not in (_GARBAGE, 0):
            subject.deviates(f"flags {_GARBAGE:#x} came back as {flags:#x}")


@rule(
    "precopy-info-v2",
    group=GROUP,
    text="After the opt-in the flags of the pre-copy information are the driver's: 0 or REINIT.",
    source="linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 (Linux 7.1)",
    needs=[Need.PRE_COPY, Need.KERNEL],
    losing="the opt-in lasts until the last close of the device",
)
def _precopy_info_v2(subject: Subject) -> None:
    if not subject.ops.set_precopy_info_v2():
        raise SkipRule("the kernel has no MIG_PRECOPY_INFOv2 (Linux 7.1)")
    flags = _flags_of(subject.start(S.PRE_COPY), _GARBAGE)
    known = flags & ~uapi.VFIO_PRECOPY_INFO_REINIT == 0
    subject.expect(known, f"flags {_GARBAGE:#x} came back as {flags:#x}")
    subject.saw(f"flags {flags:#x}")


def _flags_of(session: Session, flags: int) -> int:
    arg = bytearray(uapi.PRECOPY_INFO.pack(uapi.PRECOPY_INFO.size, flags, 0, 0))
    error = raw.ioctl_error(session.fileno(), uapi.VFIO_MIG_GET_PRECOPY_INFO, arg)
    if error:
        raise OSError(error, "VFIO_MIG_GET_PRECOPY_INFO")
    found: int = struct.unpack_from("=I", arg, 4)[0]
    return found


@rule(
    "read-across-the-switch",
    group=GROUP,
    text="A read that began before STOP_COPY may give 0; one that began later, only at the end.",
    source='linux/vfio.h, "permanent end of stream"; drivers/vfio/pci/mlx5/main.c',
    needs=[Need.PRE_COPY, Need.KERNEL],
)
def _read_across_the_switch(subject: Subject) -> None:
    session = subject.start(S.PRE_COPY)
    _drained(subject, session)
    before: list[str] = []

    def read() -> None:
        try:
            before.append(f"{len(session.read(CHUNK_BYTES))} bytes")
        except OSError as err:
            before.append(errno_name(err.errno or 0))

    reader = start_thread(read, "vfiomig reader")
    try:
        subject.set(S.STOP_COPY)
    finally:
        reader.join()
    tally = session.read_all(subject.max_state_bytes)
    session.at_end = True
    subject.expect(not session.read(), "the end did not stay")
    if before == ["0 bytes"] and tally.size_bytes:
        subject.note("a read that began in PRE_COPY gave 0, and it was not the end")
    subject.saw(f"the early read gave {before[0]}, later ones {tally.size_bytes} bytes")


@rule(
    "pre-copy-stream-loads",
    group=GROUP,
    text="What is read in PRE_COPY and then in STOP_COPY is one stream, and loads.",
    source='linux/vfio.h, STOP -> RESUMING: "the data transfer output of a single FD"',
    needs=[Need.PRE_COPY],
    losing="a load takes the place of the device's state",
)
def _stream_loads(subject: Subject) -> None:
    subject.own_state()
    stream = KeptState()
    try:
        session = subject.start(S.PRE_COPY)
        early = session.read_all(subject.max_state_bytes, copy_fd=stream.fileno()).size_bytes
        subject.set(S.STOP_COPY)
        late = session.read_all(subject.max_state_bytes, copy_fd=stream.fileno()).size_bytes
        session.at_end = True
        stream.append(early + late, 0)
        subject.set(S.STOP)
        saved = subject.digest()
        subject.load(stream.pieces())
        subject.set(S.STOP)
        subject.expect(subject.digest() == saved, "the loaded state is another one")
        subject.saw(f"{early} and {late} bytes give the {saved[0]} bytes of the state")
    finally:
        stream.close()
