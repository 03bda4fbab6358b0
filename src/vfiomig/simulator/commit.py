"""RESUMING -> STOP: whether what was loaded is taken, and making it the state."""

import os

from vfiomig.simulator.profiles import Accept
from vfiomig.simulator.storage import SimState
from vfiomig.simulator.updates import find_updates
from vfiomig.simulator.url import Parameters


def commit(state: SimState, parameters: Parameters) -> int:
    """Make the staging the state; or return the errno of the refusal, nothing changed.

    Raises OSError when the files fail.
    """
    profile, staging_fd = parameters.profile, state.staging_fd
    updates = find_updates(staging_fd)
    if updates is not None:
        if not _is_accepted(parameters, updates.size_bytes, cut=not updates.is_complete):
            return profile.refused_errno
        state.commit_built(updates.replay)
        return 0
    size_bytes = os.fstat(staging_fd).st_size
    if not _is_accepted(parameters, size_bytes, cut=size_bytes < parameters.size):
        return profile.refused_errno
    if parameters.accept is Accept.FITS:
        os.ftruncate(staging_fd, parameters.size)
    # A refused header was told in write(); what the device has keeps its own.
    os.pwrite(staging_fd, profile.header[:size_bytes], 0)
    state.commit_staging()
    return 0


def _is_accepted(parameters: Parameters, size_bytes: int, *, cut: bool) -> bool:
    match parameters.accept:
        case Accept.ANY:
            return True
        case Accept.FITS:
            return size_bytes <= parameters.size
        case Accept.EXACT:
            return size_bytes in {parameters.size, *parameters.profile.other_lengths}
        case Accept.COMPLETE:
            return not cut
