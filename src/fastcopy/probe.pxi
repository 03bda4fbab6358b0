# What the first reads of a device tell: whether they have a high fixed cost, and whether they wait.

cdef enum:
    # The reads that are timed to choose a buffer: two of them first, then small and full in turn.
    TIMED_READS = 8

cdef struct Probe:
    int timed  # reads; TIMED_READS: enough, or there is nothing to choose
    uint64_t quarter_ns, full_ns  # the shortest read of either size; 0: none
    uint64_t reads, waiting_reads
    uint64_t started_ns
    long waited_before


def is_fixed_cost_high(uint64_t quarter_ns, uint64_t full_ns):
    """Whether a read's fixed cost is above a tenth of what a full one takes.

    quarter_ns: the time of a read of a quarter of the bytes. Then a larger buffer pays.
    """
    return _is_fixed_cost_high(quarter_ns, full_ns)


cdef bint _is_fixed_cost_high(uint64_t quarter_ns, uint64_t full_ns) noexcept nogil:
    # full = fixed + 4 * moving, quarter = fixed + moving; so 3 * fixed = 4 * quarter - full.
    return 4 * quarter_ns > full_ns and (4 * quarter_ns - full_ns) * 10 > 3 * full_ns


cdef bint _wants_quarter(Probe *probe) noexcept nogil:
    return 2 <= probe.timed < TIMED_READS and probe.timed % 2 == 0


cdef void _before_read(Probe *probe) noexcept nogil:
    probe.started_ns = monotonic_ns()
    probe.waited_before = times_waited()


cdef void _after_read(Probe *probe, size_t asked, size_t got, size_t full_bytes) noexcept nogil:
    cdef uint64_t took_ns = monotonic_ns() - probe.started_ns
    probe.reads += 1
    probe.waiting_reads += times_waited() != probe.waited_before
    if probe.timed == TIMED_READS:
        return
    probe.timed += 1
    if got < asked or (asked != full_bytes and asked != full_bytes // 4):
        probe.timed, probe.full_ns = TIMED_READS, 0  # the device, a limit or a rate decides
    elif probe.timed > 2 and asked == full_bytes:
        probe.full_ns = min(probe.full_ns or took_ns, took_ns)
    elif probe.timed > 2:
        probe.quarter_ns = min(probe.quarter_ns or took_ns, took_ns)


cdef bint _wants_larger(Probe *probe) noexcept nogil:
    return probe.full_ns and _is_fixed_cost_high(probe.quarter_ns, probe.full_ns)


cdef bint _waits(Probe *probe) noexcept nogil:
    return 2 * probe.waiting_reads >= probe.reads
