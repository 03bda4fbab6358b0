"""READY, GO, DONE: who may let the devices run, whatever is lost. Pure: a table for each side.

The source runs until it has recorded GO, and after that only by the destination's word that it
never ran. The destination runs only after GO, and says READY only when everything is committed in
STOP. tests/test_live_handover.py walks every state that two such sides, a link that loses, breaks
and crashes can get into.
"""

from enum import Enum, auto


class Source(Enum):
    """Where the source is. Its devices may run in BEFORE and BACK, and in no other."""

    BEFORE = auto()  # no GO was recorded: whatever fails, the source runs
    GOING = auto()  # GO is recorded, and may have been received: held in STOP
    RELEASED = auto()  # the destination runs: stopped for good
    BACK = auto()  # the migration is off: the source runs


class Destination(Enum):
    """Where the destination is. Its devices may run with the state in RUNNING only."""

    LOADING = auto()  # nothing is committed for good; a reset forgets it
    READY = auto()  # committed, in STOP, and said so; waits for GO until its lease ends
    GOING = auto()  # GO is recorded: to RUNNING
    RUNNING = auto()
    FORGOTTEN = auto()  # reset: it never ran, and never will


class SourceEvent(Enum):
    """What the source learns."""

    READY = auto()  # the destination's word, with counts that are right
    DONE = auto()  # ... that it runs
    NEVER_RAN = auto()  # ... that it did not, and was reset
    FAILED = auto()  # anything else: an error here or there, the link is lost, cancel


class DestinationEvent(Enum):
    """What the destination learns."""

    COMMITTED = auto()  # everything was verified, RESUMING -> STOP was done
    GO = auto()
    RAN = auto()  # STOP -> RUNNING was done
    FAILED = auto()  # an error here or there, the link is lost, the lease has ended, cancel


class Act(Enum):
    """What is to be done, in order. The next only when the one before is done."""

    RECORD_READY = auto()
    RECORD_GO = auto()
    RECORD_RUNNING = auto()
    RECORD_RELEASED = auto()
    RECORD_BACK = auto()
    RECORD_FORGETTING = auto()  # they are about to be reset, though GO may have been recorded
    RECORD_FORGOTTEN = auto()
    SAY_READY = auto()
    SAY_GO = auto()
    SAY_DONE = auto()
    SAY_NEVER_RAN = auto()
    RUN = auto()  # let the devices run
    RESET = auto()
    HOLD = auto()  # stay stopped: only resolve may let them run


S, D, SE, DE = Source, Destination, SourceEvent, DestinationEvent

# What is not in a table cannot happen there, or changes nothing: see at_source(), at_destination().
SOURCE: dict[tuple[Source, SourceEvent], tuple[Source, tuple[Act, ...]]] = {
    (S.BEFORE, SE.READY): (S.GOING, (Act.RECORD_GO, Act.SAY_GO)),
    (S.BEFORE, SE.FAILED): (S.BACK, (Act.RUN, Act.RECORD_BACK)),
    (S.BEFORE, SE.NEVER_RAN): (S.BACK, (Act.RUN, Act.RECORD_BACK)),
    (S.GOING, SE.DONE): (S.RELEASED, (Act.RECORD_RELEASED,)),
    (S.GOING, SE.NEVER_RAN): (S.BACK, (Act.RUN, Act.RECORD_BACK)),
    (S.GOING, SE.FAILED): (S.GOING, (Act.HOLD,)),
}
# A device that was reset is RUNNING, as one that runs: the reset has to be in the journal before it
# is done, wherever GO may be in it. A record of GO that failed may be on the disk all the same.
_FORGET = (Act.RECORD_FORGETTING, Act.RESET, Act.RECORD_FORGOTTEN, Act.SAY_NEVER_RAN)
DESTINATION: dict[tuple[Destination, DestinationEvent], tuple[Destination, tuple[Act, ...]]] = {
    (D.LOADING, DE.COMMITTED): (D.READY, (Act.RECORD_READY, Act.SAY_READY)),
    (D.LOADING, DE.FAILED): (D.FORGOTTEN, (Act.RESET, Act.RECORD_FORGOTTEN, Act.SAY_NEVER_RAN)),
    (D.READY, DE.GO): (D.GOING, (Act.RECORD_GO, Act.RUN)),
    (D.READY, DE.FAILED): (D.FORGOTTEN, _FORGET),
    (D.GOING, DE.RAN): (D.RUNNING, (Act.RECORD_RUNNING, Act.SAY_DONE)),
    # STOP -> RUNNING failed. A link that is lost now changes nothing: GO was given.
    (D.GOING, DE.FAILED): (D.FORGOTTEN, _FORGET),
}


def at_source(state: Source, event: SourceEvent) -> tuple[Source, tuple[Act, ...]]:
    """Return where the source is after event, and what it has to do. What is over stays over."""
    return SOURCE.get((state, event), (state, ()))


def at_destination(
    state: Destination, event: DestinationEvent
) -> tuple[Destination, tuple[Act, ...]]:
    """Return where the destination is after event, and what it has to do."""
    return DESTINATION.get((state, event), (state, ()))
