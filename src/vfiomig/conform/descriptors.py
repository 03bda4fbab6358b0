"""The group "data-fd": what the descriptor of a session can do besides read() and write()."""

import errno
import fcntl
import os
import resource
import select

from vfiomig.conform.findings import SkipRule, errno_name
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import Subject
from vfiomig.fd import OwnedFd
from vfiomig.uapi import DeviceState as S

GROUP = "data-fd"
_STREAM = 'linux/vfio.h: "migration data will flow over the FD using read() and write()"'
_LOADING = "RESUMING is left by a reset"


@rule(
    "close-on-exec",
    group=GROUP,
    text="The data_fd of a save is read-only, and closed by exec.",
    source="drivers/vfio/vfio_main.c, vfio_ioct_mig_return_fd(): O_CLOEXEC; linux/vfio.h",
)
def _close_on_exec(subject: Subject) -> None:
    for state in subject.saving_states():
        data_fd = subject.start(state).fileno()
        _expect_flags(subject, data_fd, os.O_RDONLY, state)
        subject.home()


@rule(
    "load-close-on-exec",
    group=GROUP,
    text="The data_fd of a load is write-only, and closed by exec.",
    source="drivers/vfio/vfio_main.c, vfio_ioct_mig_return_fd(): O_CLOEXEC; linux/vfio.h",
    losing=_LOADING,
)
def _load_close_on_exec(subject: Subject) -> None:
    with subject.put_back_afterwards():
        data_fd = subject.start(S.RESUMING).fileno()
        _expect_flags(subject, data_fd, os.O_WRONLY, S.RESUMING)


def _expect_flags(subject: Subject, data_fd: int, mode: int, state: S) -> None:
    names = {os.O_RDONLY: "read-only", os.O_WRONLY: "write-only", os.O_RDWR: "for both"}
    closed = fcntl.fcntl(data_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    found = fcntl.fcntl(data_fd, fcntl.F_GETFL) & os.O_ACCMODE
    subject.log.done(f"F_GETFD and F_GETFL of the data_fd of {state.name}")
    subject.expect(bool(closed), f"{state.name}: not O_CLOEXEC: a child keeps it open")
    if found != mode:
        subject.note(f"{state.name}: it is open {names.get(found, found)}")
    else:
        subject.saw(f"{state.name}: {names[mode]}, O_CLOEXEC")


@rule(
    "wrong-direction",
    group=GROUP,
    text="The data_fd of a save cannot be written to: EBADF or EINVAL.",
    source=f"{_STREAM}; write(2)",
)
def _wrong_direction(subject: Subject) -> None:
    session = subject.start(S.STOP_COPY)
    found = session.write_error()
    subject.expect_error(found, [errno.EBADF, errno.EINVAL], "a write")


@rule(
    "load-wrong-direction",
    group=GROUP,
    text="The data_fd of a load cannot be read from: EBADF or EINVAL.",
    source=f"{_STREAM}; read(2)",
    losing=_LOADING,
)
def _load_wrong_direction(subject: Subject) -> None:
    with subject.put_back_afterwards():
        found = subject.start(S.RESUMING).read_error()
        text = f"a read: {errno_name(found or 0) if found != 0 else 'end of file'}"
        if subject.expect(found is not None, "a read gave a byte"):
            subject.expect(found in (errno.EBADF, errno.EINVAL), text)
        subject.saw(text)


@rule(
    "no-seek",
    group=GROUP,
    text="A data_fd is a stream: lseek and pread are ESPIPE.",
    source="drivers/vfio/pci/*, stream_open() or no_llseek; measured",
    needs=[Need.KERNEL],
)
def _no_seek(subject: Subject) -> None:
    data_fd = subject.start(S.STOP_COPY).fileno()
    for what, found in {
        "lseek": _outcome(lambda: os.lseek(data_fd, 0, os.SEEK_SET)),
        "pread": _outcome(lambda: os.pread(data_fd, 1, 0)),
    }.items():
        subject.log.done(what)
        if found == 0:
            subject.deviates(f"{what} succeeds")
        elif found != errno.ESPIPE:
            subject.note(f"{what}: {errno_name(found)}, not ESPIPE")
        else:
            subject.saw(f"{what}: ESPIPE")


def _outcome(ask: object) -> int:
    assert callable(ask)
    try:
        ask()
    except OSError as err:
        return err.errno or errno.EIO
    return 0


@rule(
    "splice",
    group=GROUP,
    text="No driver lets its data_fd be spliced: EINVAL. One that does so saves a copy.",
    source="drivers/vfio/pci/*: no splice_read; measured",
    needs=[Need.KERNEL],
)
def _splice(subject: Subject) -> None:
    session = subject.start(S.STOP_COPY)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(read_fd), OwnedFd(write_fd):
        found = _outcome(lambda: os.splice(session.fileno(), write_fd, 4096))
    subject.log.done("splice of 4096 bytes into a pipe")
    if found == 0:
        subject.note("splice succeeds")
    else:
        subject.saw(f"splice: {errno_name(found)}")


@rule(
    "poll",
    group=GROUP,
    text="poll is worth something only where the driver has it; else it is always ready.",
    source='linux/vfio.h, struct vfio_precopy_info: "by using poll"; epoll_ctl(2)',
    needs=[Need.KERNEL],
)
def _poll(subject: Subject) -> None:
    state = S.PRE_COPY if S.PRE_COPY in subject.states() else S.STOP_COPY
    session = subject.start(state)
    with select.epoll() as epoll:
        found = _outcome(lambda: epoll.register(session.fileno(), select.EPOLLIN))
    look = select.poll()
    look.register(session.fileno(), select.POLLIN)
    events = dict(look.poll(0)).get(session.fileno(), 0)
    subject.log.done("epoll_ctl and poll")
    if found == errno.EPERM:
        subject.note(f"it has no poll: always ready (revents {events}), and epoll_ctl is EPERM")
    elif found:
        subject.deviates(f"epoll_ctl: {errno_name(found)}")
    else:
        subject.saw(f"it has poll: revents {events}")


@rule(
    "poll-at-the-end",
    group=GROUP,
    text="At the end of the stream in STOP_COPY, poll says that it can be read.",
    source='linux/vfio.h, struct vfio_precopy_info: "poll always returning readable"',
    needs=[Need.KERNEL],
)
def _poll_at_the_end(subject: Subject) -> None:
    session = subject.start(S.STOP_COPY)
    subject.finish_session()
    look = select.poll()
    look.register(session.fileno(), select.POLLIN)
    events = dict(look.poll(0)).get(session.fileno(), 0)
    subject.log.done("poll at the end")
    subject.expect(bool(events & select.POLLIN), f"revents {events} at the end")
    subject.saw(f"revents {events}")


@rule(
    "nonblock",
    group=GROUP,
    text="A read with O_NONBLOCK gives bytes, or EAGAIN where it would have to wait.",
    source="read(2); drivers/vfio/pci/mlx5/main.c, the only driver that looks at it",
    needs=[Need.KERNEL],
)
def _nonblock(subject: Subject) -> None:
    session = subject.start(S.STOP_COPY)
    os.set_blocking(session.fileno(), False)
    try:
        subject.saw(f"{len(session.read(4096))} bytes")
    except BlockingIOError:
        subject.saw("EAGAIN")
    finally:
        os.set_blocking(session.fileno(), True)


@rule(
    "no-descriptor-left",
    group=GROUP,
    text="With no descriptor free, a request that would give a data_fd is EMFILE or ENFILE.",
    source="drivers/vfio/vfio_main.c, vfio_ioct_mig_return_fd(): the device has moved by then",
    needs=[Need.KERNEL],
    losing="STOP_COPY is entered without a data_fd, and must be left with its data unread",
)
def _no_descriptor_left(subject: Subject) -> None:
    subject.go(S.STOP)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        # Not by set(): whatever opens a file between these lines fails, in all of the process.
        channel, found = subject.ops.set_device_state(S.STOP_COPY), 0
    except OSError as err:
        channel, found = None, err.errno or errno.EIO
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    subject.log.done("SET STOP_COPY with RLIMIT_NOFILE of 0")
    if channel is not None:
        channel.close()
        raise SkipRule("there was a descriptor free")
    state = subject.state()
    subject.expect_error(found, [errno.EMFILE, errno.ENFILE], "SET STOP_COPY")
    subject.expect(state in (S.STOP, S.STOP_COPY), f"it is in {state.name}")
    subject.saw(f"it is in {state.name}")
    if state is S.STOP_COPY and subject.set_error(S.STOP):
        subject.put_back()
