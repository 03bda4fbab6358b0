"""The hand-over's state space, walked to its end: never two that run, never a state that is lost.

Two sides follow the tables of handover.py, one act at a time, and resolve follows verdict.py. In
between, everything may happen that the world has: the link breaks at both ends or at one, and what
is under way is lost or still arrives; either side is cancelled, its lease ends, a record is not
written (and may be on the disk all the same), the devices refuse to run, and a process is killed,
twice at most, between any two acts of the session or of resolve itself.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest

from vfiomig.live import handover, verdict
from vfiomig.live.handover import Act, Destination, DestinationEvent, Source, SourceEvent
from vfiomig.live.verdict import EVENT_OF, Left, Role, Verdict

# What a device holds and does. A destination's is LOADING until it commits.
RUNS, STOPPED, BLANK, LOADING = "runs", "stopped", "blank", "loading"
SAID = {Act.SAY_READY: "ready", Act.SAY_GO: "go", Act.SAY_DONE: "done"} | {
    Act.SAY_NEVER_RAN: "never-ran"
}
HEARD: Mapping[str, Any] = {
    "ready": SourceEvent.READY,
    "done": SourceEvent.DONE,
    "never-ran": SourceEvent.NEVER_RAN,
    "state": DestinationEvent.COMMITTED,
    "go": DestinationEvent.GO,
}
FAILED: Mapping[Role, Any] = {
    Role.SOURCE: SourceEvent.FAILED,
    Role.DESTINATION: DestinationEvent.FAILED,
}
# Where a side still is when the first of its acts could not be recorded.
UNLESS_RECORDED: Mapping[tuple[Role, Act], Any] = {
    (Role.SOURCE, Act.RECORD_GO): Source.BEFORE,
    (Role.DESTINATION, Act.RECORD_READY): Destination.LOADING,
    (Role.DESTINATION, Act.RECORD_GO): Destination.READY,
}
BOTH = (Role.SOURCE, Role.DESTINATION)
ENDS = {Source.BACK, Source.RELEASED, Destination.FORGOTTEN, Destination.RUNNING}
KILLS = 2


class Side(NamedTuple):
    """One side. place: None once its process is gone; acts: what it, or resolve, has to do yet."""

    place: Any
    device: str
    acts: tuple[Act, ...] = ()
    journal: frozenset[str] = frozenset()
    mail: tuple[str, ...] = ()  # under way to it
    is_cut_off: bool = False  # it knows that the link is lost
    holds: bool = False  # it has given up waiting


class World(NamedTuple):
    """Everything. mishaps: how many records or resumes may fail yet."""

    source: Side = Side(Source.BEFORE, RUNS)
    destination: Side = Side(Destination.LOADING, LOADING)
    is_linked: bool = True
    kills: int = KILLS
    mishaps: int = 1

    def side(self, role: Role) -> Side:
        return self.source if role is Role.SOURCE else self.destination

    def but(self, role: Role, **values: Any) -> "World":  # noqa: ANN401  _replace's
        side = self.side(role)._replace(**values)
        return (
            self._replace(source=side) if role is Role.SOURCE else self._replace(destination=side)
        )

    @property
    def runs_twice(self) -> bool:
        ran = self.destination.device == RUNS or "running" in self.destination.journal
        return ran and self.source.device == RUNS

    @property
    def is_lost(self) -> bool:
        return self.source.device == BLANK and self.destination.device in (BLANK, LOADING)

    @property
    def runs_once(self) -> bool:
        return (self.source.device == RUNS) != (self.destination.device == RUNS)


def other(role: Role) -> Role:
    return BOTH[role is Role.SOURCE]


class Rules(NamedTuple):
    """What the two sides and resolve go by."""

    tables: Mapping[Role, Mapping[Any, Any]] = {
        Role.SOURCE: handover.SOURCE,
        Role.DESTINATION: handover.DESTINATION,
    }
    has_keeper: bool = True

    def but(self, role: Role, place: object, event: object, *answer: object) -> "Rules":
        table = {**self.tables[role], (place, event): answer}
        return self._replace(tables={**self.tables, role: table})

    def steps(self, world: World) -> Iterator[World]:
        """Yield every world that is one step away."""
        if world.is_linked:
            yield (
                world.but(Role.SOURCE, mail=())
                .but(Role.DESTINATION, mail=())
                ._replace(is_linked=False)
            )
        for role in BOTH:
            side = world.side(role)
            if not world.is_linked and side.mail:
                yield world.but(role, mail=())
            if side.acts:
                yield from self.acted(world, role)
            elif side.place is None:
                acts = self.resolved(world, role)
                if acts:
                    yield world.but(role, acts=acts)
            else:
                yield from self.learned(world, role)
            if world.kills and (side.place is not None or side.acts):
                yield self.killed(world, role)

    def learned(self, world: World, role: Role) -> Iterator[World]:
        """What a living side that has nothing to do may learn, or decide."""
        side = world.side(role)
        if side.place is Source.BEFORE and side.device == RUNS and not side.is_cut_off:
            yield say(world.but(role, device=STOPPED), role, "state")
        if side.mail and not side.is_cut_off:
            heard = world.but(role, mail=side.mail[1:])
            if side.mail[0] == "state" and side.place is Destination.LOADING:
                heard = heard.but(role, device=STOPPED)
            yield self.told(heard, role, HEARD[side.mail[0]])
        yield self.told(world, role, FAILED[role])  # cancel, the lease
        if not side.is_cut_off:  # the link: here first, or here at last
            lost = world.but(role, is_cut_off=True, mail=())._replace(is_linked=False)
            yield self.told(lost, role, FAILED[role])
        if self.has_keeper and (side.place in ENDS or side.holds):
            yield gone(world, role)

    def told(self, world: World, role: Role, event: object) -> World:
        side = world.side(role)
        place, acts = self.tables[role].get((side.place, event), (side.place, ()))
        return world.but(role, place=place, acts=acts)

    def acted(self, world: World, role: Role) -> Iterator[World]:
        """Do the next act, as it comes out and as it may fail."""
        side = world.side(role)
        act, then = side.acts[0], world.but(role, acts=side.acts[1:])
        unlucky = then._replace(mishaps=world.mishaps - 1)
        if act in SAID:
            yield say(then, role, SAID[act])
        elif act in EVENT_OF:
            written = side.journal | {EVENT_OF[act]}
            yield then.but(role, journal=written)
            if world.mishaps:
                yield self.not_recorded(unlucky, role, act)
                yield self.not_recorded(unlucky.but(role, journal=written), role, act)
        elif act is Act.RUN and role is Role.DESTINATION:
            ran = then.but(role, device=RUNS)
            yield ran if side.place is None else self.told(ran, role, DestinationEvent.RAN)
            if world.mishaps:
                yield self.not_run(unlucky, role)
                yield self.not_run(unlucky.but(role, device=RUNS), role)
        elif act is Act.HOLD:
            yield then.but(role, holds=True)
        elif act is Act.RUN:
            yield then.but(role, device=RUNS)
        else:
            # Without a GO, or a reset begun, what runs there is none of the session's business.
            others = side.place is None and "forgetting" not in side.journal
            yield then if others and side.device == RUNS else then.but(role, device=BLANK)

    def not_run(self, world: World, role: Role) -> World:
        if world.side(role).place is not None:
            return self.told(world, role, DestinationEvent.FAILED)
        _, acts = handover.DESTINATION[Destination.GOING, DestinationEvent.FAILED]
        return world.but(role, acts=tuple(act for act in acts if act not in SAID))

    def not_recorded(self, world: World, role: Role, act: Act) -> World:
        """Without READY or GO in the journal it is as if it had not happened; the rest goes on."""
        side = world.side(role)
        if side.place is None:
            return world.but(role, acts=())
        if (role, act) not in UNLESS_RECORDED:
            return world
        undone = world.but(role, place=UNLESS_RECORDED[role, act], acts=())
        return self.told(undone, role, FAILED[role])

    def killed(self, world: World, role: Role) -> World:
        side = world.side(role)
        killed = world._replace(kills=world.kills - 1)
        if side.place is None:
            return killed.but(role, acts=())  # resolve itself: the keeper, if any, keeps on
        killed = gone(killed, role)
        return killed if self.has_keeper else killed.but(role, device=BLANK)

    def resolved(self, world: World, role: Role) -> tuple[Act, ...] | None:
        """What resolve would do here, with the other journal in its hand."""
        side, word = world.side(role), word_of(other(role), world.side(other(role)).journal)
        found = verdict_of(role, side.journal)
        if role is Role.SOURCE:
            return verdict.acts_of_source(found, word)
        return verdict.acts_of_destination(found, self.left(side.device), side.journal, word)

    def left(self, device: str) -> Left:
        if device == STOPPED:
            return Left.STOPPED
        # A device that was reset looks as one that runs; one that nobody keeps says nothing.
        return Left.RUNNING if self.has_keeper and device != LOADING else Left.UNCLEAR

    def is_settled(self, world: World) -> bool:
        """Whether both processes are gone, and resolve has nothing to do on either side."""
        sides = [world.side(role) for role in BOTH]
        over = all(side.place is None and not side.acts for side in sides)
        return over and not any(self.resolved(world, role) for role in BOTH)

    def is_wrong(self, world: World) -> bool:
        """Whether two run, nobody has the state, or all is over and not exactly one runs."""
        if world.runs_twice or (world.is_lost and self.has_keeper):
            return True
        return not world.runs_once and self.is_settled(world)


@cache
def verdict_of(role: Role, journal: frozenset[str]) -> Verdict:
    return verdict.verdict_of(role, journal)


@cache
def word_of(role: Role, journal: frozenset[str]) -> Verdict | None:
    return next(iter(verdict.final_of(role, journal)), None)


def say(world: World, role: Role, word: str) -> World:
    peer = other(role)
    deaf = not world.is_linked or world.side(peer).is_cut_off
    return world if deaf else world.but(peer, mail=(*world.side(peer).mail, word))


def gone(world: World, role: Role) -> World:
    """The process has ended; what it said last may still arrive."""
    ended = world.but(role, place=None, acts=(), mail=(), is_cut_off=True, holds=False)
    return ended._replace(is_linked=False)


class Walk:
    """Every world that can be reached, and how."""

    def __init__(self, rules: Rules, until: Callable[[World], bool] = lambda _: False) -> None:
        self.rules = rules
        self.depth: dict[World, int] = {World(): 0}
        self.before: dict[World, list[World]] = {}
        self.found: World | None = None
        queue = deque(self.depth)
        while queue and self.found is None:
            world = queue.popleft()
            for after in rules.steps(world):
                self.before.setdefault(after, []).append(world)
                if after not in self.depth:
                    self.depth[after] = self.depth[world] + 1
                    queue.append(after)
                    if until(after):
                        self.found = after
                        break

    def leading_to(self, wanted: Callable[[World], bool]) -> set[World]:
        """The worlds from which one that is wanted can be reached."""
        found = set(filter(wanted, self.depth))
        queue = deque(found)
        while queue:
            for world in self.before.get(queue.popleft(), []):
                if world not in found:
                    found.add(world)
                    queue.append(world)
        return found


@pytest.fixture(scope="module")
def kept() -> Walk:
    """Devices that somebody keeps open: a killed process loses nothing."""
    return Walk(Rules())


@pytest.fixture(scope="module")
def opened() -> Walk:
    """Devices that the two processes alone have open: who is killed loses them."""
    return Walk(Rules(has_keeper=False))


def test_never_do_both_run(kept: Walk, opened: Walk) -> None:
    assert [world for walk in (kept, opened) for world in walk.depth if world.runs_twice] == []


def test_the_state_is_lost_only_with_a_killed_process_that_nobody_kept_it_for(
    kept: Walk, opened: Walk
) -> None:
    assert [world for world in kept.depth if world.is_lost] == []
    assert [w for w in opened.depth if w.is_lost and w.kills == KILLS] == []
    assert any(world.is_lost for world in opened.depth), "the walk kills nobody"


def test_with_a_keeper_exactly_one_runs_once_resolve_has_nothing_to_do(kept: Walk) -> None:
    settled = [world for world in kept.depth if kept.rules.is_settled(world)]
    assert [world for world in settled if not world.runs_once] == []
    assert {world.source.device for world in settled} == {RUNS, STOPPED}
    # Resolve can go on from everywhere, also if it has been killed itself.
    assert kept.leading_to(kept.rules.is_settled) == kept.depth.keys()


def test_resolve_only_adds_to_journals_so_that_it_comes_to_an_end(kept: Walk) -> None:
    for after, befores in kept.before.items():
        for before in befores:
            for role in BOTH:
                assert before.side(role).journal <= after.side(role).journal


def test_the_walk_comes_by_every_line_of_the_tables(kept: Walk) -> None:
    places = {side.place for world in kept.depth for side in (world.source, world.destination)}
    assert places == {*Source, *Destination, None}
    journals = {
        event for world in kept.depth for role in BOTH for event in world.side(role).journal
    }
    assert journals == set(EVENT_OF.values())
    assert len(kept.depth) > 1000


def altered(role: Role, place: object, event: object, *answer: object) -> Rules:
    return Rules().but(role, place, event, *answer)


def test_a_source_that_resumes_when_the_link_breaks_runs_twice_in_a_few_steps() -> None:
    naive = altered(
        Role.SOURCE,
        Source.GOING,
        SourceEvent.FAILED,
        Source.BACK,
        (Act.RUN, Act.RECORD_BACK),
    )
    walk = Walk(naive, until=lambda world: world.runs_twice)
    assert walk.found is not None
    # Stop; commit, record, say READY; record, say GO; break and run; hear GO, record it, run.
    assert walk.depth[walk.found] == 12


DO, SAY = Role.DESTINATION, Act.SAY_NEVER_RAN
WRONG = {
    "a source says GO before it records it": altered(
        Role.SOURCE,
        Source.BEFORE,
        SourceEvent.READY,
        Source.GOING,
        (Act.SAY_GO, Act.RECORD_GO),
    ),
    "a source records that it is back before it is": altered(
        Role.SOURCE,
        Source.GOING,
        SourceEvent.NEVER_RAN,
        Source.BACK,
        (Act.RECORD_BACK, Act.RUN),
    ),
    "a destination runs before it records GO": altered(
        DO, Destination.READY, DestinationEvent.GO, Destination.GOING, (Act.RUN, Act.RECORD_GO)
    ),
    "a destination resets what it was to run without a word": altered(
        DO,
        Destination.GOING,
        DestinationEvent.FAILED,
        Destination.FORGOTTEN,
        (Act.RESET, Act.RECORD_FORGOTTEN, SAY),
    ),
    "a destination says that it never ran before it is sure": altered(
        DO,
        Destination.GOING,
        DestinationEvent.FAILED,
        Destination.FORGOTTEN,
        (Act.RECORD_FORGOTTEN, Act.RESET, SAY),
    ),
    "a destination's lease forgets nothing": altered(
        DO, Destination.READY, DestinationEvent.FAILED, Destination.FORGOTTEN, (SAY,)
    ),
    "a destination does not wait for GO": altered(
        DO,
        Destination.LOADING,
        DestinationEvent.COMMITTED,
        Destination.READY,
        (Act.RECORD_READY, Act.SAY_READY, Act.RUN),
    ),
}


@pytest.mark.parametrize("rules", WRONG.values(), ids=WRONG)
def test_the_walk_finds_what_is_wrong(rules: Rules) -> None:
    assert Walk(rules, until=rules.is_wrong).found is not None
