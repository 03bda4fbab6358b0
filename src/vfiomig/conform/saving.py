"""The group "save": the size that is told, and what is read in STOP_COPY."""

import errno

from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.streams import odd_sizes
from vfiomig.conform.subject import Subject
from vfiomig.uapi import DeviceState as S

GROUP = "save"
_SIZE = "linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE"
_END = 'linux/vfio.h, struct vfio_precopy_info: "permanent end of stream"'
# What xe lets through for an errno: no state has so many bytes (vfio_pci_core.c has no check).
_NO_SIZE_BYTES = 1 << 62
# Ours: enough to see that an end stays, little enough that nobody waits for it.
_READS_AFTER_THE_END = 3


@rule(
    "read-to-end",
    group=GROUP,
    text="In STOP_COPY the data_fd is read to an end, which is a read of 0 and never ENOMSG.",
    source=f'{_END}, "ENOMSG may not be returned in STOP_COPY"',
)
def _read_to_end(subject: Subject) -> None:
    tally = subject.start(S.STOP_COPY).read_all(subject.max_state_bytes)
    subject.expect(tally.error != errno.ENOMSG, f"ENOMSG after {tally.size_bytes} bytes")
    if not tally.size_bytes:
        subject.note("the state has 0 bytes")
    subject.saw(f"{tally.size_bytes} bytes, xxh3:{tally.digest:016x}")


@rule(
    "end-stays",
    group=GROUP,
    text="Once a read in STOP_COPY has given 0, each later read gives 0.",
    source=f'{_END}, "read() always returning 0"',
)
def _end_stays(subject: Subject) -> None:
    session = subject.start(S.STOP_COPY)
    tally = session.read_all(subject.max_state_bytes)
    for count in range(1, _READS_AFTER_THE_END + 1):
        more = session.read()
        text = f"read {count} behind the end, at byte {tally.size_bytes}, gave {len(more)} bytes"
        if not subject.expect(not more, text):
            session.read_all(subject.max_state_bytes)  # it may have been no end
            break
    else:
        subject.saw(f"{_READS_AFTER_THE_END} more reads gave 0")
    session.at_end = True


@rule(
    "save-twice",
    group=GROUP,
    text="A stopped device that is saved twice gives the same bytes.",
    source='linux/vfio.h, STOP: "must not change its internal state"',
)
def _save_twice(subject: Subject) -> None:
    subject.go(S.STOP)
    first, second = subject.digest(), subject.digest()
    sizes = f"{first[0]} and {second[0]} bytes"
    subject.expect(first == second, f"xxh3:{first[1]:016x} and xxh3:{second[1]:016x}, {sizes}")
    subject.saw(f"twice {first[0]} bytes" if first == second else sizes)


@rule(
    "any-read-size",
    group=GROUP,
    text="The same bytes come whatever the sizes of the reads.",
    source='linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: "preserve the byte order"',
)
def _any_read_size(subject: Subject) -> None:
    subject.go(S.STOP)
    size_bytes, digest = subject.digest()
    session = subject.start(S.STOP_COPY)
    tally = session.read_all(subject.max_state_bytes, sizes=odd_sizes())
    session.at_end = True
    same = (tally.size_bytes, tally.digest) == (size_bytes, digest)
    subject.expect(same, f"{tally.size_bytes} other bytes than the {size_bytes} of large reads")
    subject.saw(f"{size_bytes} bytes by reads of 1 byte, of 4093, and of 1 MiB")


@rule(
    "size-in-each-state",
    group=GROUP,
    text="The size of the state can be asked for in each state, and is a size.",
    source=f'{_SIZE}, "Can be called on each device state"',
)
def _size_in_each_state(subject: Subject) -> None:
    for state in subject.states():
        subject.home()
        subject.go(state)
        size_bytes = _size(subject)
        # A negative errno, cast: 2**64 - errno.
        what = f"in {state.name} it says {size_bytes} bytes"
        subject.expect(size_bytes < _NO_SIZE_BYTES, f"{what}, which no state has")
        subject.saw(f"{size_bytes} in {state.name}")


def _size(subject: Subject) -> int:
    subject.log.begin("GET of MIG_DATA_SIZE")
    try:
        size_bytes = subject.ops.get_data_size()
    except OSError as err:
        if err.errno == errno.ENOTTY:
            raise SkipRule("there is no MIG_DATA_SIZE (Linux 6.2)") from err
        raise
    subject.log.done("asked for MIG_DATA_SIZE")
    return size_bytes


@rule(
    "size-against-actual",
    group=GROUP,
    text="The size that is told in STOP is that of the state that is then read.",
    source=f'{_SIZE}, "the estimated data length"',
)
def _size_against_actual(subject: Subject) -> None:
    subject.go(S.STOP)
    told, (actual, _) = _size(subject), subject.digest()
    if told != actual:
        subject.note(f"it told {told} bytes and gave {actual}: an estimate")
    else:
        subject.saw(f"{actual} bytes, told and read")


@rule(
    "close-keeps-saving",
    group=GROUP,
    text="Closing the data_fd of a save changes no state, and asking again gives no new one.",
    source="drivers/vfio/vfio_main.c: the file of the session is not the device; measured",
)
def _close_keeps_saving(subject: Subject) -> None:
    for state in subject.saving_states():
        session = subject.start(state)
        subject.finish_session()
        session.close()
        subject.log.done("closed the data_fd")
        actual = subject.state()
        subject.expect(actual is state, f"closed in {state.name}, it is in {actual.name}")
        again = subject.set(state)
        subject.expect(again is None, f"SET {state.name} again gave a new data_fd")
        subject.session = None
        subject.set(S.RUNNING)
        subject.saw(f"closed in {state.name}, it stays there")


@rule(
    "session-begins-again",
    group=GROUP,
    text="After STOP a new session gives the whole state again, however much was read before.",
    source='linux/vfio.h, STOP -> STOP_COPY: "will return a new data_fd"',
    losing="xe answers EIO when STOP_COPY is left early, and only a reset helps",
)
def _session_begins_again(subject: Subject) -> None:
    subject.go(S.STOP)
    size_bytes, digest = subject.digest()
    session = subject.start(S.STOP_COPY)
    session.read(max(size_bytes // 2, 1))
    session.at_end = True  # what is left is not read
    if found := subject.set_error(S.STOP):
        state = subject.state().name
        subject.note(f"leaving STOP_COPY with data unread: {errno_name(found)}, it is in {state}")
        subject.put_back()
        return
    subject.expect((size_bytes, digest) == subject.digest(), "the new session gave other bytes")
    subject.saw(f"{size_bytes} bytes again")


@rule(
    "bad-read-buffer",
    group=GROUP,
    text="A read into memory that is not the caller's is EFAULT.",
    source="read(2)",
    needs=[Need.KERNEL],
    losing="a driver may take its session for dead afterwards",
)
def _bad_read_buffer(subject: Subject) -> None:
    import ctypes

    session = subject.start(S.STOP_COPY)
    read = ctypes.CDLL(None, use_errno=True).read
    count = read(session.fileno(), ctypes.c_void_p(8), ctypes.c_size_t(16))
    found = 0 if count >= 0 else ctypes.get_errno()
    subject.log.done("a read of 16 bytes to address 8")
    if count == 0:
        raise SkipRule("the state has 0 bytes")
    subject.expect_error(found, [errno.EFAULT], "a read to address 8")
    subject.put_back()
