# A chunk in a slot becomes the pieces of one frame or more; nothing is moved for it.

cdef enum:
    # The shortest run of zeros worth a frame of its own: in a file, two frames take two pages more.
    RUN_BYTES = 16384

cdef struct Numbers:
    uint64_t sequence, chain  # of the next frame
    uint64_t frames, zero_bytes  # framed so far, and of their bytes those that are left out


cdef bint _is_zero(const unsigned char *data, size_t count) noexcept nogil:
    # Equal to itself shifted by one, and the first byte zero: libc's vector speed.
    return data[0] == 0 and memcmp(data, data + 1, count - 1) == 0


cdef size_t _zero_run(
    const unsigned char *data, size_t start, size_t count, size_t *end
) noexcept nogil:
    """Return where the next run of zeros worth leaving out begins, count if none does.

    From start on, a page boundary; *end is where the run ends. A chunk that is all zero is a run.
    """
    cdef size_t at
    while start < count:
        at = start
        while at < count and _is_zero(data + at, min(<size_t>PAGE, count - at)):
            at = min(at + PAGE, count)
        if at - start >= RUN_BYTES or (start == 0 and at == count):
            end[0] = at
            return start
        start = at + PAGE
    end[0] = count
    return count


cdef uint64_t _digested(Digest digest, const unsigned char *data, size_t count) noexcept nogil:
    if digest is None:
        return 0
    update_digest(digest.state, data, count)
    return XXH3_64bits_digest(digest.state)


cdef void _frame_chunk(
    Numbers *numbers, Template template, Slot *slot, size_t count, Digest digest, bint leave_holes,
    bint goes_on,
) noexcept nogil:
    """Frame what of a chunk is in slot: as one frame, or one for each part that is zero or not.

    goes_on: the chunk has more than that.
    """
    cdef unsigned char *payload = slot.memory + PAGE
    cdef uint64_t checksum
    cdef size_t at = 0, zeros_at, zeros_end
    if template.zeros_kind < 0:
        checksum = _digested(digest, payload, count)
        _frame_data(numbers, template, slot, 0, count, checksum, goes_on)
        if leave_holes:
            _cut_holes(numbers, slot, payload, count)
        return
    while at < count:
        zeros_at = _zero_run(payload, at, count, &zeros_end)
        if zeros_at > at:
            checksum = _digested(digest, payload + at, zeros_at - at)
            _frame_data(
                numbers, template, slot, at, zeros_at, checksum, goes_on or zeros_at < count
            )
        if zeros_end > zeros_at:
            checksum = _digested(digest, payload + zeros_at, zeros_end - zeros_at)
            _frame_zeros(
                numbers, template, slot, zeros_at, zeros_end, checksum,
                goes_on or zeros_end < count,
            )
        at = zeros_end


cdef void _begin_head(Template template, unsigned char *head, bint goes_on) noexcept nogil:
    memcpy(head, template.head, template.head_bytes)
    if goes_on:
        head[template.flags_at] |= <unsigned char>template.continued


cdef void _end_head(
    Numbers *numbers, Template template, unsigned char *head, uint64_t count, uint64_t checksum
) noexcept nogil:
    numbers.chain = _fill_head(template, head, count, numbers.sequence, checksum, numbers.chain)
    numbers.sequence += 1
    numbers.frames += 1


cdef void _frame_data(
    Numbers *numbers, Template template, Slot *slot, size_t start, size_t end, uint64_t checksum,
    bint goes_on,
) noexcept nogil:
    """Add payload[start:end] with its head, which lies in front: before start all was sent."""
    cdef unsigned char *payload = slot.memory + PAGE
    cdef unsigned char *head = payload + start - template.room
    cdef size_t padding = _padding(template, end - start)
    _begin_head(template, head, goes_on)
    _end_head(numbers, template, head, end - start, checksum)
    memset(payload + end, 0, padding)
    memcpy(payload + end + padding, template.tail, template.tail_bytes)
    _add_piece(slot, head, template.room + end - start + padding + template.tail_bytes)


cdef void _frame_zeros(
    Numbers *numbers, Template template, Slot *slot, size_t start, size_t end, uint64_t checksum,
    bint goes_on,
) noexcept nogil:
    """Add the head of a run of zeros, which lies where the run does."""
    cdef unsigned char *head = slot.memory + PAGE + start
    _begin_head(template, head, goes_on)
    head[template.kind_at] = <unsigned char>template.zeros_kind
    _end_head(numbers, template, head, end - start, checksum)
    numbers.zero_bytes += end - start
    if start:  # behind payload, which ends at a page: one piece with it
        slot.pieces[slot.count - 1].iov_len += template.room
    else:
        _add_piece(slot, head, template.room)


cdef void _cut_holes(
    Numbers *numbers, Slot *slot, unsigned char *payload, size_t count
) noexcept nogil:
    """Split the only piece of slot around the runs of zeros in its payload."""
    cdef unsigned char *start = <unsigned char *>slot.pieces[0].iov_base
    cdef unsigned char *end = start + slot.pieces[0].iov_len
    cdef size_t at = 0, zeros_at, zeros_end
    slot.count = 0
    while at < count:
        zeros_at = _zero_run(payload, at, count, &zeros_end)
        if zeros_at == count:
            break
        _add_piece(slot, start, payload + zeros_at - start)
        _add_piece(slot, NULL, zeros_end - zeros_at)
        numbers.zero_bytes += zeros_end - zeros_at
        start = payload + zeros_end
        at = zeros_end
    _add_piece(slot, start, end - start)
