cdef struct Pace:
    uint64_t at_ns  # when owed was right; 0: never yet
    double owed  # bytes that were let through before their time


cdef uint64_t _pause_ns(Pace *pace, uint64_t bytes_per_s) noexcept nogil:
    """Return how long to wait before more may be written at this rate: at most 50 ms, then ask."""
    cdef uint64_t now_ns = monotonic_ns()
    pace.at_ns = pace.at_ns or now_ns
    pace.owed -= 1e-9 * (now_ns - pace.at_ns) * bytes_per_s
    pace.at_ns = now_ns
    # What was late may be made good for 50 ms, or a busy machine would stay below the rate.
    pace.owed = max(pace.owed, -0.05 * bytes_per_s)
    return <uint64_t>min(5e7, 1e9 * pace.owed / bytes_per_s + 1) if pace.owed > 0 else 0
