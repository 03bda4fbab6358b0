# cython: language_level=3, boundscheck=False, wraparound=False
"""Move bytes between descriptors with the GIL released: framed, checksummed, cancellable.

Knows descriptors, buffers, headers as opaque bytes, and XXH3. Knows nothing of VFIO. Nothing here
owns a descriptor but the private pipe of a splice.
"""
cimport cython
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.unistd cimport close, read, write

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    #include <endian.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <stdlib.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <time.h>
    #include <unistd.h>
    static int is_socket(int fd) {
        struct stat st;
        return fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
    }
    static int may_block(int fd) {
        struct stat st;
        return fstat(fd, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode);
    }
    static int is_blocking(int fd) {
        int flags = fcntl(fd, F_GETFL);
        return flags >= 0 && !(flags & O_NONBLOCK);
    }
    static uint64_t monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    ctypedef struct XXH3_state_t:
        pass
    XXH3_state_t *XXH3_createState() nogil
    int XXH3_freeState(XXH3_state_t *) nogil
    int XXH3_64bits_reset(XXH3_state_t *) nogil
    int XXH3_64bits_update(XXH3_state_t *, const void *, size_t) nogil
    uint64_t XXH3_64bits_digest(const XXH3_state_t *) nogil
    uint64_t XXH3_64bits(const void *, size_t) nogil
    uint64_t XXH3_64bits_withSeed(const void *, size_t, uint64_t) nogil
    uint64_t htobe64(uint64_t) nogil
    uint64_t htole64(uint64_t) nogil
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT
    int poll(pollfd *, unsigned long, int) nogil
    int ECANCELED, ENOMSG, MSG_NOSIGNAL, MSG_DONTWAIT, MSG_MORE
    int O_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ
    unsigned int SPLICE_F_MOVE
    ssize_t send(int, const void *, size_t, int) nogil
    ssize_t splice(int, void *, int, void *, size_t, unsigned int) nogil
    int pipe2(int *, int) nogil
    int fcntl(int, int, ...) nogil
    int posix_memalign(void **, size_t, size_t) nogil
    int is_socket(int) nogil
    int may_block(int) nogil
    int is_blocking(int) nogil
    uint64_t monotonic_ns() nogil

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

# O_DIRECT and the page cache want the payload on a page; linux/mm.h PAGE_SIZE on x86-64 and arm64.
cdef enum:
    PAGE = 4096
    HEAD_MAX = 128
    TAIL_MAX = 64

cdef unsigned char[65536] ZEROS
memset(ZEROS, 0, sizeof(ZEROS))

cpdef enum Outcome:
    END_OF_STREAM, DRAINED, LIMIT_REACHED, DEADLINE_REACHED


def xxh3_64(const unsigned char[::1] data not None, uint64_t seed=0):
    """Return XXH3-64 of data. Holds the GIL: for headers, not for payload."""
    if data.shape[0] == 0:
        return XXH3_64bits_withSeed(b"", 0, seed)
    return XXH3_64bits_withSeed(&data[0], data.shape[0], seed)


cdef unsigned char *_aligned(size_t size) except NULL:
    cdef void *memory = NULL
    if posix_memalign(&memory, PAGE, size):
        raise MemoryError()
    memset(memory, 0, size)  # prefault: first-touch faults do not belong into the copy
    return <unsigned char *>memory


@cython.final
cdef class Digest:
    """XXH3-64 over the bytes of one device, in order. Not for two threads at once."""
    cdef XXH3_state_t *state

    def __cinit__(self):
        self.state = XXH3_createState()
        if self.state == NULL:
            raise MemoryError()
        XXH3_64bits_reset(self.state)

    def __dealloc__(self):
        if self.state != NULL:
            XXH3_freeState(self.state)

    def update(self, const unsigned char[::1] data not None):
        """Add bytes."""
        if data.shape[0]:
            XXH3_64bits_update(self.state, &data[0], data.shape[0])

    @property
    def value(self):
        """The digest of all bytes so far."""
        return XXH3_64bits_digest(self.state)


@cython.final
cdef class Template:
    """What stands around each chunk: opaque bytes, and where the loop puts its numbers into them.

    head: bytes before the payload. tail: bytes after it. align: the payload starts that many bytes
    (rounded up) after the head, and is padded with zeros to a multiple of it. length_at: offset in
    head of the payload's length, 8 bytes; sequence_at: of the frame's number; checksum_at: of the
    running digest, or of the payload's own XXH3-64 in put_frame(); chain_at: of the XXH3-64 of
    head[:chain_at] seeded with the one before. kind_at, zeros_kind: byte to change when the whole
    chunk is zero and no payload follows. -1: the head has no such field.
    """
    cdef unsigned char[HEAD_MAX] head
    cdef unsigned char[TAIL_MAX] tail
    cdef size_t head_bytes, tail_bytes, align, room
    cdef int length_at, sequence_at, checksum_at, chain_at, kind_at, zeros_kind
    cdef bint big_endian

    def __init__(
        self, bytes head not None, bytes tail not None=b"", *, size_t align=1, int length_at,
        bint big_endian=False, int sequence_at=-1, int checksum_at=-1, int chain_at=-1,
        int kind_at=-1, int zeros_kind=-1,
    ):
        if not 0 < len(head) <= HEAD_MAX or len(tail) > TAIL_MAX or not 0 < align <= PAGE:
            raise ValueError("the template does not fit")
        for at in (length_at, sequence_at, checksum_at, chain_at):
            if at < -1 or at + 8 > len(head):
                raise ValueError(f"no room for a number at {at}")
        if kind_at >= len(head) or kind_at < -1:
            raise ValueError(f"no byte at {kind_at}")
        if not -1 <= zeros_kind <= 255 or zeros_kind >= 0 > kind_at:
            raise ValueError(f"no byte for the kind {zeros_kind}")
        memcpy(self.head, <char *>head, len(head))
        memcpy(self.tail, <char *>tail, len(tail))
        self.head_bytes, self.tail_bytes, self.align = len(head), len(tail), align
        self.room = (len(head) + align - 1) // align * align
        self.length_at, self.big_endian = length_at, big_endian
        self.sequence_at, self.checksum_at, self.chain_at = sequence_at, checksum_at, chain_at
        self.kind_at, self.zeros_kind = kind_at, zeros_kind


cdef int _cancelled(int wake_fd) noexcept nogil:
    cdef pollfd waiter
    if wake_fd < 0:
        return 0
    waiter.fd, waiter.events, waiter.revents = wake_fd, POLLIN, 0
    return poll(&waiter, 1, 0) > 0


cdef int _interrupted() except -1 nogil:
    with gil:
        PyErr_CheckSignals()  # PEP 475: run handlers, so that Ctrl-C stops a 100 GiB copy
    return 0


cdef int _wait(int fd, short events, int wake_fd) except -1 nogil:
    """Wait until fd is ready: 0, or ECANCELED once wake_fd is readable, or poll's errno."""
    cdef pollfd[2] waiters
    waiters[0].fd, waiters[0].events, waiters[0].revents = fd, events, 0
    waiters[1].fd, waiters[1].events, waiters[1].revents = wake_fd, POLLIN, 0
    while poll(waiters, 2, -1) < 0:
        if errno != EINTR:
            return errno
        _interrupted()
    return ECANCELED if waiters[1].revents else 0


def start_and_wait(thread, gate, abandoned, int done_fd, int wake_fd):
    """Start thread and wait until done_fd is readable. Returns the first exception, or None.

    The exception is what a Python signal handler raised meanwhile; the eventfd wake_fd is then
    written to, and the wait goes on. Handlers run at bytecodes of the main thread, whichever thread
    the kernel gave the signal to, and whatever is blocked: only code that is not Python is safe
    from them. The thread must first acquire gate, a held lock; if its start is interrupted,
    abandoned is appended to before gate is released, and what the handler raised is raised.
    """
    cdef pollfd waiter
    cdef uint64_t one = 1
    first = None
    try:
        thread.start()
    except BaseException:
        abandoned.append(True)
        gate.release()
        raise
    gate.release()
    waiter.fd, waiter.events, waiter.revents = done_fd, POLLIN, 0
    while not waiter.revents:
        with nogil:
            # A signal that another thread took does not wake us: look twenty times a second.
            poll(&waiter, 1, 50)
        try:
            PyErr_CheckSignals()
        except BaseException as err:
            if first is None:
                first = err
            if write(wake_fd, &one, sizeof(one)) < 0:
                pass  # full: it is readable already
    return first


@cython.final
cdef class FrameWriter:
    """Device to stream: reads chunks into one buffer, and writes each as a frame.

    One thread at a time. Counters may be read from any thread, and survive an exception: they say
    how far it got. failed_fd: the descriptor whose call raised the last OSError, or -1.
    """
    cdef unsigned char *memory
    cdef unsigned char *payload
    cdef int out_fd, wake_fd
    cdef bint to_socket
    cdef int[2] pipe_fds
    cdef size_t pipe_bytes
    cdef readonly size_t buffer_bytes
    cdef readonly uint64_t device_bytes, stream_bytes, frames, spliced_bytes
    cdef readonly int failed_fd
    cdef public uint64_t sequence, chain

    def __cinit__(self, int out_fd, size_t buffer_bytes, *, int wake_fd=-1):
        self.pipe_fds[0] = self.pipe_fds[1] = self.failed_fd = -1
        if not PAGE <= buffer_bytes <= <size_t>1 << 40:
            raise ValueError(f"a buffer of {buffer_bytes} bytes")
        # One page in front for the head, one behind for padding and tail: a frame is one write.
        self.memory = _aligned(PAGE + buffer_bytes + 2 * PAGE)
        self.payload = self.memory + PAGE
        self.out_fd, self.wake_fd, self.buffer_bytes = out_fd, wake_fd, buffer_bytes
        self.to_socket = is_socket(out_fd)

    def __dealloc__(self):
        free(self.memory)
        self._close_pipe()

    def close(self):
        """Close the pipe of a splice. The writer is not used afterwards."""
        self._close_pipe()

    def put(self, const unsigned char[::1] data not None):
        """Write data as it is. Blocks until it is taken. Raises OSError, ECANCELED when woken."""
        cdef const unsigned char *start
        if data.shape[0]:
            start = &data[0]
            with nogil:
                self._write_all(start, data.shape[0], 0)

    def put_frame(self, Template template not None, const unsigned char[::1] data not None):
        """Write data, at most buffer_bytes of it, as one frame of its own."""
        cdef size_t count = data.shape[0]
        if count > self.buffer_bytes:
            raise ValueError(f"{count} bytes do not fit into a buffer of {self.buffer_bytes}")
        if count:
            memcpy(self.payload, &data[0], count)
        with nogil:
            self._emit(template, count, XXH3_64bits(self.payload, count), False)

    def copy(
        self, int src, Template template not None, uint64_t limit, Digest digest=None, *,
        uint64_t deadline_ns=0, bint splicing=False,
    ):
        """Copy at most limit bytes from src, a frame for each read.

        Returns END_OF_STREAM (a read of 0), DRAINED (ENOMSG), LIMIT_REACHED, or DEADLINE_REACHED
        (CLOCK_MONOTONIC; 0: none). With splicing and no digest, splices until src or sink says
        EINVAL, then reads; never into a blocking socket. A read that is interrupted is an error
        and not repeated: some drivers have lost bytes by then. Raises OSError; ECANCELED between
        chunks once wake_fd is readable.
        """
        cdef int outcome
        cdef bint may_splice = splicing and digest is None and template.checksum_at < 0
        if self.to_socket and is_blocking(self.out_fd):
            may_splice = False  # splice has no MSG_DONTWAIT: a stalled peer would make it deaf
        if may_splice and self.pipe_bytes == 0:
            self._open_pipe()
        with nogil:
            outcome = self._copy(src, template, limit, digest, deadline_ns, may_splice)
        return Outcome(outcome)

    cdef int _copy(
        self, int src, Template template, uint64_t limit, Digest digest, uint64_t deadline_ns,
        bint may_splice,
    ) except -1 nogil:
        cdef ssize_t got
        cdef int reason
        cdef uint64_t checksum = 0
        cdef bint zeros
        while limit:
            if _cancelled(self.wake_fd):
                self._fail(src, ECANCELED)
            if may_splice and self.pipe_fds[0] >= 0:
                got = splice(
                    src, NULL, self.pipe_fds[1], NULL, min(limit, self.pipe_bytes), SPLICE_F_MOVE
                )
                if got < 0 and errno == EINVAL:  # every driver's data_fd: nothing was taken
                    self._close_pipe()
                    continue
            else:
                got = read(src, self.payload, min(limit, self.buffer_bytes))
            if got == 0:
                return END_OF_STREAM
            if got < 0:
                reason = errno
                if reason == ENOMSG:  # linux/vfio.h: pre-copy has no data now; not the end
                    return DRAINED
                if reason == EAGAIN:
                    reason = _wait(src, POLLIN, self.wake_fd)
                if reason:
                    self._fail(src, reason)
                continue
            if may_splice and self.pipe_fds[0] >= 0:
                self._emit_spliced(template, got)
            else:
                if digest is not None:
                    XXH3_64bits_update(digest.state, self.payload, got)
                    checksum = XXH3_64bits_digest(digest.state)
                zeros = template.zeros_kind >= 0 and self._all_zero(got)
                self._emit(template, got, checksum, zeros)
            self.device_bytes += got
            limit -= got
            if deadline_ns and monotonic_ns() >= deadline_ns:
                return DEADLINE_REACHED
        return LIMIT_REACHED

    cdef bint _all_zero(self, size_t count) noexcept nogil:
        # Equal to itself shifted by one, and the first byte zero: libc's vector speed.
        return self.payload[0] == 0 and memcmp(self.payload, self.payload + 1, count - 1) == 0

    cdef void _fill_head(
        self, Template template, unsigned char *head, uint64_t count, uint64_t checksum, bint zeros
    ) noexcept nogil:
        memcpy(head, template.head, template.head_bytes)
        memset(head + template.head_bytes, 0, template.room - template.head_bytes)
        if zeros:
            head[template.kind_at] = <unsigned char>template.zeros_kind
        _store(head, template.length_at, count, template.big_endian)
        _store(head, template.sequence_at, self.sequence, template.big_endian)
        _store(head, template.checksum_at, checksum, template.big_endian)
        self.sequence += 1
        if template.chain_at >= 0:
            self.chain = XXH3_64bits_withSeed(head, template.chain_at, self.chain)
            _store(head, template.chain_at, self.chain, template.big_endian)

    cdef int _emit(
        self, Template template, size_t count, uint64_t checksum, bint zeros
    ) except -1 nogil:
        cdef unsigned char *head = self.payload - template.room
        cdef size_t padding, total = template.room
        self._fill_head(template, head, count, checksum, zeros)
        if not zeros:
            padding = (template.align - count % template.align) % template.align
            memset(self.payload + count, 0, padding)
            memcpy(self.payload + count + padding, template.tail, template.tail_bytes)
            total += count + padding + template.tail_bytes
        self._write_all(head, total, 0)
        self.frames += 1
        return 0

    cdef int _emit_spliced(self, Template template, size_t count) except -1 nogil:
        cdef unsigned char *head = self.payload - template.room
        cdef size_t padding = (template.align - count % template.align) % template.align
        cdef size_t left = count
        cdef ssize_t put
        self._fill_head(template, head, count, 0, False)
        self._write_all(head, template.room, MSG_MORE)
        while left and self.pipe_fds[0] >= 0:
            put = splice(self.pipe_fds[0], NULL, self.out_fd, NULL, left, SPLICE_F_MOVE)
            if put > 0:
                left -= put
                self.stream_bytes += put
                self.spliced_bytes += put
            elif put < 0 and errno == EINVAL:  # a sink that cannot: an O_APPEND file
                self._empty_pipe(left)
                left = 0
            else:
                self._retry_sink(errno if put < 0 else EIO)
        self._write_all(ZEROS, padding, 0)
        self._write_all(template.tail, template.tail_bytes, 0)
        self.frames += 1
        return 0

    cdef int _empty_pipe(self, size_t left) except -1 nogil:
        cdef ssize_t got
        while left:
            got = read(self.pipe_fds[0], self.payload, min(left, self.buffer_bytes))
            if got <= 0:
                self._fail(self.pipe_fds[0], errno if got < 0 else EIO)
            self._write_all(self.payload, got, 0)
            left -= got
        self._close_pipe()
        return 0

    cdef int _write_all(self, const unsigned char *data, size_t count, int flags) except -1 nogil:
        cdef ssize_t put
        while count:
            if self.to_socket:
                put = send(self.out_fd, data, count, flags | MSG_NOSIGNAL | MSG_DONTWAIT)
            else:
                put = write(self.out_fd, data, count)
            if put <= 0:  # 0 would spin forever: treat it as an I/O error
                self._retry_sink(errno if put < 0 else EIO)
                continue
            data += put
            count -= put
            self.stream_bytes += put
        return 0

    cdef int _retry_sink(self, int reason) except -1 nogil:
        """Return when the failed write must be repeated; otherwise raise OSError."""
        if reason == EINTR:
            _interrupted()
            reason = ECANCELED if _cancelled(self.wake_fd) else 0
        elif reason == EAGAIN:
            reason = _wait(self.out_fd, POLLOUT, self.wake_fd)
        if reason:
            self._fail(self.out_fd, reason)
        return 0

    cdef int _fail(self, int fd, int reason) except -1 nogil:
        self.failed_fd = fd
        with gil:
            raise OSError(reason, _strerror(reason))

    cdef int _open_pipe(self) except -1:
        if pipe2(self.pipe_fds, O_CLOEXEC) < 0:
            raise OSError(errno, _strerror(errno))
        # Above /proc/sys/fs/pipe-max-size only root may: then the default of 64 KiB serves.
        fcntl(self.pipe_fds[1], F_SETPIPE_SZ, <int>min(self.buffer_bytes, <size_t>1 << 30))
        self.pipe_bytes = min(<size_t>fcntl(self.pipe_fds[1], F_GETPIPE_SZ), self.buffer_bytes)
        return 0

    cdef void _close_pipe(self) noexcept nogil:
        cdef int end
        for end in range(2):
            if self.pipe_fds[end] >= 0:
                close(self.pipe_fds[end])
                self.pipe_fds[end] = -1


cdef void _store(unsigned char *head, int at, uint64_t value, bint big_endian) noexcept nogil:
    if at >= 0:
        value = htobe64(value) if big_endian else htole64(value)
        memcpy(head + at, &value, 8)


def _strerror(int reason):
    import os
    return os.strerror(reason)


@cython.final
cdef class StreamReader:
    """Stream to device: one buffer, headers given to Python, payload written from where it lies.

    One thread at a time. Reads ahead: what lies behind the last frame may have been read. offset:
    bytes of the stream given out so far. device_bytes: bytes written to a device. failed_fd: the
    descriptor whose call raised the last OSError, or -1.
    """
    cdef unsigned char *buffer
    cdef size_t start, end
    cdef int in_fd, wake_fd
    cdef bint waits, ended
    cdef readonly size_t buffer_bytes
    cdef readonly uint64_t offset, device_bytes
    cdef readonly int failed_fd

    def __cinit__(self, int in_fd, size_t buffer_bytes, *, int wake_fd=-1):
        if not PAGE <= buffer_bytes <= <size_t>1 << 40:
            raise ValueError(f"a buffer of {buffer_bytes} bytes")
        self.buffer = _aligned(buffer_bytes)
        self.in_fd, self.wake_fd, self.buffer_bytes = in_fd, wake_fd, buffer_bytes
        self.waits, self.failed_fd = may_block(in_fd), -1

    def __dealloc__(self):
        free(self.buffer)

    def peek(self, size_t count):
        """Return the next count bytes, at most buffer_bytes, without taking them.

        Fewer only at the end of the stream. Blocks. Raises OSError, ECANCELED when woken.
        """
        if count > self.buffer_bytes:
            raise ValueError(f"{count} bytes do not fit into a buffer of {self.buffer_bytes}")
        with nogil:
            while self.end - self.start < count and not self.ended:
                self._fill()
        count = min(count, self.end - self.start)
        return (<char *>self.buffer)[self.start:self.start + count]

    def take(self, size_t count):
        """Return the next count bytes, as peek(), and go on behind them."""
        data = self.peek(count)
        self.start += len(data)
        self.offset += len(data)
        return data

    def forward(self, int dst, uint64_t count, Digest digest=None):
        """Write the next count bytes to dst; -1: to nowhere. Returns how many there were.

        Fewer only at the end of the stream. A write that fails or is interrupted is not repeated;
        a short one goes on. Raises OSError; ECANCELED between writes when woken. offset then stands
        at the piece that failed, which the digest does not count.
        """
        cdef uint64_t left = count
        cdef size_t piece
        with nogil:
            while left:
                if self.start == self.end:
                    self._fill()
                    if self.ended and self.start == self.end:
                        break
                piece = min(left, self.end - self.start)
                self._write_all(dst, self.buffer + self.start, piece)
                if digest is not None:
                    XXH3_64bits_update(digest.state, self.buffer + self.start, piece)
                self.start += piece
                self.offset += piece
                left -= piece
        return count - left

    def zeros(self, int dst, uint64_t count, Digest digest=None):
        """Write count zero bytes to dst (-1: nowhere), which the stream did not carry."""
        cdef size_t piece
        with nogil:
            while count:
                piece = min(count, sizeof(ZEROS))
                if digest is not None:
                    XXH3_64bits_update(digest.state, ZEROS, piece)
                self._write_all(dst, ZEROS, piece)
                count -= piece

    cdef int _fill(self) except -1 nogil:
        """Read once, behind what is there."""
        cdef ssize_t got
        cdef int reason
        if self.start and (self.start == self.end or self.end == self.buffer_bytes):
            memmove(self.buffer, self.buffer + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        reason = _wait(self.in_fd, POLLIN, self.wake_fd) if self.waits else 0
        if reason == 0 and _cancelled(self.wake_fd):
            reason = ECANCELED
        if reason:
            self._fail(self.in_fd, reason)
        got = read(self.in_fd, self.buffer + self.end, self.buffer_bytes - self.end)
        if got == 0:
            self.ended = True
        elif got > 0:
            self.end += got
        elif errno == EINTR:
            _interrupted()
        elif errno != EAGAIN:
            self._fail(self.in_fd, errno)
        return 0

    cdef int _write_all(self, int dst, const unsigned char *data, size_t count) except -1 nogil:
        cdef ssize_t put
        if _cancelled(self.wake_fd):
            self._fail(self.in_fd, ECANCELED)
        while count:
            put = <ssize_t>count if dst < 0 else write(dst, data, count)
            if put <= 0:
                self._fail(dst, errno if put < 0 else EIO)
            data += put
            count -= put
            self.device_bytes += put
        return 0

    cdef int _fail(self, int fd, int reason) except -1 nogil:
        self.failed_fd = fd
        with gil:
            raise OSError(reason, _strerror(reason))
