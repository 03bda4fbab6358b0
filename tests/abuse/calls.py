"""System calls as a careless or hostile program makes them: any number, any pointer.

All return what the kernel did: the result, or minus the errno.
"""

import ctypes
import mmap
import os
import random

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p

PAGE = mmap.PAGESIZE
_ROOM = 64 * PAGE
# Behind the room nothing is mapped that a kernel writing too far could spoil unseen.
_DESERT = 1 << 28
_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x20, 0x4000
_DELETE_MODULE, _FINIT_MODULE = 176, 313  # arch/x86/entry/syscalls/syscall_64.tbl
# include/linux/errno.h: from here on they are the kernel's own, which no program may see.
_FIRST_INTERNAL_ERRNO = 512


class LeakedErrnoError(AssertionError):
    """The kernel answered with an errno that no program may see."""


def _result(value: int) -> int:
    if value != -1:
        return value
    number = ctypes.get_errno()
    if number >= _FIRST_INTERNAL_ERRNO:
        raise LeakedErrnoError(f"errno {number}")
    return -number


def ioctl(fd: int, request: int, pointer: int) -> int:
    return _result(_libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_void_p(pointer)))


def read(fd: int, pointer: int, size: int) -> int:
    return _result(_libc.read(fd, ctypes.c_void_p(pointer), ctypes.c_size_t(size)))


def write(fd: int, pointer: int, size: int) -> int:
    return _result(_libc.write(fd, ctypes.c_void_p(pointer), ctypes.c_size_t(size)))


def pread(fd: int, pointer: int, size: int, offset: int) -> int:
    at = ctypes.c_long(offset)
    return _result(_libc.pread(fd, ctypes.c_void_p(pointer), ctypes.c_size_t(size), at))


def pwrite(fd: int, pointer: int, size: int, offset: int) -> int:
    at = ctypes.c_long(offset)
    return _result(_libc.pwrite(fd, ctypes.c_void_p(pointer), ctypes.c_size_t(size), at))


def map_and_touch(fd: int, size: int, offset: int, *, write: bool) -> int:
    """Map a file and read its first page, which must not be more than there is; unmap it."""
    protection = _PROT_READ | (_PROT_WRITE if write else 0)
    at = _libc.mmap(None, ctypes.c_size_t(size), protection, 1, fd, ctypes.c_long(offset))
    if at in (None, ctypes.c_void_p(-1).value):
        return -ctypes.get_errno()
    ctypes.string_at(at, min(size, PAGE))
    if write:
        ctypes.memset(at, 0x5A, 8)
    _libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return 0


def delete_module(name: str) -> int:
    """Take a module out, without waiting for its users."""
    return _result(_libc.syscall(_DELETE_MODULE, name.encode(), os.O_NONBLOCK))


def load_module(file: str) -> int:
    fd = os.open(file, os.O_RDONLY)
    try:
        return _result(_libc.syscall(_FINIT_MODULE, fd, b"", 0))
    finally:
        os.close(fd)


class Memory:
    """Memory for one thread's calls, in front of a wide desert; and pointers that are no good."""

    def __init__(self) -> None:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        size = ctypes.c_size_t(_ROOM + _DESERT)
        self._base = int(_libc.mmap(None, size, _PROT_NONE, flags, -1, ctypes.c_long(0)))
        self._protect(self._base, _ROOM, _PROT_READ | _PROT_WRITE)
        # The first page can be read only, for answers that cannot be delivered.
        self._protect(self._base, PAGE, _PROT_READ)
        self._end = self._base + _ROOM

    def _protect(self, at: int, size: int, protection: int) -> None:
        if _libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(size), protection):
            raise OSError(ctypes.get_errno(), "mprotect")

    def good(self, data: bytes) -> int:
        """Return where data is, with room behind it: half of the room, or its end."""
        at = self._base + PAGE if len(data) < _ROOM // 2 else self._end - len(data)
        ctypes.memmove(at, data, len(data))
        return at

    def room(self, size: int) -> int:
        """Return an address with that many bytes behind it, 248 KiB at most."""
        return self._end - max(size, 1) if size > _ROOM // 2 else self._base + 2 * PAGE

    def cut(self, data: bytes, left: int) -> int:
        """Return an address at which only the first bytes of data can be accessed, left of them."""
        left = min(left, len(data))
        at = self._end - left
        ctypes.memmove(at, data[:left], left)
        return at

    def put(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def bytes_at(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def bad(self, chance: random.Random) -> int:
        """Return a pointer that is no good: nowhere, unreadable, unwritable, or the kernel's."""
        return chance.choice(
            (
                0,
                1,
                self._base,  # read only
                self._end,
                self._end - 3,
                0xDEAD0000,
                0x00007FFFFFFFF000,
                0x0000800000000000,
                0xFFFF888000001000,
                0xFFFFFFFF81000000,
                (1 << 64) - 8,
            )
        )
