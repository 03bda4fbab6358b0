"""vfiomig resolve: devices left in every state, by every kind of journal, on one host and two."""

import os
import shlex
import stat
from functools import partial
from pathlib import Path

import pytest

import vfiomig
from cli_runner import VFIOMIG, Run, run, state_of
from devices import failure_of, no_leak
from vfiomig import DeviceState as S
from vfiomig.errors import DeviceBusyError, NoSuchDeviceError, OutcomeUnknownError, UsageError
from vfiomig.live.journal import Journal, Role, read_journal
from vfiomig.live.resolve import Resolution, resolve
from vfiomig.live.verdict import Verdict
from vfiomig.report import Event, StateChange

SESSION = "5e55" + "0" * 28
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty directory, with the journals in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VFIOMIG_JOURNAL", str(tmp_path / "journals"))
    return tmp_path


def left(name: str, *states: S, **parameters: str) -> str:
    """Make a device, as a process left it that went through states."""
    query = "&".join(f"{key}={value}" for key, value in ({"size": "3000"} | parameters).items())
    with vfiomig.open_device(f"sim:{name}?{query}") as device:
        for state in states:
            device.set_state(state)
    return f"sim:{name}"


def journal(
    role: Role,
    *events: str,
    devices: tuple[str, ...],
    session: str = SESSION,
    where: str = "journals",
) -> Path:
    """Write a journal, as a process left it."""
    begun = Journal.create(Path(where), session, role, {"devices": list(devices)})
    for event in events:
        begun.record(event)
    begun.close()
    return begun.path


def content(device: str) -> bytes:
    return Path(device.removeprefix("sim:")).read_bytes()


def events(path: Path) -> list[str]:
    record = read_journal(path)
    assert not record.is_damaged
    return [event.event for event in record.events]


def settled(peer: Verdict | None = None) -> Resolution:
    with no_leak():
        return resolve(SESSION, peer=peer)


# A source.

STOPPED = [(S.STOP,), (S.STOP_COPY,), (S.PRE_COPY, S.STOP_COPY)]
RUNNING = [(), (S.PRE_COPY,), (S.PRE_COPY, S.PRE_COPY_P2P), (S.RUNNING_P2P,)]


@pytest.mark.parametrize("states", [*RUNNING, *STOPPED])
def test_a_source_that_gave_no_go_runs_again_wherever_it_was(states: tuple[S, ...]) -> None:
    device = left("a", *states)
    before = content(device)
    path = journal(SOURCE, "ready", devices=(device,))
    done = settled()
    assert (done.was, done.verdict) == (Verdict.MAY_RUN, Verdict.BACK)
    assert done.devices == ((device, "RUNNING"),)
    assert state_of(device) == "RUNNING"
    assert content(device) == before
    assert events(path) == ["begun", "ready", "back", "resolved"]


@pytest.mark.parametrize("states", STOPPED)
@pytest.mark.parametrize("word", [None, Verdict.MAY_HAVE_RUN, Verdict.UNKNOWN, Verdict.HELD])
def test_a_source_that_gave_go_stays_as_it_is_without_a_word_that_decides(
    states: tuple[S, ...], word: Verdict | None
) -> None:
    device = left("a", *states)
    path = journal(SOURCE, "ready", "go", devices=(device,))
    err = failure_of(lambda: resolve(SESSION, peer=word))
    assert isinstance(err, OutcomeUnknownError)
    assert (err.code, err.session) == (21, SESSION)
    assert "nothing was changed" in str(err)
    assert "--peer never-ran|ran" in err.hint
    assert state_of(device) == states[-1].name
    assert events(path) == ["begun", "ready", "go"]


@pytest.mark.parametrize("states", STOPPED)
def test_a_source_that_gave_go_runs_again_once_the_destination_never_ran(
    states: tuple[S, ...],
) -> None:
    device = left("a", *states)
    before = content(device)
    path = journal(SOURCE, "ready", "go", devices=(device,))
    assert settled(peer=Verdict.NEVER_RAN).verdict is Verdict.BACK
    assert (state_of(device), content(device)) == ("RUNNING", before)
    assert events(path)[-2:] == ["back", "resolved"]
    assert read_journal(path).events[-2].facts == {"by": "resolve", "word": "never-ran"}


@pytest.mark.parametrize("states", STOPPED)
def test_a_source_is_released_and_stays_stopped_once_the_destination_ran(
    states: tuple[S, ...],
) -> None:
    device = left("a", *states)
    before = content(device)
    path = journal(SOURCE, "ready", "go", devices=(device,))
    assert settled(peer=Verdict.RAN).verdict is Verdict.RELEASED
    assert (state_of(device), content(device)) == ("STOP", before)
    assert events(path)[-2:] == ["released", "resolved"]


def test_a_source_that_gave_no_go_does_not_believe_that_the_destination_ran() -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, "ready", devices=(device,))
    assert failure_of(lambda: resolve(SESSION, peer=Verdict.RAN)).code == 21
    assert state_of(device) == "STOP_COPY"


def test_a_source_in_error_is_reset_and_that_is_said() -> None:
    with vfiomig.open_device("sim:a?size=3000&fault=set:EIO@STOP_COPY:ERROR") as opened:
        failure_of(lambda: opened.set_state(S.STOP_COPY))
    assert state_of("sim:a") == "ERROR"
    journal(SOURCE, devices=("sim:a",))
    done = settled()
    assert done.devices == (("sim:a", "RUNNING"),)
    assert "sim:a had to be reset: its state is lost" in done.did


def test_a_source_that_somebody_loads_is_not_touched() -> None:
    device = left("a", S.RESUMING)
    path = journal(SOURCE, devices=(device,))
    assert isinstance(failure_of(lambda: resolve(SESSION)), DeviceBusyError)
    assert state_of(device) == "RESUMING"
    assert events(path) == ["begun"]


def test_several_devices_run_again_together_with_p2p_first() -> None:
    devices = tuple(left(name, S.STOP_COPY) for name in "abc")
    journal(SOURCE, devices=devices)
    seen: list[Event] = []
    resolve(SESSION, on_event=seen.append)
    entered = [event.actual for event in seen if isinstance(event, StateChange)]
    assert entered == [S.STOP, S.RUNNING_P2P] * 3 + [S.RUNNING] * 3


def test_a_released_device_that_is_gone_is_released_all_the_same() -> None:
    path = journal(SOURCE, "go", devices=("sim:gone", "sim:?size=3000", "unix:/none/at/all"))
    done = settled(peer=Verdict.RAN)
    assert events(path)[-2:] == ["released", "resolved"]
    assert done.did.count("it is gone") == 3
    assert not Path("gone").exists()


def test_a_device_that_is_gone_cannot_run_again() -> None:
    device = left("a", S.STOP)
    path = journal(SOURCE, devices=(device, "sim:gone"))
    assert isinstance(failure_of(lambda: resolve(SESSION)), DeviceBusyError)
    assert events(path) == ["begun"]
    assert state_of(device) == "STOP"


# A destination.

UNCOMMITTED: list[tuple[S, ...]] = [(S.RESUMING,), (S.STOP,), (S.STOP, S.RUNNING_P2P)]


@pytest.mark.parametrize("states", UNCOMMITTED)
@pytest.mark.parametrize("recorded", [(), ("ready",)])
def test_a_destination_that_got_no_go_is_reset_and_forgets(
    states: tuple[S, ...], recorded: tuple[str, ...]
) -> None:
    device = left("b", *states)
    before = content(device)
    path = journal(DESTINATION, *recorded, devices=(device,))
    done = settled()
    assert (done.was, done.verdict) == (Verdict.NEVER_RAN, Verdict.NEVER_RAN)
    assert state_of(device) == "RUNNING"
    assert content(device) != before
    assert events(path)[-2:] == ["forgotten", "resolved"]


def test_a_destination_that_got_no_go_leaves_alone_what_runs() -> None:
    device = left("b")
    before = content(device)
    journal(DESTINATION, "ready", devices=(device,))
    assert settled().verdict is Verdict.NEVER_RAN
    assert content(device) == before


@pytest.mark.parametrize("states", [(S.STOP,), (S.STOP, S.RUNNING_P2P), ()])
def test_a_destination_that_got_go_runs(states: tuple[S, ...]) -> None:
    device = left("b", *states)
    before = content(device)
    path = journal(DESTINATION, "ready", "go", devices=(device,))
    done = settled()
    assert (done.was, done.verdict) == (Verdict.MAY_HAVE_RUN, Verdict.RAN)
    assert (state_of(device), content(device)) == ("RUNNING", before)
    assert events(path)[-2:] == ["running", "resolved"]


def test_a_destination_of_which_some_run_already_runs_as_a_whole() -> None:
    devices = (left("a"), left("b", S.STOP))
    journal(DESTINATION, "ready", "go", devices=devices)
    assert settled().verdict is Verdict.RAN
    assert [state_of(device) for device in devices] == ["RUNNING", "RUNNING"]


def test_a_destination_that_got_go_and_cannot_run_is_reset_as_a_whole_and_forgets() -> None:
    devices = (left("a", S.STOP), left("b", S.STOP))
    before = content(devices[0])
    path = journal(
        DESTINATION, "ready", "go", devices=(devices[0], f"{devices[1]}?fault=set:EIO@RUNNING")
    )
    done = settled()
    assert (done.was, done.verdict) == (Verdict.MAY_HAVE_RUN, Verdict.NEVER_RAN)
    assert "could not run" in done.did
    assert events(path)[-3:] == ["forgetting", "forgotten", "resolved"]
    assert content(devices[0]) != before
    assert [state_of(device) for device in devices] == ["RUNNING", "RUNNING"]


def test_a_destination_that_was_about_to_forget_forgets_what_runs_too() -> None:
    device = left("b")
    before = content(device)
    path = journal(DESTINATION, "ready", "go", "forgetting", devices=(device,))
    assert settled().verdict is Verdict.NEVER_RAN
    assert content(device) != before
    assert events(path)[-2:] == ["forgotten", "resolved"]


@pytest.mark.parametrize("devices", [("sim:gone",), ("sim:?size=3000",), ()])
def test_a_destination_that_nobody_kept_asks(devices: tuple[str, ...]) -> None:
    path = journal(DESTINATION, "ready", "go", devices=devices)
    err = failure_of(lambda: resolve(SESSION))
    assert isinstance(err, OutcomeUnknownError)
    assert "--peer ran" in err.hint
    assert events(path) == ["begun", "ready", "go"]


def test_a_destination_in_resuming_after_go_asks() -> None:
    device = left("b", S.RESUMING)
    journal(DESTINATION, "ready", "go", devices=(device,))
    err = failure_of(lambda: resolve(SESSION))
    assert (err.code, state_of(device)) == (21, "RESUMING")
    assert "sim:b is in RESUMING" in str(err)


@pytest.mark.parametrize(
    ("word", "verdict"), [(Verdict.BACK, Verdict.NEVER_RAN), (Verdict.RELEASED, Verdict.RAN)]
)
def test_a_destination_that_does_not_know_believes_the_source(
    word: Verdict, verdict: Verdict
) -> None:
    journal(DESTINATION, "ready", "go", devices=("sim:gone",))
    assert settled(peer=word).verdict is verdict


@pytest.mark.parametrize("states", [(S.PRE_COPY,), (S.STOP_COPY,)])
def test_a_destination_that_somebody_saves_is_not_touched(states: tuple[S, ...]) -> None:
    device = left("b", *states)
    path = journal(DESTINATION, devices=(device,))
    assert isinstance(failure_of(lambda: resolve(SESSION)), DeviceBusyError)
    assert (state_of(device), events(path)) == (states[-1].name, ["begun"])


# What has been decided.

DECIDED = [
    (SOURCE, ("go", "released"), Verdict.RELEASED),
    (SOURCE, ("go", "released", "done"), Verdict.RELEASED),
    (SOURCE, ("back",), Verdict.BACK),
    (DESTINATION, ("ready", "go", "running"), Verdict.RAN),
    (DESTINATION, ("forgotten",), Verdict.NEVER_RAN),
]


@pytest.mark.parametrize(("role", "recorded", "verdict"), DECIDED)
def test_what_was_decided_stays_and_no_device_is_opened(
    role: Role, recorded: tuple[str, ...], verdict: Verdict
) -> None:
    device = left("a", S.STOP)
    path = journal(role, *recorded, devices=(device,))
    done = settled()
    assert (done.was, done.verdict, done.devices) == (verdict, verdict, ((device, ""),))
    assert state_of(device) == "STOP"
    assert events(path) == ["begun", *recorded]


@pytest.mark.parametrize(
    ("role", "recorded", "word"),
    [
        (SOURCE, "back", Verdict.RAN),
        (SOURCE, "released", Verdict.NEVER_RAN),
        (DESTINATION, "running", Verdict.BACK),
    ],
)
def test_two_words_that_contradict_each_other_are_said(
    role: Role, recorded: str, word: Verdict
) -> None:
    journal(role, "go", recorded, devices=())
    err = failure_of(lambda: resolve(SESSION, peer=word))
    assert err.code == 21
    assert "by hand" in err.hint


def test_resolve_twice_is_resolve_once() -> None:
    device = left("a", S.STOP_COPY)
    path = journal(SOURCE, devices=(device,))
    first, before = settled(), path.read_bytes()
    second = settled()
    assert (first.verdict, second.verdict) == (Verdict.BACK, Verdict.BACK)
    assert path.read_bytes() == before


# Journals that do not say.


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1])  # what they said can be read, and not relied on


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("recorded", [(), ("ready",), ("ready", "go")])
def test_a_damaged_journal_is_never_guessed_about(role: Role, recorded: tuple[str, ...]) -> None:
    device = left("a", S.STOP)
    damage(journal(role, *recorded, devices=(device,)))
    err = failure_of(lambda: resolve(SESSION))
    assert isinstance(err, OutcomeUnknownError)
    assert "its journal is damaged" in str(err)
    assert state_of(device) == "STOP"


def cut_last_line(path: Path) -> None:
    """Damage the last line alone: what was before can be relied on."""
    data = path.read_bytes()
    end = len(data.rstrip())
    path.write_bytes(data[: end - 1] + b" " + data[end:])


@pytest.mark.parametrize(
    ("word", "verdict", "state"),
    [(Verdict.NEVER_RAN, Verdict.BACK, "RUNNING"), (Verdict.RAN, Verdict.RELEASED, "STOP")],
)
def test_a_source_with_a_damaged_journal_goes_by_what_the_destination_says(
    word: Verdict, verdict: Verdict, state: str
) -> None:
    device = left("a", S.STOP_COPY)
    path = journal(SOURCE, "ready", "go", devices=(device,))
    cut_last_line(path)
    before = path.read_bytes()
    done = settled(peer=word)
    assert (done.was, done.verdict, state_of(device)) == (Verdict.UNKNOWN, verdict, state)
    assert "was not recorded" in done.did
    assert path.read_bytes() == before


@pytest.mark.parametrize("recorded", ["released", "back", "of-a-newer-version"])
def test_a_journal_that_contradicts_itself_decides_nothing(recorded: str) -> None:
    device = left("a", S.STOP)
    path = journal(SOURCE, "go", recorded, "running", devices=(device,))
    for word in (None, Verdict.NEVER_RAN, Verdict.RAN):
        assert failure_of(partial(resolve, SESSION, peer=word)).code == 21
    assert (state_of(device), len(events(path))) == ("STOP", 4)


def test_a_damaged_journal_that_had_an_end_decides_nothing() -> None:
    device = left("a", S.STOP)
    path = journal(SOURCE, "go", "released", "done", devices=(device,))
    cut_last_line(path)
    assert failure_of(lambda: resolve(SESSION, peer=Verdict.NEVER_RAN)).code == 21
    assert state_of(device) == "STOP"


# Who else is there.


def test_a_session_that_lives_is_left_alone() -> None:
    device = left("a", S.STOP_COPY)
    living = Journal.create(Path("journals"), SESSION, SOURCE, {"devices": [device]})
    err = failure_of(lambda: resolve(SESSION, peer=Verdict.NEVER_RAN))
    assert isinstance(err, DeviceBusyError)
    assert f"process {os.getpid()} is still at work" in str(err)
    assert failure_of(lambda: resolve(SESSION, peer=Verdict.NEVER_RAN, dry_run=True)).code == 5
    living.record("go")
    living.record("released")
    assert resolve(SESSION).verdict is Verdict.RELEASED  # it has decided, and may take its time
    living.close()


def test_a_device_that_a_later_session_has_had_is_left_alone() -> None:
    device = left("a", S.STOP)
    first = journal(SOURCE, devices=(device,))
    later = "1a7e" + "0" * 28
    journal(SOURCE, "go", devices=(f"{os.path.abspath('a')}?seed=1",), session=later)
    journal(SOURCE, "go", devices=("sim:./a",), session=later[:-1] + "1")
    err = failure_of(lambda: resolve(SESSION))
    assert isinstance(err, DeviceBusyError)
    assert later[:-1] in str(err)
    assert (state_of(device), events(first)) == ("STOP", ["begun"])


def test_a_destination_of_which_a_later_session_has_the_device_forgets_without_a_reset() -> None:
    device = left("b", S.STOP)
    journal(DESTINATION, devices=(device,))
    journal(SOURCE, devices=(device,), session="1a7e" + "0" * 28)
    assert settled().verdict is Verdict.NEVER_RAN
    assert state_of(device) == "STOP"


# Both journals on one host.


@pytest.mark.parametrize(
    ("recorded", "verdict", "states"),
    [
        (("ready",), Verdict.BACK, ("RUNNING", "RUNNING")),
        (("ready", "go"), Verdict.RELEASED, ("STOP", "RUNNING")),
        (("ready", "go", "running"), Verdict.RELEASED, ("STOP", "STOP")),
    ],
)
def test_with_both_journals_the_destination_decides_first(
    recorded: tuple[str, ...], verdict: Verdict, states: tuple[str, str]
) -> None:
    source, destination = left("a", S.STOP_COPY), left("b", S.STOP)
    journal(SOURCE, "ready", "go", devices=(source,))
    journal(DESTINATION, *recorded, devices=(destination,))
    done = settled()
    assert (done.role, done.verdict) == (SOURCE, verdict)
    assert done.destination is not None
    assert (state_of(source), state_of(destination)) == states


def test_one_role_of_two_is_resolved_when_it_is_asked_for() -> None:
    source, destination = left("a", S.STOP_COPY), left("b", S.STOP)
    journal(SOURCE, "ready", "go", devices=(source,))
    journal(DESTINATION, "ready", devices=(destination,))
    assert resolve(SESSION, role=DESTINATION).verdict is Verdict.NEVER_RAN
    assert state_of(source) == "STOP_COPY"


def test_a_source_may_still_run_again_when_its_destination_does_not_know() -> None:
    source = left("a", S.STOP_COPY)
    journal(SOURCE, devices=(source,))
    damage(journal(DESTINATION, devices=()))
    assert settled().verdict is Verdict.BACK


# Finding it.


def test_a_session_may_be_abbreviated_and_must_be_one() -> None:
    journal(SOURCE, "back", devices=())
    journal(SOURCE, "back", devices=(), session="5e56" + "0" * 28)
    assert resolve("5e55").session == SESSION
    assert resolve("5E55").session == SESSION
    for text in ("5e5", "", "../5e55", "xyzw", "5e55/"):
        assert isinstance(failure_of(partial(resolve, text)), UsageError), text
    assert isinstance(failure_of(lambda: resolve("ffff")), NoSuchDeviceError)
    journal(SOURCE, "back", devices=(), session="5e55" + "1" * 28)
    assert "may be any of" in str(failure_of(lambda: resolve("5e55")))
    assert isinstance(failure_of(lambda: resolve(SESSION, role=DESTINATION)), NoSuchDeviceError)


# The command.


def test_the_command_lists_what_there_is() -> None:
    none = run("resolve")
    assert (none.code, none.err) == (0, "")
    assert "no session has a journal in" in none.out
    journal(SOURCE, "ready", "go", devices=("sim:a", "sim:b"))
    damage(journal(DESTINATION, devices=("sim:c",), session="ab" * 16))
    listed = run("resolve")
    assert listed.code == 0
    lines = listed.out.splitlines()
    assert lines[0].split() == ["SESSION", "ROLE", "LAST", "VERDICT", "AGE", "DEVICES"]
    assert lines[1].split()[:4] == ["ab" * 16, "destination", "begun", "unknown"]
    assert lines[2].split()[:4] == [SESSION, "source", "go", "held"]
    assert lines[2].endswith("sim:a sim:b")
    sessions = run("resolve", "--json").last["sessions"]
    assert [one["verdict"] for one in sessions] == ["unknown", "held"]
    assert sessions[1]["devices"] == ["sim:a", "sim:b"]


def test_the_command_says_what_it_did_to_people_and_to_programs() -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, devices=(device,))
    dry = run("resolve", "5e55", "--dry-run")
    assert (dry.code, state_of(device)) == (0, "STOP_COPY")
    assert "would be: back: GO was not given: the source runs again" in dry.out
    done = run("resolve", "5e55")
    assert (done.code, done.err) == (0, "")
    assert f"session {SESSION}, source: back: GO was not given: the source runs again" in done.out
    assert "sim:a is RUNNING" in done.out
    again = run("resolve", "5e55", "--json").last
    assert (again["type"], again["verdict"], again["was"]) == ("result", "back", "back")


def test_a_dry_run_changes_nothing_on_either_side() -> None:
    source, destination = left("a", S.STOP_COPY), left("b", S.RESUMING)
    paths = (
        journal(SOURCE, "ready", "go", devices=(source,)),
        journal(DESTINATION, "ready", devices=(destination,)),
    )
    before = [path.read_bytes() for path in paths]
    found = run("resolve", SESSION, "--dry-run", "--json").last
    assert (found["verdict"], found["destination"]["verdict"]) == ("back", "never-ran")
    assert found["dry_run"] is True
    assert [path.read_bytes() for path in paths] == before
    assert [state_of(source), state_of(destination)] == ["STOP_COPY", "RESUMING"]


@pytest.mark.parametrize(
    ("word", "state", "verdict"), [("ran", "STOP", "released"), ("never-ran", "RUNNING", "back")]
)
def test_the_command_takes_the_operators_word(word: str, state: str, verdict: str) -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, "ready", "go", devices=(device,))
    unknown = run("resolve", SESSION, "--json")
    assert (unknown.code, unknown.last["error"]) == (21, "OutcomeUnknownError")
    done = run("resolve", SESSION, "--peer", word, "--json")
    assert (done.code, done.last["verdict"], state_of(device)) == (0, verdict, state)


@pytest.mark.parametrize(
    ("recorded", "code", "state"),
    [
        (("ready", "go", "running"), 0, "STOP"),
        (("ready", "forgotten"), 0, "RUNNING"),
        (("ready",), 21, "STOP_COPY"),  # it says so today: tomorrow it might get a GO
        (("ready", "go"), 21, "STOP_COPY"),
    ],
)
def test_the_command_believes_what_is_final_in_a_copy_of_the_other_journal(
    recorded: tuple[str, ...], code: int, state: str
) -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, "ready", "go", devices=(device,))
    copy = journal(DESTINATION, *recorded, devices=("sim:b",), where="theirs")
    copy = copy.rename("copy")
    assert run("resolve", SESSION, "--peer-journal", copy).code == code
    assert state_of(device) == state


def test_the_command_does_not_believe_a_damaged_copy_nor_that_of_another_session() -> None:
    device = left("a", S.STOP_COPY)
    own = journal(SOURCE, "ready", "go", devices=(device,))
    copy = journal(DESTINATION, "forgotten", devices=(), where="theirs")
    damage(copy)
    assert run("resolve", SESSION, "--peer-journal", copy).code == 21
    other = journal(DESTINATION, "forgotten", devices=(), session="ab" * 16, where="theirs")
    assert run("resolve", SESSION, "--peer-journal", other).code == 2
    assert run("resolve", SESSION, "--peer-journal", own).code == 2
    assert run("resolve", SESSION, "--peer-journal", "none").code == 5
    assert state_of(device) == "STOP_COPY"


BAD = {
    "no such session": (["ffff"], 5, "there is no session"),
    "no session": (["zz"], 2, "is no session"),
    "two words": (["5e55", "--peer", "ran", "--via", "ssh:host"], 2, "not allowed with"),
    "no host": (["5e55", "--via", "ssh:"], 2, "is not ssh:HOST"),
    "an option for a host": (["5e55", "--via", "ssh:-oProxyCommand=true"], 2, "is not ssh:HOST"),
    "no journals": (["5e55", "--journal", "elsewhere"], 5, "elsewhere"),
    "the destination's own word": (["5e55", "--peer", "ran"], 2, "its journal is this one"),
}


@pytest.mark.parametrize(("words", "code", "text"), BAD.values(), ids=BAD)
def test_bad_requests_are_sentences(words: list[str], code: int, text: str) -> None:
    journal(DESTINATION, "ready", "go", devices=())
    found = run("resolve", *words)
    assert (found.code, found.out) == (code, "")
    assert text in found.err


# The other host, through ssh.


@pytest.fixture
def other_host(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in ssh's place: it runs vfiomig here, with the other host's journals."""
    script = here / "ssh"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {shlex.quote(str(here / "asked"))}\n'
        '[ "$1" = -q ] && shift\n'
        '[ "$1 $2" = "otherhost vfiomig" ] || { echo "no route to $1" >&2; exit 255; }\n'
        f"export VFIOMIG_JOURNAL={shlex.quote(str(here / 'theirs'))}\n"
        "shift 2\n"
        f'exec {shlex.quote(VFIOMIG)} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("VFIOMIG_SSH", f"{shlex.quote(str(script))} -q")
    return here / "theirs"


def via(*words: str) -> Run:
    return run("resolve", SESSION, "--via", "ssh:otherhost", "--json", *words)


@pytest.mark.parametrize(
    ("recorded", "verdict", "states"),
    [
        ((), "back", ("RUNNING", "RUNNING")),
        (("ready",), "back", ("RUNNING", "RUNNING")),
        (("ready", "go"), "released", ("STOP", "RUNNING")),
    ],
)
def test_both_hosts_are_resolved_by_one_command(
    other_host: Path, recorded: tuple[str, ...], verdict: str, states: tuple[str, str]
) -> None:
    source, destination = left("a", S.STOP_COPY), left("b", S.STOP)
    journal(SOURCE, "ready", "go", devices=(source,))
    path = journal(
        DESTINATION, *recorded, devices=(f"sim:{os.path.abspath('b')}",), where=str(other_host)
    )
    dry = via("--dry-run")
    assert (dry.code, dry.last["verdict"]) == (0, verdict)
    assert events(path) == ["begun", *recorded]
    done = via()
    assert (done.code, done.last["verdict"]) == (0, verdict)
    assert (state_of(source), state_of(destination)) == states
    assert read_journal(path).is_final
    asked = Path("asked").read_text().splitlines()
    wanted = f"-q otherhost vfiomig resolve {SESSION} --role destination --json"
    assert asked == [f"{wanted} --dry-run", wanted]


def test_what_the_other_host_does_not_know_decides_nothing(other_host: Path) -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, "ready", "go", devices=(device,))
    journal(DESTINATION, "ready", "go", devices=("sim:gone",), where=str(other_host))
    found = via()
    assert (found.code, state_of(device)) == (21, "STOP_COPY")
    assert "whether it ran here is not known" in found.documents[0]["text"]


@pytest.mark.parametrize(
    ("ssh", "text"),
    [
        (None, "there is no session"),
        ("false", "gave no answer (exit code 1)"),
        ("/none/ssh", "cannot run /none/ssh"),
        ("echo {}", "does not say what became of"),
        ("echo [1]", "gave no answer"),
        (r"printf \\377", "gave no answer"),
        ("head -c 99999 /dev/zero | tr \\\\0 [", "gave no answer"),
        ("head -c 9999999 /dev/zero", "gave no answer"),
        (r"echo {\"session\": \"x\", \"verdict\": \"never-ran\"}", "does not say what became"),
    ],
)
def test_another_host_that_does_not_answer_is_a_peer_that_failed(
    other_host: Path, monkeypatch: pytest.MonkeyPatch, ssh: str | None, text: str
) -> None:
    device = left("a", S.STOP_COPY)
    journal(SOURCE, "ready", "go", devices=(device,))
    if ssh is not None:
        # What stands behind the command is the host's words.
        command = ssh if ssh.startswith("/") else f"sh -c {shlex.quote(ssh)}"
        monkeypatch.setenv("VFIOMIG_SSH", command)
    found = via()
    assert (found.code, found.last["error"]) == (9, "PeerError")
    assert text in found.last["message"]
    assert state_of(device) == "STOP_COPY"
