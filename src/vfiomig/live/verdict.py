"""What a journal says of a side, and what is to be done about it. Pure: no file, no device.

The rules of `vfiomig resolve`; tests/test_live_handover.py walks them together with the tables of
handover.py. Never a guess: None means that a person, or the other side, has to say more.
"""

from collections.abc import Iterable, Set
from enum import Enum, StrEnum, auto

from vfiomig.live.handover import Act


class Role(StrEnum):
    """Whose journal it is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Verdict(StrEnum):
    """Where a side stands. The first four are a source's, the next three a destination's."""

    MAY_RUN = "may-run"  # no GO was recorded: it runs again, whatever the other side says
    HELD = "held"  # GO was recorded, and nothing after: only the destination's word lets it run
    RELEASED = "released"  # the destination runs
    BACK = "back"  # the source runs again
    NEVER_RAN = "never-ran"  # the destination did not run; final once it has forgotten
    RAN = "ran"
    MAY_HAVE_RUN = "may-have-run"  # GO was recorded: its devices know more
    UNKNOWN = "unknown"  # the journal is damaged, or contradicts itself


class Left(Enum):
    """What the devices of a destination were left in, all together."""

    STOPPED = auto()  # at least one has not been let run
    RUNNING = auto()  # all run, and somebody has kept them open, so that nobody reset them
    FAILED = auto()  # at least one in ERROR, and none runs
    UNCLEAR = auto()  # gone with the process, or in what no hand-over leaves


# The words a journal has for what was done.
EVENT_OF = {
    Act.RECORD_READY: "ready",
    Act.RECORD_GO: "go",
    Act.RECORD_RUNNING: "running",
    Act.RECORD_RELEASED: "released",
    Act.RECORD_BACK: "back",
    Act.RECORD_FORGETTING: "forgetting",
    Act.RECORD_FORGOTTEN: "forgotten",
}
_FINAL = {
    Role.SOURCE: {"released": Verdict.RELEASED, "back": Verdict.BACK},
    Role.DESTINATION: {"running": Verdict.RAN, "forgotten": Verdict.NEVER_RAN},
}
# "done" says that a session ended in order, "resolved" what was decided: both repeat others.
_KNOWN = {*EVENT_OF.values(), "begun", "done", "resolved"}
_RUN_AGAIN = (Act.RUN, Act.RECORD_BACK)
_LET_GO = (Act.HOLD, Act.RECORD_RELEASED)
_FORGET = (Act.RESET, Act.RECORD_FORGOTTEN)


def verdict_of(role: Role, events: Iterable[str], *, is_damaged: bool = False) -> Verdict:
    """Return what the events of a journal say, in whatever order."""
    found = set(events)
    final = final_of(role, found)
    others = _FINAL[Role.DESTINATION if role is Role.SOURCE else Role.SOURCE]
    if is_damaged or found - _KNOWN or found & set(others) or len(final) > 1:
        return Verdict.UNKNOWN
    if final:
        return final.pop()
    if role is Role.SOURCE:
        return Verdict.HELD if "go" in found else Verdict.MAY_RUN
    # Once it is to be reset it never ran: nobody was told that it does.
    has_gone = "go" in found and "forgetting" not in found
    return Verdict.MAY_HAVE_RUN if has_gone else Verdict.NEVER_RAN


def final_of(role: Role, events: Iterable[str]) -> set[Verdict]:
    """Return the verdicts that nothing changes any more, whatever happens to that side."""
    return {_FINAL[role][event] for event in events if event in _FINAL[role]}


def acts_of_source(verdict: Verdict, word: Verdict | None) -> tuple[Act, ...] | None:
    """Return what a source has to do. word: the destination's verdict, None if nobody gave one."""
    match verdict, word:
        case Verdict.RELEASED | Verdict.BACK, _:
            return ()
        case Verdict.MAY_RUN, Verdict.RAN:
            return None  # it cannot have: one of the two is of something else
        case Verdict.MAY_RUN, _:
            return _RUN_AGAIN
        case Verdict.HELD | Verdict.UNKNOWN, Verdict.NEVER_RAN:
            return _RUN_AGAIN
        case Verdict.HELD | Verdict.UNKNOWN, Verdict.RAN:
            return _LET_GO
    return None


def acts_of_destination(
    verdict: Verdict, left: Left, events: Set[str], word: Verdict | None
) -> tuple[Act, ...] | None:
    """Return what a destination has to do. word: the source's verdict, None if nobody gave one."""
    match verdict, left, word:
        case Verdict.RAN, _, _:
            return ()
        case Verdict.NEVER_RAN, _, _ if "forgotten" in events:
            return ()
        case Verdict.NEVER_RAN, _, Verdict.RELEASED:
            return None  # nobody can have told the source that it ran
        case Verdict.NEVER_RAN, _, _:
            return _FORGET
        case Verdict.MAY_HAVE_RUN, _, Verdict.BACK:
            return (Act.RECORD_FORGETTING, *_FORGET)
        case Verdict.MAY_HAVE_RUN, Left.STOPPED, _:
            return (Act.RUN, Act.RECORD_RUNNING)
        case (Verdict.MAY_HAVE_RUN, Left.RUNNING, _) | (
            Verdict.MAY_HAVE_RUN,
            Left.UNCLEAR,
            Verdict.RELEASED,
        ):
            return (Act.RECORD_RUNNING,)
        case Verdict.MAY_HAVE_RUN, Left.FAILED, _:
            return (Act.RECORD_FORGETTING, *_FORGET)
    return None
