def xxh3_64(const unsigned char[::1] data not None, uint64_t seed=0):
    """Return XXH3-64 of data. Holds the GIL: for headers, not for payload."""
    if data.shape[0] == 0:
        return XXH3_64bits_withSeed(b"", 0, seed)
    return XXH3_64bits_withSeed(&data[0], data.shape[0], seed)


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
            update_digest(self.state, &data[0], data.shape[0])

    @property
    def value(self):
        """The digest of all bytes so far."""
        return XXH3_64bits_digest(self.state)
