cdef struct Turn:
    pthread_mutex_t mutex
    int reason  # errno of a write that left half a slot in the descriptor: nothing may follow it


@cython.final
cdef class Turns:
    """Lets several FrameWriters, in as many threads, write to one descriptor: a whole slot each.

    A slot is one frame or more, so the frames of the writers alternate, and none is torn. Where a
    write has left half a slot, every later one of all writers fails with the same errno.
    """
    cdef Turn turn

    def __cinit__(self):
        if pthread_mutex_init(&self.turn.mutex, NULL):
            raise MemoryError()

    def __dealloc__(self):
        pthread_mutex_destroy(&self.turn.mutex)

    @property
    def is_torn(self):
        """Whether half a slot was written, so that nothing can follow it."""
        return read_flag(&self.turn.reason) != 0
