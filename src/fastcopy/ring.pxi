# Between the device and the stream: slots that one thread fills, and others write. Plain C, for the
# writing threads never take the GIL. Producer: the thread that reads the device.

cdef struct Slot:
    unsigned char *memory  # a page for the head, the payload, two pages for padding and tail
    size_t memory_bytes
    iovec *pieces  # what to write of it, in order; without a base: a hole in the file
    int count, at  # pieces in all; the first that is not wholly written
    uint64_t offset  # in the file, when writes are positional
    sem_t is_free  # owned by the producer while it is taken, by a writing thread while it is not

cdef struct Ring:
    Slot *slots
    int depth, memory_slots, threads_running
    pthread_t *threads
    uint64_t handed, taken  # slots given to the writing threads; slots they began with
    sem_t filled
    int out_fd, wake_fd, stop_fd
    bint to_socket, positional
    # Flags of all threads, for read_flag() and set_flag(). reason: errno of the write that failed;
    # nothing is written after it.
    int reason, stopping, direct
    uint64_t offset, allocated  # when writes are positional: where the next slot goes; end of file
    uint64_t stream_bytes, direct_bytes
    Turn *turn  # NULL: nobody else writes to out_fd


cdef void _add_piece(Slot *slot, void *start, size_t count) noexcept nogil:
    if count == 0:
        return
    slot.pieces[slot.count].iov_base = start
    slot.pieces[slot.count].iov_len = count
    slot.count += 1


cdef ssize_t _put_pieces(Ring *ring, Slot *slot) noexcept nogil:
    """Write what one call takes, from slot.at on. Returns as write(2)."""
    cdef iovec *piece = &slot.pieces[slot.at]
    cdef int count = 1
    if piece.iov_base == NULL:
        if not ring.positional and lseek(ring.out_fd, piece.iov_len, SEEK_CUR) < 0:
            return -1
        return piece.iov_len
    if ring.positional:
        return pwrite(ring.out_fd, piece.iov_base, piece.iov_len, slot.offset)
    while slot.at + count < slot.count and count < PIECES_MAX and piece[count].iov_base != NULL:
        count += 1
    if ring.to_socket:
        if count == 1:
            return send(ring.out_fd, piece.iov_base, piece.iov_len, MSG_NOSIGNAL | MSG_DONTWAIT)
        return send_pieces(ring.out_fd, piece, count, MSG_NOSIGNAL | MSG_DONTWAIT)
    if count == 1:
        return write(ring.out_fd, piece.iov_base, piece.iov_len)
    return writev(ring.out_fd, piece, count)


cdef void _advance(Slot *slot, size_t put) noexcept nogil:
    cdef iovec *piece
    slot.offset += put
    while slot.at < slot.count:
        piece = &slot.pieces[slot.at]
        if put < piece.iov_len:
            piece.iov_len -= put
            if piece.iov_base != NULL:
                piece.iov_base = <unsigned char *>piece.iov_base + put
            return
        put -= piece.iov_len
        slot.at += 1


cdef int _write_slot(Ring *ring, Slot *slot) noexcept nogil:
    """Write what is left of a slot: 0, or an errno; after EINTR call it again."""
    cdef ssize_t put
    cdef int reason
    cdef bint was_direct
    while slot.at < slot.count:
        was_direct = read_flag(&ring.direct)
        put = _put_pieces(ring, slot)
        if put > 0:
            add_atomically(&ring.stream_bytes, put)
            if was_direct:
                add_atomically(&ring.direct_bytes, put)
            _advance(slot, put)
            continue
        reason = errno if put < 0 else EIO  # 0 would spin forever: treat it as an I/O error
        if reason == EINVAL and was_direct:
            # open(2): O_DIRECT's alignment is the file system's choice. The page cache takes all.
            # In this order, so that who is refused meanwhile knows why.
            reason = 0 if leave_direct(ring.out_fd) == 0 else errno
            set_flag(&ring.direct, False)
        elif reason == EAGAIN:
            reason = _await(ring.out_fd, POLLOUT, ring.wake_fd, ring.stop_fd)
        if reason:
            return reason
    return 0


cdef int _write_in_turn(Ring *ring, Slot *slot) noexcept nogil:
    """Write a slot as _write_slot(), and nobody else's frames into the middle of it.

    Then it does not give way to EINTR: who shares a descriptor blocks all signals.
    """
    cdef int reason
    cdef uint64_t before
    if ring.turn == NULL:
        return _write_slot(ring, slot)
    pthread_mutex_lock(&ring.turn.mutex)
    reason = read_flag(&ring.turn.reason)
    if reason == 0:
        before, reason = ring.stream_bytes, EINTR
        while reason == EINTR:
            reason = _write_slot(ring, slot)
        if reason and ring.stream_bytes != before:
            set_flag(&ring.turn.reason, reason)
    pthread_mutex_unlock(&ring.turn.mutex)
    return reason


cdef void *_write_slots(void *given) noexcept nogil:
    """A writing thread: takes filled slots in order until it is told to stop."""
    cdef Ring *ring = <Ring *>given
    cdef Slot *slot
    cdef int reason
    while True:
        while sem_wait(&ring.filled) < 0:
            pass  # EINTR, the only way to fail: a debugger, since signals are blocked
        if read_flag(&ring.stopping):
            return NULL
        slot = &ring.slots[add_atomically(&ring.taken, 1) % ring.depth]
        reason = EINTR if read_flag(&ring.reason) == 0 else 0
        while reason == EINTR:
            reason = _write_in_turn(ring, slot)
        if reason:
            set_flag(&ring.reason, reason)
        sem_post(&slot.is_free)


cdef int _give_memory(Ring *ring, int slots, size_t buffer_bytes) noexcept nogil:
    """Let so many slots have a buffer of this size. Returns 0 or ENOMEM."""
    cdef Slot *slot
    while ring.memory_slots < slots:
        slot = &ring.slots[ring.memory_slots]
        # One page in front for the head, two behind for padding and tail: a frame is one write.
        slot.memory_bytes = PAGE + buffer_bytes + 2 * PAGE
        slot.memory = _buffer(slot.memory_bytes)
        # A run and the page that ends it make two pieces, when the run becomes a hole.
        slot.pieces = <iovec *>calloc(
            2 * (buffer_bytes // (RUN_BYTES + PAGE)) + 6, sizeof(iovec)
        )
        ring.memory_slots += 1
        if slot.memory == NULL or slot.pieces == NULL:
            return ENOMEM
    return 0


cdef void _take_memory(Ring *ring) noexcept nogil:
    cdef Slot *slot
    while ring.memory_slots:
        ring.memory_slots -= 1
        slot = &ring.slots[ring.memory_slots]
        _free_buffer(slot.memory, slot.memory_bytes)
        free(slot.pieces)


cdef int _start_threads(Ring *ring, int count) noexcept nogil:
    """Start the writing threads. Returns 0, or an errno, when there are none."""
    cdef int index, reason = 0
    ring.stop_fd = eventfd(0, EFD_CLOEXEC)
    if ring.stop_fd < 0:
        return errno
    sem_init(&ring.filled, 0, 0)
    for index in range(ring.depth):
        sem_init(&ring.slots[index].is_free, 0, 1)
    set_flag(&ring.stopping, False)
    ring.handed = ring.taken = 0
    while reason == 0 and ring.threads_running < count:
        reason = start_thread(&ring.threads[ring.threads_running], _write_slots, ring)
        ring.threads_running += reason == 0
    if reason:
        _stop_threads(ring)
    return reason


cdef void _stop_threads(Ring *ring) noexcept nogil:
    """Stop the writing threads, whatever is still to be written."""
    cdef uint64_t one = 1
    cdef int index
    if ring.stop_fd < 0:
        return
    set_flag(&ring.stopping, True)
    write(ring.stop_fd, &one, sizeof(one))
    for index in range(ring.threads_running):
        sem_post(&ring.filled)
    while ring.threads_running:
        ring.threads_running -= 1
        pthread_join(ring.threads[ring.threads_running], NULL)
    for index in range(ring.depth):
        sem_destroy(&ring.slots[index].is_free)
    sem_destroy(&ring.filled)
    close(ring.stop_fd)
    ring.stop_fd = -1
