"""The journal: private, locked, whole or not there; and no damage to it goes unseen."""

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from devices import failure_of, names_in, no_leak
from vfiomig.errors import (
    DeviceBusyError,
    LocalIOError,
    MigrationError,
    NoSuchDeviceError,
    StreamMismatchError,
)
from vfiomig.live.journal import Journal, Role, journal_directory, read_journal, sessions
from vfiomig.live.record import Record, parse
from vfiomig.live.verdict import Verdict

SESSION = "0123456789abcdef" * 2
FACTS = {"devices": ["sim:a", "unix:/run/b.sock"], "address": "tcp:there:4444"}


def begun(directory: Path, *events: str, role: Role = Role.SOURCE, session: str = SESSION) -> Path:
    """Write a journal, as a process would that then has ended."""
    journal = Journal.create(directory, session, role, FACTS)
    for event in events:
        journal.record(event)
    journal.close()
    return journal.path


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    with no_leak():
        path = begun(tmp_path, "go", "released")
        record = read_journal(path)
    assert (record.session, record.role, record.devices) == (
        SESSION,
        "source",
        tuple(FACTS["devices"]),
    )
    assert record.facts["address"] == "tcp:there:4444"
    assert record.facts["pid"] == os.getpid()
    assert [event.event for event in record.events] == ["begun", "go", "released"]
    assert (record.damage, record.is_live, record.verdict) == ("", False, Verdict.RELEASED)
    assert 0 <= record.age_ns < 60 * 10**9


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_journal_is_its_users_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    directory = tmp_path / "new" / "journals"
    if umask:
        directory.mkdir(parents=True, mode=0o700)
    before = os.umask(umask)
    try:
        path = begun(directory)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert names_in(directory) == [f"{SESSION}.source.journal"]


def test_a_session_is_used_once(tmp_path: Path) -> None:
    path = begun(tmp_path, "go")
    before = path.read_bytes()
    err = failure_of(lambda: begun(tmp_path))
    assert isinstance(err, StreamMismatchError)
    assert err.code == 8
    assert path.read_bytes() == before
    assert names_in(tmp_path) == [path.name]
    begun(tmp_path, role=Role.DESTINATION)  # the other side of it may be here


def test_a_link_in_a_journals_place_is_neither_followed_nor_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = tmp_path / f"{SESSION}.source.journal"
    link.symlink_to(target)
    assert failure_of(lambda: begun(tmp_path)).code == 8
    assert isinstance(failure_of(lambda: read_journal(link)), LocalIOError)
    assert isinstance(failure_of(lambda: Journal.reopen(link)), LocalIOError)
    assert target.read_bytes() == b"precious"


def test_what_is_no_file_does_not_make_anybody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        assert isinstance(failure_of(partial(read_journal, path)), LocalIOError)
    assert isinstance(failure_of(lambda: read_journal(tmp_path / "none")), NoSuchDeviceError)


def test_a_directory_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "anybody may write" in str(failure_of(lambda: begun(tmp_path)))
    tmp_path.chmod(0o1777)
    begun(tmp_path)


# Damage.


def is_unseen(path: Path, data: bytes) -> bool:
    record = parse(data, path, is_live=False)
    return not (record.is_damaged and record.verdict is Verdict.UNKNOWN)


def test_a_journal_that_is_cut_anywhere_says_nothing(tmp_path: Path) -> None:
    path = begun(tmp_path, "go", "back")
    whole = path.read_bytes()
    text = len(whole.rstrip())
    # Every byte of the text, and of the room behind it a few.
    places = [*range(text + 2), *range(text + 2, len(whole), 1021), len(whole) - 1]
    assert [cut for cut in places if is_unseen(path, whole[:cut])] == []


def test_a_byte_that_is_not_what_it_was_is_seen(tmp_path: Path) -> None:
    path = begun(tmp_path, "go", "back")
    whole = path.read_bytes()
    text = len(whole.rstrip())
    places = [*range(text + 2), *range(text + 2, len(whole), 1021), len(whole) - 1]
    for at in places:
        for flip in (1, 0x80, whole[at] ^ 0x20, whole[at]):  # the last two: a space, a NUL
            if flip:
                changed = bytes([*whole[:at], whole[at] ^ flip, *whole[at + 1 :]])
                assert not is_unseen(path, changed), f"byte {at}, {flip:#x}"


def test_lines_that_are_lost_doubled_or_in_another_order_are_seen(tmp_path: Path) -> None:
    path = begun(tmp_path, "ready", "go", "back")
    whole = path.read_bytes()
    first, *lines, _ = whole.splitlines(keepends=True)
    size = len(whole)
    for order in ([0, 2], [1, 2], [1, 0, 2], [0, 1, 1, 2], [0, 1, 2, 2], [2]):
        changed = first + b"".join(lines[at] for at in order)
        assert not is_unseen(path, changed.ljust(size)), order
    assert not is_unseen(path, b"".join(lines).ljust(size))
    assert is_unseen(path, whole)


def test_a_journal_under_another_name_is_not_believed_and_a_copy_is(tmp_path: Path) -> None:
    path = begun(tmp_path, "go")
    data = path.read_bytes()
    for name in (f"{'f' * 32}.source.journal", f"{SESSION}.destination.journal"):
        assert not is_unseen(tmp_path / name, data)
    copy = tmp_path / "copy"
    copy.write_bytes(data)
    assert read_journal(copy).verdict is Verdict.HELD


@pytest.mark.parametrize(
    "data", [b"", b" " * 4096, b"\n", b"{}\n", b"\0" * 4096, b"[" * 9999, b"x" * (2 << 20)]
)
def test_what_is_no_journal_is_damage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / f"{SESSION}.source.journal"
    path.write_bytes(data)
    record = read_journal(path)
    assert (record.session, record.verdict, record.devices) == (SESSION, Verdict.UNKNOWN, ())
    assert record.damage


def test_nothing_is_added_to_a_damaged_journal(tmp_path: Path) -> None:
    path = begun(tmp_path, "go")
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    journal, record = Journal.reopen(path)
    assert record.is_damaged
    assert isinstance(failure_of(lambda: journal.record("back")), LocalIOError)
    journal.close()
    assert path.read_bytes() == damaged


# Who is at work.


def test_a_process_that_lives_has_the_session_and_a_dead_one_has_not(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from vfiomig.live.journal import Journal, Role\n"
        f"journal = Journal.create(Path(sys.argv[1]), {SESSION!r}, Role.SOURCE, {FACTS})\n"
        "journal.record('go'); print('begun', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    path = tmp_path / f"{SESSION}.source.journal"
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        assert read_journal(path).is_live
        err = failure_of(lambda: Journal.reopen(path))
        assert isinstance(err, DeviceBusyError)
        assert f"process {process.pid} is still at work" in str(err)
        process.kill()
    record = read_journal(path)
    assert (record.is_live, record.verdict) == (False, Verdict.HELD)
    journal, _ = Journal.reopen(path)
    journal.record("back")
    journal.close()
    assert read_journal(path).verdict is Verdict.BACK


# Disks that fail.


def test_an_unwritable_directory_is_said_before_anything_is_done(
    tmp_path: Path, in_child: Callable[[Callable[[], object]], None]
) -> None:
    tmp_path.chmod(0o500)

    def job() -> None:
        os.setuid(65534) if os.geteuid() == 0 else None
        err = failure_of(lambda: begun(tmp_path / "journals"))
        assert isinstance(err, LocalIOError)
        assert "--journal" in err.hint

    in_child(job)
    (tmp_path / "file").write_bytes(b"")
    assert isinstance(failure_of(lambda: begun(tmp_path / "file")), LocalIOError)


def test_all_the_room_is_taken_at_the_beginning(
    tmp_path: Path, in_child: Callable[[Callable[[], object]], None]
) -> None:
    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, 8 << 10))
        assert isinstance(failure_of(lambda: begun(tmp_path)), LocalIOError)
        assert names_in(tmp_path) == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, 8 << 10))

    in_child(job)
    journal = Journal.create(tmp_path, SESSION, Role.SOURCE, FACTS)

    def full() -> None:
        # No file may become any longer: the journal need not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size,) * 2)
        for event in ("ready", "go", "back", "resolved"):
            journal.record(event)

    in_child(full)
    journal.close()
    assert read_journal(journal.path).verdict is Verdict.BACK


def test_what_follows_takes_the_place_of_what_could_not_be_recorded(
    tmp_path: Path,
    in_child: Callable[[Callable[[], object]], None],
    refuse: Callable[[str, int, int], None],
) -> None:
    """A record that failed may be there or not; it must not spoil the next one."""
    path = begun(tmp_path)

    def failing() -> None:
        journal, _ = Journal.reopen(path)
        refuse("fsync", -1, 5)
        err: MigrationError = failure_of(lambda: journal.record("go", because="x" * 500))
        assert (err.code, err.errno) == (10, 5)
        failure_of(lambda: journal.record("back"))

    in_child(failing)
    record = read_journal(path)
    assert (record.damage, [event.event for event in record.events]) == ("", ["begun", "back"])


def test_a_journal_that_is_full_says_so_and_stays_sound(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, SESSION, Role.SOURCE, FACTS)

    def fill() -> None:
        for _ in range(100):
            journal.record("resolved", did="x" * 1000)

    err = failure_of(fill)
    assert isinstance(err, LocalIOError)
    assert "it is full" in str(err)
    journal.close()
    assert not read_journal(journal.path).is_damaged


# Where they are.


def test_the_directory_is_the_environments_the_systems_or_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VFIOMIG_JOURNAL", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert journal_directory() == Path("/var/lib/vfiomig")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert journal_directory() == Path("/state/vfiomig")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/who")
    assert journal_directory() == Path("/home/who/.local/state/vfiomig")
    monkeypatch.setenv("VFIOMIG_JOURNAL", str(tmp_path))
    assert journal_directory() == tmp_path


def test_the_sessions_are_listed_the_last_one_first_and_nothing_else(tmp_path: Path) -> None:
    assert sessions(tmp_path / "none") == []
    first, second = ("a" * 32, "9" * 32)
    begun(tmp_path, session=first)
    begun(tmp_path, session=second, role=Role.DESTINATION)
    (tmp_path / "rates.json").write_bytes(b"{}")
    (tmp_path / f".{first}.source.journal.0000").write_bytes(b"")
    (tmp_path / f"{first}.third.journal").write_bytes(b"")
    found: list[Record] = sessions(tmp_path)
    assert [(one.session, one.role) for one in found] == [
        (second, "destination"),
        (first, "source"),
    ]
