"""Ends of a live migration are killed, or stopped for a while: one side runs, with the state."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from live_kills import Violation
from live_soak import SMALL, STOP_EACH, Rounds
from live_victims import OUTCOME_UNKNOWN, PEER_FAILED, SUCCESS, Blow
from vfiomig.live import handover
from vfiomig.live.handover import Act, Destination, DestinationEvent, Source, SourceEvent
from vfiomig.live.verdict import Role

SEED = 20
SOAK = Path(__file__).parent.parent / "tools" / "soak"
STOPS = range(STOP_EACH - 1, 6 * STOP_EACH, STOP_EACH)
KILLS = [number for number in range(42) if number not in STOPS]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    return Rounds(tmp_path_factory.mktemp("kills"), SEED)


@pytest.mark.parametrize("number", KILLS)
def test_after_a_kill_one_side_runs_with_the_whole_state(rounds: Rounds, number: int) -> None:
    rounds.play(number)


@pytest.mark.parametrize("number", STOPS)
def test_after_a_silence_one_side_runs_with_the_whole_state(rounds: Rounds, number: int) -> None:
    rounds.play(number)


# Who dies, just before or after what, and where it runs when both sides were resolved.
AROUND_GO = [
    (Role.SOURCE, "before begin journal", Role.SOURCE),
    (Role.SOURCE, "before record go", Role.SOURCE),
    (Role.SOURCE, "after record go", Role.SOURCE),
    (Role.SOURCE, "after say Go", Role.DESTINATION),
    (Role.SOURCE, "before record released", Role.DESTINATION),
    (Role.DESTINATION, "before begin journal", Role.SOURCE),
    (Role.DESTINATION, "before record ready", Role.SOURCE),
    (Role.DESTINATION, "after say Ready", Role.SOURCE),
    (Role.DESTINATION, "before record go", Role.SOURCE),
    (Role.DESTINATION, "after record go", Role.DESTINATION),
    (Role.DESTINATION, "before record running", Role.DESTINATION),
    (Role.DESTINATION, "before say Done", Role.DESTINATION),
]


@pytest.mark.parametrize(("role", "point", "runs_at"), AROUND_GO)
def test_where_it_runs_depends_on_what_was_done_before_the_kill(
    rounds: Rounds, role: Role, point: str, runs_at: Role
) -> None:
    found = rounds.strike(f"{role} {point}", SMALL, Blow(role, signal.SIGKILL, point))
    assert (found.struck, found.runs_at) == (f"{role} killed", runs_at)


# Who is stopped for longer than the other waits, what both end with, and where it runs.
AWAY = [
    (Role.SOURCE, "after record go", PEER_FAILED, PEER_FAILED, Role.SOURCE),
    (Role.DESTINATION, "before record go", OUTCOME_UNKNOWN, SUCCESS, Role.DESTINATION),
    (Role.DESTINATION, "before say Done", OUTCOME_UNKNOWN, SUCCESS, Role.DESTINATION),
]


@pytest.mark.parametrize(("role", "point", "here", "there", "runs_at"), AWAY)
def test_an_end_that_comes_back_too_late_finds_its_place(
    rounds: Rounds, role: Role, point: str, here: int, there: int, runs_at: Role
) -> None:
    found = rounds.strike(f"{role} stopped {point}", SMALL, Blow(role, signal.SIGSTOP, point))
    assert (found.codes, found.runs_at) == ((here, there), runs_at)


def source_runs_whenever_the_link_breaks() -> None:
    back = (Source.BACK, (Act.RUN, Act.RECORD_BACK))
    handover.SOURCE[Source.GOING, SourceEvent.FAILED] = back


def source_says_go_before_it_is_recorded() -> None:
    going = (Source.GOING, (Act.SAY_GO, Act.RECORD_GO))
    handover.SOURCE[Source.BEFORE, SourceEvent.READY] = going


def destination_runs_before_go_is_recorded() -> None:
    going = (Destination.GOING, (Act.RUN, Act.RECORD_GO))
    handover.DESTINATION[Destination.READY, DestinationEvent.GO] = going


def destination_keeps_what_it_says_it_has_forgotten() -> None:
    forgotten = (Destination.FORGOTTEN, (Act.RECORD_FORGOTTEN, Act.SAY_NEVER_RAN))
    handover.DESTINATION[Destination.READY, DestinationEvent.FAILED] = forgotten


@pytest.mark.parametrize(
    ("cheat", "role", "point", "found"),
    [
        (
            source_runs_whenever_the_link_breaks,
            Role.DESTINATION,
            "after record running",
            "both run with the state",
        ),
        (
            source_says_go_before_it_is_recorded,
            Role.SOURCE,
            "after say Go",
            "GO was not given, and the destination says ran",
        ),
        (
            destination_runs_before_go_is_recorded,
            Role.DESTINATION,
            "after do RUN",
            "both run with the state",
        ),
        (
            destination_keeps_what_it_says_it_has_forgotten,
            Role.SOURCE,
            "before record go",
            "the destination ended with 9, and its devices say otherwise",
        ),
    ],
)
def test_a_hand_over_that_cheats_is_found(
    tmp_path: Path, cheat: Callable[[], None], role: Role, point: str, found: str
) -> None:
    with pytest.raises(Violation, match=found):
        Rounds(tmp_path, SEED, cheat).strike("0", SMALL, Blow(role, signal.SIGKILL, point))


def test_the_soak_says_what_it_came_to() -> None:
    command = [str(SOAK), "--kills", "1", "--seed", str(SEED)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"1 kills, seed {SEED}: ")
