@cython.final
cdef class StreamReader:
    """Stream to device: one buffer; headers are checked and payload written from where they lie.

    What copy() does not know, peek() and take() give to Python. One thread at a time. Reads ahead:
    what lies behind the last frame may have been read. offset: bytes of the stream given out so
    far; frame_offset, frame_bytes, left_bytes: where the last frame of copy() began, how long its
    payload is, and how much of that is still to come. device_bytes: bytes written to a
    device; zero_bytes: those of them that the stream did not carry. sequence, chain: of the next
    frame. failed_fd: the descriptor whose call raised the last OSError, or -1. silence_ns: how long
    to wait for the next byte of a stream that may block, 0: for ever; then ETIMEDOUT. wake_fd may
    be set between two calls.
    """
    cdef unsigned char *buffer
    cdef size_t start, end
    cdef int in_fd
    cdef bint waits, ended, is_inside, is_zeros
    cdef uint64_t checksum
    cdef readonly size_t buffer_bytes
    cdef readonly uint64_t offset, frame_offset, frame_bytes, left_bytes, device_bytes, zero_bytes
    cdef readonly int failed_fd
    cdef public uint64_t sequence, chain, silence_ns
    cdef public int wake_fd

    def __cinit__(self, int in_fd, size_t buffer_bytes, *, int wake_fd=-1):
        if not PAGE <= buffer_bytes <= <size_t>1 << 40:
            raise ValueError(f"a buffer of {buffer_bytes} bytes")
        self.buffer = _buffer(buffer_bytes)
        if self.buffer == NULL:
            raise MemoryError()
        self.in_fd, self.wake_fd, self.buffer_bytes = in_fd, wake_fd, buffer_bytes
        self.waits, self.failed_fd = may_block(in_fd), -1

    def __dealloc__(self):
        _free_buffer(self.buffer, self.buffer_bytes)

    def peek(self, size_t count):
        """Return the next count bytes, at most buffer_bytes, without taking them.

        Fewer only at the end of the stream. Blocks. Raises OSError, ECANCELED when woken.
        """
        if count > self.buffer_bytes:
            raise ValueError(f"{count} bytes do not fit into a buffer of {self.buffer_bytes}")
        with nogil:
            count = self._have(count)
        return (<char *>self.buffer)[self.start:self.start + count]

    def take(self, size_t count):
        """Return the next count bytes, as peek(), and go on behind them."""
        data = self.peek(count)
        self._skip(len(data))
        return data

    def copy(
        self, int dst, Template template not None, uint64_t limit, Digest digest=None, *,
        uint64_t frames=0, uint64_t deadline_ns=0,
    ):
        """Write the payload of frames that look like template to dst; -1: to nowhere.

        At most limit bytes of it, and at most so many frames (0: any number). Returns
        LIMIT_REACHED: so many frames were copied.
        DEADLINE_REACHED: CLOCK_MONOTONIC, perhaps inside a frame; the next call goes on there.
        OTHER_FRAME: what comes next is no such frame, is longer than limit, or is cut.
        OTHER_TAIL: behind the payload comes something else than the template's tail.
        END_OF_STREAM: the stream ends inside a frame. DAMAGED: the checksum is not digest's.
        PADDING_DAMAGED: it is not zero.

        A write that fails or is interrupted is not repeated; a short one goes on. Raises OSError;
        ECANCELED between writes when woken. The digest counts what was written; the rest of the
        frame can be copied to nowhere.
        """
        cdef int outcome
        with nogil:
            outcome = self._copy(dst, template, limit, digest, frames, deadline_ns)
        return Outcome(outcome)

    cdef int _copy(
        self, int dst, Template template, uint64_t limit, Digest digest, uint64_t frames,
        uint64_t deadline_ns,
    ) except -1 nogil:
        cdef int outcome
        cdef uint64_t copied = 0
        cdef uint64_t most_bytes = self.device_bytes + limit
        while True:
            if not self.is_inside and not self._begin_frame(template, most_bytes):
                return OTHER_FRAME
            while self.left_bytes:
                if not self._move(dst, digest):
                    return END_OF_STREAM
                if deadline_ns and monotonic_ns() >= deadline_ns:
                    return DEADLINE_REACHED
            self.is_inside = False
            outcome = self._end_frame(template, digest)
            if outcome != LIMIT_REACHED:
                return outcome
            copied += 1
            if copied == frames:
                return LIMIT_REACHED

    cdef int _begin_frame(self, Template template, uint64_t most_bytes) except -1 nogil:
        """Take the head that comes next. Returns 0, and takes nothing, when it is another one."""
        cdef unsigned char[PAGE] expected
        cdef unsigned char *head
        cdef uint64_t length, chain
        if self._have(template.room) < <ssize_t>template.room:
            return 0
        head = self.buffer + self.start
        length = _load(head, template.length_at, template.big_endian)
        if length == 0 or length > most_bytes - self.device_bytes:
            return 0
        if template.largest_bytes and length > template.largest_bytes:
            return 0
        memcpy(expected, template.head, template.head_bytes)
        if template.zeros_kind >= 0 and head[template.kind_at] == template.zeros_kind:
            expected[template.kind_at] = head[template.kind_at]
        if template.continued:
            expected[template.flags_at] |= head[template.flags_at] & template.continued
        self.checksum = _load(head, template.checksum_at, template.big_endian)
        chain = _fill_head(template, expected, length, self.sequence, self.checksum, self.chain)
        if memcmp(head, expected, template.room):
            return 0
        self.is_zeros = (
            template.zeros_kind >= 0 and expected[template.kind_at] == template.zeros_kind
        )
        self.frame_offset = self.offset
        self.frame_bytes = self.left_bytes = length
        self.chain, self.is_inside = chain, True
        self.sequence += 1
        self._skip(template.room)
        return 1

    cdef int _move(self, int dst, Digest digest) except -1 nogil:
        """Write once, of the frame's payload. Returns 0 when the stream ends before it."""
        cdef size_t piece
        cdef ssize_t put
        cdef const unsigned char *data = ZEROS
        if self.is_zeros:
            piece = min(self.left_bytes, <uint64_t>sizeof(ZEROS))
        else:
            if self._have(1) == 0:
                return 0
            piece = min(self.left_bytes, <uint64_t>(self.end - self.start))
            data = self.buffer + self.start
        if _cancelled(self.wake_fd):
            self._fail(self.in_fd, ECANCELED)
        put = <ssize_t>piece if dst < 0 else write(dst, data, piece)
        if put <= 0:
            self._fail(dst, errno if put < 0 else EIO)
        if digest is not None:
            update_digest(digest.state, data, put)
        if self.is_zeros:
            self.zero_bytes += put
        else:
            self._skip(put)
        self.device_bytes += put
        self.left_bytes -= put
        return 1

    cdef int _end_frame(self, Template template, Digest digest) except -1 nogil:
        """Check what follows the payload. Returns LIMIT_REACHED when all is right."""
        cdef size_t padding = 0 if self.is_zeros else _padding(template, self.frame_bytes)
        cdef size_t index
        if template.checksum_at >= 0 and digest is not None:
            if XXH3_64bits_digest(digest.state) != self.checksum:
                return DAMAGED
        if self._have(padding) < <ssize_t>padding:
            return END_OF_STREAM
        for index in range(padding):
            if self.buffer[self.start + index]:
                return PADDING_DAMAGED
        self._skip(padding)
        if self._have(template.tail_bytes) < <ssize_t>template.tail_bytes:
            return OTHER_TAIL
        if memcmp(self.buffer + self.start, template.tail, template.tail_bytes):
            return OTHER_TAIL
        self._skip(template.tail_bytes)
        return LIMIT_REACHED

    cdef void _skip(self, size_t count) noexcept nogil:
        self.start += count
        self.offset += count

    cdef ssize_t _have(self, size_t count) except -1 nogil:
        """Read until count bytes are there, or the stream ends. Returns how many there are."""
        while self.end - self.start < count and not self.ended:
            self._fill()
        return min(count, self.end - self.start)

    cdef int _fill(self) except -1 nogil:
        """Read once, behind what is there."""
        cdef ssize_t got
        cdef int reason
        if self.start and (self.start == self.end or self.end == self.buffer_bytes):
            memmove(self.buffer, self.buffer + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        reason = 0
        if self.waits:
            reason = _wait(self.in_fd, POLLIN, self.wake_fd, self.silence_ns)
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

    cdef int _fail(self, int fd, int reason) except -1 nogil:
        self.failed_fd = fd
        with gil:
            raise OSError(reason, _strerror(reason))
