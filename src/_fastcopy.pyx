# cython: language_level=3, boundscheck=False, wraparound=False
"""Move bytes between descriptors with the GIL released: framed, checksummed, cancellable.

Knows descriptors, buffers, headers as opaque bytes, and XXH3. Knows nothing of VFIO. Nothing here
owns a descriptor but the private pipe of a splice and the eventfd that stops the writing threads.
"""
cimport cython
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOMEM, ETIMEDOUT, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.unistd cimport close, getpid, lseek, pwrite, read, write

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
    #include <pthread.h>
    #include <semaphore.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #include "xxh3_avx2.h"
    static int update_digest(XXH3_state_t *state, const void *data, size_t count) {
    #if defined(__x86_64__) && defined(__GNUC__)
        if (__builtin_cpu_supports("avx2"))
            return xxh3_update_avx2(state, data, count);
    #endif
        return XXH3_64bits_update(state, data, count);
    }
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
    static int is_direct(int fd) {
        int flags = fcntl(fd, F_GETFL);
        return flags >= 0 && (flags & O_DIRECT);
    }
    static int leave_direct(int fd) {
        int flags = fcntl(fd, F_GETFL);
        return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags & ~O_DIRECT);
    }
    /* How often this thread has waited in the kernel. */
    static long times_waited(void) {
        struct rusage used;
        return getrusage(RUSAGE_THREAD, &used) == 0 ? used.ru_nvcsw : 0;
    }
    static uint64_t monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    static int poll_ns(struct pollfd *fds, nfds_t count, uint64_t timeout_ns) {
        struct timespec left = {timeout_ns / 1000000000u, timeout_ns % 1000000000u};
        return ppoll(fds, count, &left, NULL);
    }
    static ssize_t send_pieces(int fd, struct iovec *pieces, size_t count, int flags) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        return sendmsg(fd, &message, flags);
    }
    /* A thread that no signal is delivered to: the mask is inherited, so there is no gap. */
    static int start_thread(pthread_t *thread, void *(*run)(void *), void *given) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int reason = pthread_create(thread, NULL, run, given);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return reason;
    }
    static uint64_t add_atomically(uint64_t *counter, uint64_t count) {
        return __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
    }
    static int read_flag(int *flag) {
        return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    }
    static void set_flag(int *flag, int value) {
        __atomic_store_n(flag, value, __ATOMIC_RELEASE);
    }
    """
    ctypedef struct XXH3_state_t:
        pass
    XXH3_state_t *XXH3_createState() nogil
    int XXH3_freeState(XXH3_state_t *) nogil
    int XXH3_64bits_reset(XXH3_state_t *) nogil
    int update_digest(XXH3_state_t *, const void *, size_t) nogil
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
    int poll_ns(pollfd *, unsigned long, uint64_t) nogil
    int ECANCELED, ENOMSG, MSG_NOSIGNAL, MSG_DONTWAIT
    int O_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ, EFD_CLOEXEC, SEEK_CUR, SEEK_SET
    unsigned int SPLICE_F_MOVE
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int, const iovec *, int) nogil
    ssize_t send_pieces(int, iovec *, size_t, int) nogil
    ssize_t send(int, const void *, size_t, int) nogil
    ssize_t splice(int, void *, int, void *, size_t, unsigned int) nogil
    int pipe2(int *, int) nogil
    int eventfd(unsigned int, int) nogil
    int fcntl(int, int, ...) nogil
    int fallocate(int, int, long, long) nogil
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_POPULATE
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, long) nogil
    int munmap(void *, size_t) nogil
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *, int, unsigned int) nogil
    int sem_destroy(sem_t *) nogil
    int sem_wait(sem_t *) nogil
    int sem_post(sem_t *) nogil
    ctypedef unsigned long pthread_t
    int pthread_join(pthread_t, void **) nogil
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *) nogil
    int pthread_mutex_destroy(pthread_mutex_t *) nogil
    int pthread_mutex_lock(pthread_mutex_t *) nogil
    int pthread_mutex_unlock(pthread_mutex_t *) nogil
    int start_thread(pthread_t *, void *(*)(void *) noexcept nogil, void *) nogil
    uint64_t add_atomically(uint64_t *, uint64_t) nogil
    int read_flag(int *) nogil
    void set_flag(int *, int) nogil
    int is_socket(int) nogil
    int may_block(int) nogil
    int is_blocking(int) nogil
    int is_direct(int) nogil
    int leave_direct(int) nogil
    long times_waited() nogil
    uint64_t monotonic_ns() nogil

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    # O_DIRECT and the page cache want payload on a page; linux/mm.h PAGE_SIZE on x86-64 and arm64.
    PAGE = 4096
    HEAD_MAX = 128
    TAIL_MAX = 64
    # linux/uio.h UIO_MAXIOV: the most pieces of one writev().
    PIECES_MAX = 1024

cdef unsigned char[65536] ZEROS
memset(ZEROS, 0, sizeof(ZEROS))

cpdef enum Outcome:
    END_OF_STREAM, DRAINED, LIMIT_REACHED, DEADLINE_REACHED
    OTHER_FRAME, OTHER_TAIL, DAMAGED, PADDING_DAMAGED


cdef unsigned char *_buffer(size_t size) noexcept nogil:
    """Map memory that is there at once: first-touch faults do not belong into the copy.

    Not from malloc, which keeps what it is given back: the next state may be small. NULL: none.
    """
    cdef void *memory = mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0
    )
    return NULL if memory == MAP_FAILED else <unsigned char *>memory


cdef void _free_buffer(unsigned char *memory, size_t size) noexcept nogil:
    if memory != NULL:
        munmap(memory, size)


cdef void _store(unsigned char *head, int at, uint64_t value, bint big_endian) noexcept nogil:
    if at >= 0:
        value = htobe64(value) if big_endian else htole64(value)
        memcpy(head + at, &value, 8)


cdef uint64_t _load(const unsigned char *head, int at, bint big_endian) noexcept nogil:
    cdef uint64_t value = 0
    if at >= 0:
        memcpy(&value, head + at, 8)
    # Swapping is its own inverse.
    return htobe64(value) if big_endian else htole64(value)


def _strerror(int reason):
    import os
    return os.strerror(reason)


include "fastcopy/digest.pxi"
include "fastcopy/template.pxi"
include "fastcopy/waiting.pxi"
include "fastcopy/turns.pxi"
include "fastcopy/ring.pxi"
include "fastcopy/frames.pxi"
include "fastcopy/pace.pxi"
include "fastcopy/probe.pxi"
include "fastcopy/writer.pxi"
include "fastcopy/reader.pxi"
