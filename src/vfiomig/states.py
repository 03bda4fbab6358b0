"""Which state changes are legal, and which steps they take. Pure: no device, no fd.

Source: enum vfio_device_mig_state in linux/vfio.h, and vfio_mig_get_next_state() in
drivers/vfio/vfio_main.c, whose answers for every pair are the oracle of tests/test_states.py.
"""

from collections import deque
from functools import cache
from itertools import pairwise

from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S

# States that hold a data session to read from; RESUMING holds one to write to.
SAVING = frozenset({S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY})
# The kernel refuses these although a path exists. One of them even made it loop for ever
# (kernel patch 20260602): they are never asked for.
BLOCKED = {(S.STOP_COPY, S.PRE_COPY), (S.STOP_COPY, S.PRE_COPY_P2P)}


# Protocol v1: the steps of the diagram above struct vfio_device_migration_info (Linux 5.8), and
# those of a save that is given up, and of a stopped device that runs again (QEMU 5.2 makes both).
# Loading ends in RUNNING, at once.
_V1_ARCS = frozenset(
    {
        (S.RUNNING, S.STOP),
        (S.STOP, S.RUNNING),
        (S.RUNNING, S.STOP_COPY),
        (S.STOP_COPY, S.STOP),
        (S.RUNNING, S.PRE_COPY),
        (S.PRE_COPY, S.STOP_COPY),
        (S.PRE_COPY, S.RUNNING),
        (S.RUNNING, S.RESUMING),
        (S.RESUMING, S.RUNNING),
    }
)


@cache
def arcs(capabilities: Capability) -> frozenset[tuple[S, S]]:
    """Return the single steps a driver with these capabilities implements."""
    found = {
        (S.STOP, S.STOP_COPY),
        (S.STOP_COPY, S.STOP),
        (S.STOP, S.RESUMING),
        (S.RESUMING, S.STOP),
    }
    stopping = [S.RUNNING, S.STOP]
    if capabilities & Capability.P2P:
        stopping.insert(1, S.RUNNING_P2P)
    if capabilities & Capability.PRE_COPY:
        found |= {(S.RUNNING, S.PRE_COPY), (S.PRE_COPY, S.RUNNING)}
        if capabilities & Capability.P2P:
            found |= {
                (S.PRE_COPY, S.PRE_COPY_P2P),
                (S.PRE_COPY_P2P, S.PRE_COPY),
                (S.RUNNING_P2P, S.PRE_COPY_P2P),
                (S.PRE_COPY_P2P, S.RUNNING_P2P),
                (S.PRE_COPY_P2P, S.STOP_COPY),
            }
        else:
            found.add((S.PRE_COPY, S.STOP_COPY))
    for one, other in pairwise(stopping):
        found |= {(one, other), (other, one)}
    return frozenset(found)


@cache
def path(
    capabilities: Capability, start: S, target: S, protocol: str = "v2"
) -> tuple[S, ...] | None:
    """Return the steps from start to target, target last; () when start is target.

    None when the kernel would refuse the request (EINVAL). By protocol v1, also when the device
    would run on its way: no driver makes the steps, so nobody would expect that.
    """
    steps_of = arcs(capabilities) if protocol == "v2" else _V1_ARCS
    if start is target:
        return () if start is S.ERROR or start in _states(capabilities) else None
    if (start, target) in BLOCKED:
        return None
    # A path may cross the saving group only when it stays inside it: one data_fd serves all.
    barred = SAVING if not {start, target} <= SAVING else frozenset[S]()
    # RESUMING -> STOP commits a load, so no path goes through RESUMING.
    barred |= {S.RESUMING} if protocol == "v2" else {S.RESUMING, S.RUNNING}
    queue: deque[tuple[S, ...]] = deque([(start,)])
    while queue:
        taken = queue.popleft()
        if taken[-1] is target:
            return taken[1:]
        if len(taken) == 1 or taken[-1] not in barred:
            steps = sorted(to for at, to in steps_of if at is taken[-1])
            queue.extend((*taken, to) for to in steps if to not in taken)
    return None


def starts_session(start: S, target: S) -> bool:
    """Whether the step from start to target gives a new data_fd."""
    if target is S.RESUMING:
        return True
    return target in SAVING and start not in SAVING


def ends_session(start: S, target: S) -> bool:
    """Whether the step from start to target ends the data session that start holds."""
    if start is S.RESUMING:
        return True
    return start in SAVING and target not in SAVING


def _states(capabilities: Capability) -> frozenset[S]:
    return frozenset(state for arc in arcs(capabilities) for state in arc)
