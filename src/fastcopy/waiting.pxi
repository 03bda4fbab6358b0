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


cdef int _await(
    int fd, short events, int wake_fd, int stop_fd, uint64_t timeout_ns=0
) noexcept nogil:
    """Wait until fd is ready: 0, ECANCELED once wake_fd or stop_fd is readable, or an errno.

    ETIMEDOUT after timeout_ns, where that is not 0.
    """
    cdef pollfd[3] waiters
    cdef int ready
    waiters[0].fd, waiters[0].events, waiters[0].revents = fd, events, 0
    waiters[1].fd, waiters[1].events, waiters[1].revents = wake_fd, POLLIN, 0
    waiters[2].fd, waiters[2].events, waiters[2].revents = stop_fd, POLLIN, 0
    ready = poll_ns(waiters, 3, timeout_ns) if timeout_ns else poll(waiters, 3, -1)
    if ready <= 0:
        return errno if ready < 0 else ETIMEDOUT
    return ECANCELED if waiters[1].revents or waiters[2].revents else 0


cdef int _wait(int fd, short events, int wake_fd, uint64_t timeout_ns=0) except -1 nogil:
    """Wait until fd is ready, and run Python's signal handlers: 0, or ECANCELED, or an errno."""
    cdef int reason = _await(fd, events, wake_fd, -1, timeout_ns)
    while reason == EINTR:
        _interrupted()
        reason = _await(fd, events, wake_fd, -1, timeout_ns)
    return reason


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
