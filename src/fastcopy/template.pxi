@cython.final
cdef class Template:
    """What stands around each chunk: opaque bytes, and where the loop puts its numbers into them.

    head: bytes before the payload. tail: bytes after it. align: the payload starts that many bytes
    (rounded up) after the head, and is padded with zeros to a multiple of it. length_at: offset in
    head of the payload's length, 8 bytes; sequence_at: of the frame's number; checksum_at: of the
    running digest, or of the payload's own XXH3-64 in put_frame(); chain_at: of the XXH3-64 of
    head[:chain_at] seeded with the one before. -1: the head has no such field.
    kind_at, zeros_kind: byte to change in a frame that stands for a run of zeros, without payload.
    flags_at, continued: bits to set where a chunk goes on in the next frame: at runs of zeros, and
    in put_chunk() where the buffer ends. largest_bytes: of one frame, for a reader; 0: any length.
    """
    cdef unsigned char[HEAD_MAX] head
    cdef unsigned char[TAIL_MAX] tail
    cdef size_t head_bytes, tail_bytes, align, room
    cdef uint64_t largest_bytes
    cdef int length_at, sequence_at, checksum_at, chain_at, kind_at, zeros_kind, flags_at, continued
    cdef bint big_endian

    def __init__(
        self, bytes head not None, bytes tail not None=b"", *, size_t align=1, int length_at,
        bint big_endian=False, int sequence_at=-1, int checksum_at=-1, int chain_at=-1,
        int kind_at=-1, int zeros_kind=-1, int flags_at=-1, int continued=0,
        uint64_t largest_bytes=0,
    ):
        if not 0 < len(head) <= HEAD_MAX or len(tail) > TAIL_MAX or not 0 < align <= PAGE:
            raise ValueError("the template does not fit")
        for at in (length_at, sequence_at, checksum_at, chain_at):
            if at < -1 or at + 8 > len(head):
                raise ValueError(f"no room for a number at {at}")
        for at in (kind_at, flags_at):
            if not -1 <= at < len(head):
                raise ValueError(f"no byte at {at}")
        if not -1 <= zeros_kind <= 255 or zeros_kind >= 0 > kind_at:
            raise ValueError(f"no byte for the kind {zeros_kind}")
        if not 0 <= continued <= 255 or continued > 0 > flags_at:
            raise ValueError(f"no byte for the flags {continued}")
        if zeros_kind >= 0 and (len(tail) or PAGE % align):
            raise ValueError("the template of runs of zeros has a tail, or does not fit a page")
        memcpy(self.head, <char *>head, len(head))
        memcpy(self.tail, <char *>tail, len(tail))
        self.head_bytes, self.tail_bytes, self.align = len(head), len(tail), align
        self.room = (len(head) + align - 1) // align * align
        self.length_at, self.big_endian = length_at, big_endian
        self.sequence_at, self.checksum_at, self.chain_at = sequence_at, checksum_at, chain_at
        self.kind_at, self.zeros_kind = kind_at, zeros_kind
        self.flags_at, self.continued = flags_at, continued
        self.largest_bytes = largest_bytes


cdef uint64_t _fill_head(
    Template template, unsigned char *head, uint64_t count, uint64_t sequence, uint64_t checksum,
    uint64_t chain,
) noexcept nogil:
    """Write head and its numbers, kind and flags as they are there. Returns the next chain."""
    _store(head, template.length_at, count, template.big_endian)
    _store(head, template.sequence_at, sequence, template.big_endian)
    _store(head, template.checksum_at, checksum, template.big_endian)
    memset(head + template.head_bytes, 0, template.room - template.head_bytes)
    if template.chain_at >= 0:
        chain = XXH3_64bits_withSeed(head, template.chain_at, chain)
        _store(head, template.chain_at, chain, template.big_endian)
    return chain


cdef size_t _padding(Template template, uint64_t count) noexcept nogil:
    return (template.align - count % template.align) % template.align
