"""Shared fixtures: real descriptors, a child process, and a kernel that refuses one system call."""

import contextlib
import ctypes
import gc
import os
import platform
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from copying import only_threads, thread_ids
from vfiomig.fd import OwnedFd

# A machine that is busy with something else is no failure.
settings.register_profile("vfiomig", deadline=None)
settings.load_profile("vfiomig")

# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LD_W_ABS, JEQ, RET = 0x20, 0x15, 0x06
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h
SYSCALLS = {
    "x86_64": {"read": 0, "write": 1, "sendto": 44, "fsync": 74, "linkat": 265, "splice": 275}
    | {"clone": 56, "clone3": 435},
    "aarch64": {"read": 63, "write": 64, "sendto": 206, "fsync": 82, "linkat": 37, "splice": 76}
    | {"clone": 220, "clone3": 435},
}


def _refuse(syscall: str, fd: int, code: int) -> None:
    number = SYSCALLS[platform.machine()][syscall]
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in [
            (LD_W_ABS, 0, 0, 0),  # seccomp_data.nr
            (JEQ, 0, 3, number),
            (LD_W_ABS, 0, 0, 16),  # seccomp_data.args[0], low half
            (JEQ, 0, fd >= 0, fd & 0xFFFFFFFF),
            (RET, 0, 0, RET_ERRNO | code),
            (RET, 0, 0, RET_ALLOW),
        ]
    )
    steps = ctypes.create_string_buffer(program)
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


def _in_child(job: Callable[[], object]) -> None:
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs dies, and says so by its exit code
        try:
            job()
        except BaseException:  # noqa: BLE001  the parent only sees how the child ended
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _filled(content: bytes) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("content"))
    with open(fd.fileno(), "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd.fileno(), 0, os.SEEK_SET)
    return fd


def _open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor is closed
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.fixture(scope="session")
def refuse() -> Callable[[str, int, int], None]:
    """Let one system call on one descriptor fail: name, fd (-1: any), errno.

    For good, and for the threads that are started later: in a child only.
    """
    if platform.machine() not in SYSCALLS:
        pytest.skip(f"the filter does not know the system calls of {platform.machine()}")
    return _refuse


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], object]], None]:
    """Run a function in a forked child; an exception there fails the test."""
    return _in_child


@pytest.fixture(scope="session")
def filled() -> Callable[[bytes], OwnedFd]:
    """Return a memfd that holds some bytes, at its beginning; the caller closes it."""
    return _filled


@pytest.fixture(scope="session")
def open_fds() -> Callable[[], dict[int, str]]:
    """Return what descriptors are open, and what each is."""
    return _open_fds


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """No descriptor and no thread, Python's or not, is left of a test."""
    fds, threads = _open_fds(), thread_ids()
    yield
    gc.collect()  # what holds an exception holds its frames
    assert only_threads(threads)
    assert not _open_fds().items() - fds.items()


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """Run a function in a thread of the test's own, which has to end before the test does."""
    threads = []

    def start(job: Callable[[], object]) -> threading.Thread:
        threads.append(threading.Thread(target=job, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def alarms() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Call a function from a signal handler, every millisecond until the test ends."""
    old = signal.getsignal(signal.SIGALRM)

    def arm(action: Callable[[], object]) -> None:
        signal.signal(signal.SIGALRM, lambda *_: action())
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)

    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
