cdef enum:
    # Below it a second thread costs more than it brings (starting one, and its slots' first touch).
    THREADED_FROM_BYTES = 4194304
    # With buffers that grew, as many slots as constant memory allows: 12 MiB of 4 MiB each.
    GROWN_SLOTS = 3
    # How far ahead of its end a file is made longer.
    AHEAD_BYTES = 67108864


@cython.final
cdef class FrameWriter:
    """Device to stream: reads chunks, and writes each as a frame, or as some where runs are zero.

    ring_slots: how many buffers; with more than one, a thread of our own writes what copy() reads,
    once 4 MiB have passed; not where out_fd is a pipe or a device that blocks, and to a file only
    if most reads so far waited in the kernel. writers: that many such threads, each with pwrite()
    at its own place of a file (for O_DIRECT; where it is refused, the page cache serves). The file
    is made longer ahead of them; its offset is where they left off, and there it is to be cut.
    grown_bytes: 0, or the size to which buffers grow when the first reads show that a read has a
    high fixed cost. leave_holes: out_fd is a new file, where zeros that travel as payload may stay
    unwritten, but for the last bytes of all. turns: out_fd is shared with other writers; positional
    writes and splicing cannot be.

    One thread at a time. Counters may be read from any thread, and survive an exception: they say
    how far it got. bytes_per_s may be set from any thread: 0, or the most to write in a second.
    failed_fd: the descriptor whose call raised the last OSError, or -1.
    """
    cdef Ring ring
    cdef int writers, owner_pid
    cdef bint leave_holes, is_settled, to_page_cache
    cdef size_t grown_bytes
    cdef Probe probe
    cdef Pace pace
    cdef Numbers numbers
    cdef int[2] pipe_fds
    cdef Turns turns
    cdef size_t pipe_bytes
    cdef readonly size_t buffer_bytes
    cdef readonly uint64_t device_bytes, frames, zero_bytes, spliced_bytes
    cdef readonly int failed_fd
    cdef public uint64_t bytes_per_s

    def __cinit__(
        self, int out_fd, size_t buffer_bytes, *, int wake_fd=-1, int ring_slots=1, int writers=1,
        size_t grown_bytes=0, bint leave_holes=False, Turns turns=None,
    ):
        self.pipe_fds[0] = self.pipe_fds[1] = self.failed_fd = self.ring.stop_fd = -1
        if not PAGE <= buffer_bytes <= <size_t>1 << 40:
            raise ValueError(f"a buffer of {buffer_bytes} bytes")
        if not 1 <= ring_slots <= 1024 or not 1 <= writers <= max(ring_slots - 1, 1):
            raise ValueError(f"{writers} writers and {ring_slots} slots")
        self.ring.slots = <Slot *>calloc(ring_slots, sizeof(Slot))
        self.ring.threads = <pthread_t *>calloc(writers, sizeof(pthread_t))
        if self.ring.slots == NULL or self.ring.threads == NULL:
            raise MemoryError()
        if _give_memory(&self.ring, 1, buffer_bytes):
            raise MemoryError()
        self.ring.depth, self.ring.out_fd, self.ring.wake_fd = ring_slots, out_fd, wake_fd
        self.ring.to_socket, self.ring.direct = is_socket(out_fd), is_direct(out_fd)
        if not self.ring.to_socket and may_block(out_fd) and is_blocking(out_fd):
            self.ring.depth = 1  # nothing could end a thread that waits there
        self.ring.positional = writers > 1
        if turns is not None:
            if writers > 1:
                raise ValueError("positional writes need no turns")
            self.turns, self.ring.turn = turns, &turns.turn
        self.to_page_cache = not (self.ring.to_socket or may_block(out_fd) or self.ring.direct)
        if self.ring.positional:
            self.ring.offset = self.ring.allocated = lseek(out_fd, 0, SEEK_CUR)
        self.writers, self.leave_holes, self.buffer_bytes = writers, leave_holes, buffer_bytes
        self.grown_bytes, self.owner_pid = grown_bytes, getpid()
        if grown_bytes <= buffer_bytes:
            self.probe.timed = TIMED_READS

    def __dealloc__(self):
        self._stop()
        _take_memory(&self.ring)
        free(self.ring.slots)
        free(self.ring.threads)
        self._close_pipe()

    @property
    def sequence(self):
        """The number of the next frame."""
        return self.numbers.sequence

    @sequence.setter
    def sequence(self, uint64_t value):
        self.numbers.sequence = value

    @property
    def chain(self):
        """What the next frame's chain is seeded with."""
        return self.numbers.chain

    @chain.setter
    def chain(self, uint64_t value):
        self.numbers.chain = value

    @property
    def stream_bytes(self):
        """Bytes written so far, holes included."""
        return self.ring.stream_bytes

    @property
    def direct_bytes(self):
        """Of stream_bytes, those written past the page cache (O_DIRECT)."""
        return self.ring.direct_bytes

    def close(self):
        """Stop the threads, whatever is still to be written. The writer is not used afterwards."""
        with nogil:
            self._stop()
        self._close_pipe()

    cdef void _stop(self) noexcept nogil:
        if self.owner_pid == getpid():
            _stop_threads(&self.ring)
        else:  # threads do not survive a fork, and the eventfd is still the parent's
            self.ring.threads_running = 0

    def flush(self):
        """Wait until all that was read is written. Raises OSError, ECANCELED when woken."""
        self._guarded(-1, None, 0, None, 0, False)

    def put(self, const unsigned char[::1] data not None):
        """Write data as it is. Blocks until it is taken. Raises OSError, ECANCELED when woken."""
        cdef size_t at = 0, piece, count = data.shape[0]
        cdef Slot *slot = &self.ring.slots[0]
        self.flush()
        while at < count:
            piece = min(count - at, self.buffer_bytes)
            memcpy(slot.memory + PAGE, &data[at], piece)
            slot.count = 0
            _add_piece(slot, slot.memory + PAGE, piece)
            with nogil:
                self._write_now(slot)
            at += piece

    def put_frame(self, Template template not None, const unsigned char[::1] data not None):
        """Write data, at most buffer_bytes of it, as one frame of its own."""
        cdef size_t count = data.shape[0]
        cdef Slot *slot = &self.ring.slots[0]
        if count > self.buffer_bytes:
            raise ValueError(f"{count} bytes do not fit into a buffer of {self.buffer_bytes}")
        self.flush()
        if count:
            memcpy(slot.memory + PAGE, &data[0], count)
        slot.count = 0
        with nogil:
            _frame_data(
                &self.numbers, template, slot, 0, count, XXH3_64bits(slot.memory + PAGE, count),
                False,
            )
            self._write_now(slot)
        self._count()

    def put_chunk(
        self, Template template not None, const unsigned char[::1] data not None,
        Digest digest=None,
    ):
        """Write data, one chunk of a device that gives chunks, as copy() writes what it reads.

        One larger than buffer_bytes takes several frames, all but the last CONTINUED; a framing
        without such a flag takes none larger. Blocks. Raises OSError, ECANCELED when woken.
        """
        cdef size_t at = 0, piece, count = data.shape[0]
        cdef Slot *slot
        if count > self.buffer_bytes and not template.continued:
            raise ValueError(f"a chunk of {count} bytes and a buffer of {self.buffer_bytes}")
        try:
            while at < count:
                if _cancelled(self.ring.wake_fd):
                    self._fail(-1, ECANCELED)
                slot = self._take_slot()
                piece = min(count - at, self.buffer_bytes)
                with nogil:
                    memcpy(slot.memory + PAGE, &data[at], piece)
                    at += piece
                    _frame_chunk(
                        &self.numbers, template, slot, piece, digest, self.leave_holes, at < count
                    )
                    self._hand_over(slot)
                self._count()
                self.device_bytes += piece
        except BaseException:
            with nogil:
                self._stop()
            raise

    def copy(
        self, int src, Template template not None, uint64_t limit, Digest digest=None, *,
        uint64_t deadline_ns=0, bint splicing=False,
    ):
        """Copy at most limit bytes from src, a frame for each read.

        Returns END_OF_STREAM (a read of 0), DRAINED (ENOMSG), LIMIT_REACHED, or DEADLINE_REACHED
        (CLOCK_MONOTONIC; 0: none). After a deadline some frames may still be on their way: go on,
        or flush(). With splicing and no digest, splices until src or sink says EINVAL, then reads;
        never into a blocking socket. A read that is interrupted is an error and not repeated: some
        drivers have lost bytes by then. Raises OSError; ECANCELED between chunks once wake_fd is
        readable. Then nothing is written any more.
        """
        cdef bint may_splice = splicing and digest is None and template.checksum_at < 0
        may_splice = may_splice and self.turns is None
        if self.ring.to_socket and is_blocking(self.ring.out_fd):
            may_splice = False  # splice has no MSG_DONTWAIT: a stalled peer would make it deaf
        if may_splice and self.pipe_bytes == 0:
            self._open_pipe()
        return Outcome(self._guarded(src, template, limit, digest, deadline_ns, may_splice))

    def _guarded(
        self, int src, Template template, uint64_t limit, Digest digest, uint64_t deadline_ns,
        bint may_splice,
    ):
        """Copy, and flush unless a deadline ended it; stop the threads when it fails."""
        cdef int outcome = LIMIT_REACHED
        try:
            with nogil:
                if template is not None:
                    outcome = self._copy(src, template, limit, digest, deadline_ns, may_splice)
                if outcome != DEADLINE_REACHED:
                    self._flush()
        except BaseException:
            with nogil:
                self._stop()
            raise
        return outcome

    cdef int _copy(
        self, int src, Template template, uint64_t limit, Digest digest, uint64_t deadline_ns,
        bint may_splice,
    ) except -1 nogil:
        cdef Slot *slot
        cdef ssize_t got
        cdef size_t asked
        cdef int reason
        while limit:
            if _cancelled(self.ring.wake_fd):
                self._fail(src, ECANCELED)
            slot = self._take_slot()
            if may_splice and self.pipe_fds[0] >= 0:
                asked = min(limit, self.pipe_bytes)
                got = splice(src, NULL, self.pipe_fds[1], NULL, asked, SPLICE_F_MOVE)
            else:
                asked = min(limit, self._read_bytes())
                if not self.is_settled:
                    _before_read(&self.probe)
                got = read(src, slot.memory + PAGE, asked)
            if got <= 0:
                reason = errno if got < 0 else 0
                self._return_slot(slot)
                if got == 0:
                    return END_OF_STREAM
                if reason == ENOMSG:  # linux/vfio.h: pre-copy has no data now; not the end
                    return DRAINED
                if reason == EINVAL and may_splice and self.pipe_fds[0] >= 0:
                    self._close_pipe()  # every driver's data_fd: nothing was taken
                    continue
                if reason == EAGAIN:
                    reason = _wait(src, POLLIN, self.ring.wake_fd)
                if reason:
                    self._fail(src, reason)
                continue
            if may_splice and self.pipe_fds[0] >= 0:
                self._emit_spliced(template, slot, got)
            else:
                if not self.is_settled:
                    _after_read(&self.probe, asked, got, self.buffer_bytes)
                _frame_chunk(&self.numbers, template, slot, got, digest, self.leave_holes, False)
                self._hand_over(slot)
                self._count()
            self.device_bytes += got
            limit -= got
            if deadline_ns and monotonic_ns() >= deadline_ns:
                return DEADLINE_REACHED
        return LIMIT_REACHED

    cdef size_t _read_bytes(self) noexcept nogil:
        cdef size_t count = self.buffer_bytes
        if _wants_quarter(&self.probe):
            count //= 4
        if self.bytes_per_s:  # 50 reads a second keep the rate smooth
            count = min(count, max(<uint64_t>1 << 16, self.bytes_per_s // 50))
        return count

    cdef int _settle(self) except -1 nogil:
        """Choose the buffer, and start the threads, by what the first reads told."""
        cdef Ring *ring = &self.ring
        if _wants_larger(&self.probe):
            self.probe.full_ns = 0
            _take_memory(ring)
            self.buffer_bytes = self.grown_bytes
            ring.depth = min(ring.depth, GROWN_SLOTS)
            if _give_memory(ring, 1, self.buffer_bytes):
                self._fail(-1, ENOMEM)
        if self.device_bytes < THREADED_FROM_BYTES:
            return 0
        self.is_settled = True
        if self.to_page_cache and not _waits(&self.probe):
            return 0  # a second thread would cost more than it brings
        if ring.depth > 1 and _give_memory(ring, ring.depth, self.buffer_bytes) == 0:
            _start_threads(ring, self.writers)  # else: no memory or threads; one thread serves
        return 0

    cdef Slot *_take_slot(self) except NULL nogil:
        """Return the next slot to fill. Raises what failed to be written before."""
        cdef Slot *slot
        if not self.is_settled and self.probe.timed == TIMED_READS:
            self._settle()
        slot = &self.ring.slots[self.ring.handed % self.ring.depth]
        if self.ring.threads_running:
            self._wait_for(slot)
        slot.count = 0
        return slot

    cdef int _wait_for(self, Slot *slot) except -1 nogil:
        cdef int reason
        while sem_wait(&slot.is_free) < 0:
            _interrupted()
        reason = read_flag(&self.ring.reason)
        if reason:
            self._fail(self.ring.out_fd, reason)
        return 0

    cdef void _return_slot(self, Slot *slot) noexcept nogil:
        if self.ring.threads_running:
            sem_post(&slot.is_free)

    cdef int _flush(self) except -1 nogil:
        cdef int index
        if self.ring.threads_running:
            for index in range(self.ring.depth):
                self._wait_for(&self.ring.slots[index])
                sem_post(&self.ring.slots[index].is_free)
            self._leave_off()
        return 0

    cdef void _leave_off(self) noexcept nogil:
        """Let the file's own offset be where writing ended: positional writes do not move it."""
        if self.ring.positional:
            lseek(self.ring.out_fd, self.ring.offset, SEEK_SET)

    cdef int _hand_over(self, Slot *slot) except -1 nogil:
        """Write a filled slot, now or by a thread."""
        self._pace(slot)
        if not self.ring.threads_running:
            return self._write_now(slot)
        self._place(slot)
        self.ring.handed += 1
        sem_post(&self.ring.filled)
        return 0

    cdef void _place(self, Slot *slot) noexcept nogil:
        cdef int index
        slot.at, slot.offset = 0, self.ring.offset
        for index in range(slot.count):
            self.ring.offset += slot.pieces[index].iov_len
        while self.ring.positional and self.ring.offset > self.ring.allocated:
            # Writes that extend a file lock each other out (ext4, xfs). Where it cannot be done
            # ahead, they are slower, and the disk that is full says so itself.
            fallocate(self.ring.out_fd, 0, self.ring.allocated, AHEAD_BYTES)
            self.ring.allocated += AHEAD_BYTES

    cdef int _write_now(self, Slot *slot) except -1 nogil:
        cdef int reason
        self._place(slot)
        reason = _write_in_turn(&self.ring, slot)
        while reason == EINTR:
            _interrupted()
            reason = _write_in_turn(&self.ring, slot)
            if reason == EINTR and _cancelled(self.ring.wake_fd):
                reason = ECANCELED
        if reason:
            self._fail(self.ring.out_fd, reason)
        self._leave_off()
        return 0

    cdef void _count(self) noexcept nogil:
        self.frames, self.zero_bytes = self.numbers.frames, self.numbers.zero_bytes

    cdef int _pace(self, Slot *slot) except -1 nogil:
        """Wait until the rate allows this slot to be written."""
        cdef pollfd waiter
        cdef uint64_t bytes_per_s, pause_ns
        cdef int index
        while True:
            bytes_per_s = self.bytes_per_s  # once: another thread may set it to 0
            if bytes_per_s == 0:
                self.pace.owed = 0
                return 0
            pause_ns = _pause_ns(&self.pace, bytes_per_s)
            if pause_ns == 0:
                break
            waiter.fd, waiter.events, waiter.revents = self.ring.wake_fd, POLLIN, 0
            if poll_ns(&waiter, 1, pause_ns) < 0:
                _interrupted()
            elif waiter.revents:
                self._fail(self.ring.out_fd, ECANCELED)
        for index in range(slot.count):
            self.pace.owed += slot.pieces[index].iov_len
        return 0

    cdef int _emit_spliced(self, Template template, Slot *slot, size_t count) except -1 nogil:
        cdef unsigned char *head = slot.memory + PAGE - template.room
        cdef size_t padding = _padding(template, count)
        cdef size_t left = count
        cdef ssize_t put
        cdef int reason
        _begin_head(template, head, False)
        _end_head(&self.numbers, template, head, count, 0)
        _add_piece(slot, head, template.room)
        self._hand_over(slot)
        self._flush()
        while left and self.pipe_fds[0] >= 0:
            put = splice(self.pipe_fds[0], NULL, self.ring.out_fd, NULL, left, SPLICE_F_MOVE)
            if put > 0:
                left -= put
                self.ring.stream_bytes += put
                self.spliced_bytes += put
                continue
            reason = errno if put < 0 else EIO
            if reason == EINVAL:  # a sink that cannot: an O_APPEND file
                self._empty_pipe(slot, left)
                break
            if reason == EAGAIN:
                reason = _wait(self.ring.out_fd, POLLOUT, self.ring.wake_fd)
            elif reason == EINTR:
                _interrupted()
                reason = ECANCELED if _cancelled(self.ring.wake_fd) else 0
            if reason:
                self._fail(self.ring.out_fd, reason)
        slot.count = 0
        memset(slot.memory + PAGE, 0, padding)
        memcpy(slot.memory + PAGE + padding, template.tail, template.tail_bytes)
        _add_piece(slot, slot.memory + PAGE, padding + template.tail_bytes)
        self._write_now(slot)
        self._count()
        return 0

    cdef int _empty_pipe(self, Slot *slot, size_t left) except -1 nogil:
        cdef ssize_t got
        while left:
            got = read(self.pipe_fds[0], slot.memory + PAGE, min(left, self.buffer_bytes))
            if got <= 0:
                self._fail(self.pipe_fds[0], errno if got < 0 else EIO)
            slot.count = 0
            _add_piece(slot, slot.memory + PAGE, got)
            self._write_now(slot)
            left -= got
        self._close_pipe()
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
