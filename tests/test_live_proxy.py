"""Whatever a link does, and at whichever byte: one side runs with the state, and both say so.

Where something goes wrong is told by frames: test_the_frames_of_a_session_are_these pins them.
"""

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import vfiomig
from devices import Simulated, no_leak
from live_ends import Ends
from live_proxy import FOR_GOOD, Proxy, Relay, Trouble, Wrong
from test_live_tls import Authority
from vfiomig import DeviceState
from vfiomig.live.resolve import resolve
from vfiomig.live.tls import TlsFiles
from vfiomig.live.verdict import Verdict
from vfiomig.report import Event

S = DeviceState
SOURCE, DESTINATION = "source", "destination"
# Nothing takes so long here; and what is waited for where a frame is lost.
LONG_NS, SHORT_NS = 2_000_000_000, 300_000_000
NEVER_NS = 1 << 63
# What came through in whole is heard, whatever else does not. A reset may overtake it: tcp(7).
EXACT = FOR_GOOD - {Wrong.RESET}
# The first of the generators that choose random bytes; the others follow.
SEED = 20261123


class Session(NamedTuple):
    """A small session, of which every frame is known."""

    url: str
    frames: tuple[tuple[str, str], ...]
    devices: int = 1
    pre_copy: bool = True


def _frames(source: str, destination: str) -> tuple[tuple[str, str], ...]:
    here = [(SOURCE, name.strip()) for name in source.split(",")]
    return (*here, *((DESTINATION, name.strip()) for name in destination.split(",")))


ONE = Session(
    "size=40001",
    _frames(
        "greeting, hello, begin, data 0, data 0#2, data 0#3, mark 0, stopping, data 0#4, end 0, go,"
        " bye",
        "greeting, hello, resuming, marked, ready, done",
    ),
)
TWO = Session(
    "size=20001",
    _frames(
        "greeting, hello, begin, data 0, data 0#2, mark 0, data 1, data 1#2, mark 1, stopping,"
        " data 0#3, end 0, data 1#3, end 1, go, bye",
        "greeting, hello, resuming, marked, marked#2, ready, done",
    ),
    devices=2,
)
STOPPED = Session(
    "size=100001&zeros=50",
    _frames(
        "greeting, hello, begin, probe 0, probe 0#2, probe 0#3, probe 0#4, probe 0#5, probe 0#6,"
        " mark 0, stopping, data 0, data 0#2, data 0#3, data 0#4, zeros 0, zeros 0#2, zeros 0#3,"
        " end 0, go, bye",
        "greeting, hello, resuming, marked, ready, done",
    ),
    pre_copy=False,
)
SESSIONS = {"one": ONE, "two": TWO, "stopped": STOPPED}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory, if there is one: what is synced here is not what is tested."""
    memory = Path("/dev/shm")
    there = str(memory) if os.access(memory, os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=there))
    yield path
    shutil.rmtree(path)


@contextmanager
def opened(place: Path, session: Session) -> Iterator[Ends]:
    """Open the devices of both ends, which are files: they outlive this."""
    with ExitStack() as stack:

        def devices(side: str, seed: int) -> list[Simulated]:
            return [
                stack.enter_context(
                    Simulated(f"sim:{place}/{side}{index}?{session.url}&seed={seed + index}")
                )
                for index in range(session.devices)
            ]

        yield Ends(devices(SOURCE, 1), devices(DESTINATION, 101), place / "journals")


def migrate(both: Ends, session: Session, proxy: Proxy, silence_ns: int) -> None:
    limits = vfiomig.PreCopyLimits() if session.pre_copy else None
    times = {"silence_ns": silence_ns, "handshake_ns": silence_ns}
    both.migrate(
        both.send_options(pre_copy=limits, buffer_bytes=16384, **times),
        both.receive_options(wait_ns=silence_ns, **times),
        sockets=(proxy.near, proxy.far),
    )


def suffer(place: Path, session: Session, trouble: Trouble, silence_ns: int = LONG_NS) -> Proxy:
    """Migrate over such a link: exactly one side runs, both say so, and it can be migrated."""
    with opened(place, session) as both:
        with Proxy(trouble, tcp=trouble.wrong is Wrong.RESET) as proxy:
            migrate(both, session, proxy, silence_ns)
        check_told(both)
        check_never_both(both)
        knows, was_told = both.source.report is not None, (DESTINATION, "done") in proxy.delivered
        assert knows == was_told if trouble.wrong in EXACT else knows <= was_told
        unknown, before = both.source.error, both.before
        if not isinstance(unknown, vfiomig.OutcomeUnknownError):
            check_one_runs(both, before)
    if isinstance(unknown, vfiomig.OutcomeUnknownError):
        settle(place / "journals", unknown.session)
    with opened(place, session) as both:
        ran = check_one_runs(both, before)
        was_told = (SOURCE, "go") in proxy.delivered
        assert ran == was_told if trouble.wrong in EXACT else ran <= was_told
        migrate_again(both, session, before, back=ran)
    return proxy


def check_told(both: Ends, codes: Set[int] = frozenset({9})) -> None:
    """Every error has the link's code, and says what became of both ends, as far as it knows."""
    for end, mine in ((both.source, both.sources), (both.destination, both.destinations)):
        if end.report is not None:
            continue
        failure = end.failure
        assert failure.code in codes or (failure.code == 21 and end is both.source)
        assert str(failure)
        here, there = failure.source_state, failure.destination_state
        if end is both.destination:
            here, there = there, here
        for device in mine:
            assert device.name in here
            assert device.name in failure.aftermath
            assert device.state().name in here
        unknown = ("the other end is not known", "the other end has had no part")
        assert there in failure.aftermath if there else any(x in failure.aftermath for x in unknown)


def check_never_both(both: Ends) -> None:
    """No source ran once a destination did with what came: by the devices' own clocks."""
    started_ns = min((first_run_ns(device.history) for device in both.destinations), default=0)
    for device in both.sources:
        since = [state for at_ns, state in device.history if at_ns >= started_ns]
        before = [state for at_ns, state in device.history if at_ns < started_ns]
        assert started_ns == NEVER_NS or (set(before[-1:] + since) <= {S.STOP, S.STOP_COPY})


def first_run_ns(history: list[tuple[int, DeviceState]]) -> int:
    """Return when a destination began to run with what was loaded."""
    states = [state for _, state in history]
    loaded = states.index(S.RESUMING) if S.RESUMING in states else len(states)
    # A reset leads to RUNNING at once; who lets a device run has it pass RUNNING_P2P.
    times = [at_ns for at_ns, state in history[loaded:] if state is S.RUNNING_P2P]
    return min(times, default=NEVER_NS)


def check_one_runs(both: Ends, before: list[bytes]) -> bool:
    """Exactly one side runs with the state, all of it. Returns whether that is the destination."""
    here, there = (
        {
            device.state() is S.RUNNING and device.content() == content
            for device, content in zip(devices, before, strict=True)
        }
        for devices in (both.sources, both.destinations)
    )
    assert (here, there) in (({True}, {False}), ({False}, {True}))
    others = both.destinations if here == {True} else both.sources
    assert {device.state() for device in others} == {S.RUNNING if here == {True} else S.STOP}
    return there == {True}


def settle(directory: Path, session: str) -> None:
    """Resolve a session of which the source does not know the outcome: the destination first."""
    there = resolve(session, directory=directory / DESTINATION)
    assert there.verdict in (Verdict.RAN, Verdict.NEVER_RAN)
    here = resolve(session, directory=directory / SOURCE, peer=there.verdict)
    assert here.was is Verdict.HELD
    wanted = Verdict.RELEASED if there.verdict is Verdict.RAN else Verdict.BACK
    assert here.verdict is wanted


def migrate_again(both: Ends, session: Session, before: list[bytes], *, back: bool) -> None:
    """Let what runs migrate to the other side: nothing is left in its way."""
    if back:
        for device in both.sources:
            device.reset()
        both = Ends(both.destinations, both.sources, both.journal)
    with Proxy() as proxy:
        migrate(both, session, proxy, LONG_NS)
    both.check_moved()
    assert both.before == before


@pytest.mark.parametrize("name", SESSIONS)
def test_the_frames_of_a_session_are_these(place: Path, name: str) -> None:
    session = SESSIONS[name]
    with no_leak(), opened(place, session) as both, Proxy() as proxy:
        migrate(both, session, proxy, LONG_NS)
        both.check_moved()
    # On a busy machine the simulator's pipe gives shorter reads: then there are more of data.
    assert proxy.delivered >= set(session.frames)
    extra = set(proxy.seen) - set(session.frames)
    assert all(sender == SOURCE and name.startswith("data ") for sender, name in extra)
    assert len(proxy.seen) == len(set(proxy.seen))


@pytest.mark.parametrize(("wrong", "index"), [(Wrong.CUT, 0), (Wrong.CUT, 1), (Wrong.HALF, 1)])
def test_one_of_two_connections_breaks_behind_each_of_its_frames(
    place: Path, wrong: Wrong, index: int
) -> None:
    for number, frame in enumerate(frames_of_connection(index)):
        below = place / str(number)
        below.mkdir()
        with no_leak():
            links = suffer_apart(below, TWO, Trouble(wrong, *frame), index)
            assert links[index].has_happened


def frames_of_connection(index: int) -> list[tuple[str, str]]:
    """Return what each of two connections carries: that of the second device carries it alone."""
    own = [(sender, name) for sender, name in TWO.frames if f" {index}" in name]
    greetings = [(SOURCE, "greeting"), (DESTINATION, "greeting")]
    if index:
        return greetings + own
    return [(sender, name) for sender, name in TWO.frames if " 1" not in name]


def suffer_apart(
    place: Path, session: Session, trouble: Trouble, index: int = 0, tls: TlsFiles | None = None
) -> list[Proxy]:
    """Migrate over one connection for each device, of which one has trouble, as suffer() does."""
    path, target, is_there = f"{place}/path", f"{place}/target", threading.Event()

    def look(event: Event) -> None:
        if isinstance(event, vfiomig.Connected):
            is_there.set()

    with (
        opened(place, session) as both,
        Relay(path, target, trouble, index, tls=tls is not None) as relay,
    ):

        def send() -> vfiomig.MigrationReport:
            assert is_there.wait(30)
            options = both.send_options(buffer_bytes=16384, tls=tls)
            return vfiomig.send(both.sources, f"unix:{path}", options)

        def receive() -> vfiomig.MigrationReport:
            options = both.receive_options(wait_ns=2 * SHORT_NS if tls else LONG_NS, tls=tls)
            return vfiomig.receive(both.destinations, f"unix:{target}", options, on_event=look)

        both.run(send, receive)
        check_told(both, {9, 13} if tls else {9})
        check_never_both(both)
        unknown, before = both.source.error, both.before
    if isinstance(unknown, vfiomig.OutcomeUnknownError):
        settle(place / "journals", unknown.session)
    with opened(place, session) as both:
        ran = check_one_runs(both, before)
        assert tls or ran <= ((SOURCE, "go") in relay.links[0].delivered)
        migrate_again(both, session, before, back=ran)
    return relay.links


EDGES = [(wrong, at) for wrong in (Wrong.CUT, Wrong.HALF) for at in (-1, 0, 1)]


@pytest.mark.parametrize(("wrong", "at"), [*EDGES, (Wrong.RESET, 0)])
@pytest.mark.parametrize(("sender", "frame"), ONE.frames)
def test_a_link_that_breaks_at_the_edge_of_a_frame(
    place: Path, wrong: Wrong, at: int, sender: str, frame: str
) -> None:
    with no_leak():
        proxy = suffer(place, ONE, Trouble(wrong, sender, frame, at))
        assert proxy.has_happened or at == 1


@pytest.mark.parametrize(("sender", "frame"), TWO.frames)
def test_a_link_of_two_devices_that_breaks_behind_a_frame(
    place: Path, sender: str, frame: str
) -> None:
    with no_leak():
        assert suffer(place, TWO, Trouble(Wrong.CUT, sender, frame)).has_happened


@pytest.mark.parametrize("at", [-1, 0])
@pytest.mark.parametrize("sender", [SOURCE, DESTINATION])
@pytest.mark.parametrize("wrong", [Wrong.SILENCE, Wrong.MUTE])
def test_a_link_that_falls_silent_at_the_edge_of_a_frame(
    place: Path, wrong: Wrong, sender: str, at: int
) -> None:
    frames = [frame for each, frame in ONE.frames if each == sender]
    suffer_all(place, [Trouble(wrong, sender, frame, at) for frame in frames])


@pytest.mark.parametrize("sender", [SOURCE, DESTINATION])
@pytest.mark.parametrize("wrong", [Wrong.DROP, Wrong.SWAP])
def test_a_link_that_loses_a_frame_or_swaps_two(place: Path, wrong: Wrong, sender: str) -> None:
    frames = [frame for each, frame in ONE.frames if each == sender]
    suffer_all(place, [Trouble(wrong, sender, frame) for frame in frames])


def suffer_all(place: Path, troubles: list[Trouble]) -> None:
    """Suffer several at once: most of each is waiting."""

    def suffer_one(trouble: Trouble) -> None:
        below = Path(tempfile.mkdtemp(dir=place))
        try:
            suffer(below, ONE, trouble, SHORT_NS)
        except BaseException as err:
            err.add_note(f"with {trouble}")
            raise

    with no_leak(), ThreadPoolExecutor(6) as pool:
        list(pool.map(suffer_one, troubles))


@pytest.mark.parametrize(("wrong", "at"), [(Wrong.FLIP, 1), (Wrong.FLIP, -1), (Wrong.DUPLICATE, 0)])
@pytest.mark.parametrize(("sender", "frame"), ONE.frames)
def test_a_link_that_repeats_or_damages_a_frame(
    place: Path, wrong: Wrong, at: int, sender: str, frame: str
) -> None:
    with no_leak():
        assert suffer(place, ONE, Trouble(wrong, sender, frame, at)).has_happened


@pytest.mark.parametrize("seed", range(SEED, SEED + 100))
def test_a_link_that_breaks_at_a_random_byte(place: Path, seed: int) -> None:
    dice = random.Random(seed)
    session = dice.choice(list(SESSIONS.values()))
    wrong = dice.choice([Wrong.CUT, Wrong.RESET, Wrong.HALF, Wrong.FLIP])
    trouble = Trouble(wrong, *dice.choice(session.frames), -dice.randrange(1, 16448))
    with no_leak():
        assert suffer(place, session, trouble).has_happened


@pytest.mark.parametrize(("sender", "frame"), ONE.frames)
def test_a_link_that_is_slow_changes_nothing(place: Path, sender: str, frame: str) -> None:
    with no_leak(), opened(place, ONE) as both:
        trouble = Trouble(Wrong.DELAY, sender, frame, delay_ns=50_000_000)
        with Proxy(trouble) as proxy:
            migrate(both, ONE, proxy, LONG_NS)
        both.check_moved()
        check_never_both(both)
        assert proxy.has_happened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return TlsFiles(Authority(tmp_path_factory.mktemp("pki")).directory())


@pytest.mark.parametrize("seed", range(SEED, SEED + 24))
def test_tls_that_is_cut_or_damaged_at_a_random_byte(
    place: Path, files: TlsFiles, seed: int
) -> None:
    dice = random.Random(seed)
    wrong = (Wrong.FLIP, Wrong.CUT, Wrong.HALF)[seed % 3]
    sender, record = dice.choice([(SOURCE, 20), (DESTINATION, 12)])
    name = f"record#{dice.randrange(2, record)}"
    trouble = Trouble(wrong, sender, name, -dice.randrange(1, 16448))
    with no_leak():
        suffer_apart(place, ONE, trouble, tls=files)
