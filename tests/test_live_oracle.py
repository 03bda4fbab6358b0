"""The other end may be anybody's who has read docs/session-protocol.md: session_oracle.py has."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vfiomig
from devices import Simulated, no_leak
from live_ends import SILENCE_NS
from session_oracle import (
    CONTROL,
    DATA,
    Connection,
    Destination,
    Frame,
    Greeting,
    Refused,
    Source,
    entry,
    part,
    read_journal,
)
from vfiomig import DeviceState, MigrationError, MigrationReport, ReceiveOptions, SendOptions
from vfiomig.live import messages
from vfiomig.report import Connected, Event

ZEROED = "sim:?size=3000001&zeros=50"
RUNNING, STOP = DeviceState.RUNNING, DeviceState.STOP


class Job:
    """vfiomig's end, in a thread of its own: its report, or its error."""

    def __init__(self, work: Callable[[], MigrationReport]) -> None:
        self._work = work
        self.report: MigrationReport | None = None
        self.error: MigrationError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.report = self._work()
        except MigrationError as err:
            self.error = err

    def done(self) -> MigrationReport:
        self._join()
        assert self.report is not None, repr(self.error)
        return self.report

    def failure(self) -> MigrationError:
        self._join()
        assert self.error is not None
        return self.error

    def _join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def devices(*urls: str) -> Iterator[list[Simulated]]:
    with no_leak(), ExitStack() as stack:
        yield [stack.enter_context(Simulated(url)) for url in urls]


def sending(
    near: socket.socket, devices: list[Simulated], directory: Path, **options: object
) -> Job:
    """Send over one socket. The job closes it."""
    given: dict[str, Any] = {"journal": directory / "source", "silence_ns": SILENCE_NS, **options}

    def work() -> MigrationReport:
        with near:
            return vfiomig.send(devices, f"fd:{near.fileno()}", SendOptions(**given))

    return Job(work)


def receiving(far: socket.socket, devices: list[Simulated], directory: Path) -> Job:
    """Receive over one socket. The job closes it."""
    options = ReceiveOptions(journal=directory / "destination", silence_ns=SILENCE_NS)

    def work() -> MigrationReport:
        with far:
            return vfiomig.receive(devices, f"fd:{far.fileno()}", options)

    return Job(work)


def events(directory: Path) -> list[str]:
    """Return what the only journal of a directory has recorded."""
    [path] = directory.glob("*.journal")
    return [event["event"] for event in read_journal(path.read_bytes())]


def content(url: str) -> bytes:
    with Simulated(url) as device:
        return device.content()


def test_every_message_and_its_fields_stand_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "session-protocol.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line[:1] == "|"}
    for kind in messages.Message.__args__:
        row = rows[f"`{kind.__name__.lower()}`"]
        assert [name for name in kind._fields if f"`{name}`" not in row] == []


# vfiomig's source.


@pytest.mark.parametrize("elide", [True, False])
def test_the_oracle_gets_the_state_of_a_device_that_is_only_stopped(
    tmp_path: Path, *, elide: bool
) -> None:
    with devices(ZEROED) as sources:
        near, far = socket.socketpair()
        with far:
            before = sources[0].content()
            job = sending(near, sources, tmp_path, pre_copy=None, elide_zeros=elide)
            oracle = Destination(lambda: far, 1)
            oracle.run()
        [moved], [got] = job.done().devices, oracle.devices
        assert bytes(got.state) == before
        assert (len(got.state), got.digest.hexdigest()) == (moved.device_bytes, moved.digest)
        assert got.zeros == moved.zero_bytes
        assert bool(got.zeros) == elide
        assert got.pre_copy == 0
        assert oracle.probed > 0
        assert sources[0].state() is STOP
    assert events(tmp_path / "source") == ["begun", "go", "released"]


@pytest.mark.parametrize(
    "url",
    ["sim:?size=300001", ZEROED, "sim:?profile=virtio&size=100001", "sim:?profile=mtty"],
)
def test_what_the_oracle_got_it_gives_to_another_device(tmp_path: Path, url: str) -> None:
    with devices(f"{url}&seed=1", f"{url}&seed=2") as (here, there):
        near, far = socket.socketpair()
        with far:
            job = sending(near, [here], tmp_path)
            taking = Destination(lambda: far, 1)
            taking.run()
        [moved], [got] = job.done().devices, taking.devices
        assert got.pre_copy == moved.pre_copy_bytes > 0
        near, far = socket.socketpair()
        with near:
            back = receiving(far, [there], tmp_path)
            Source(lambda: near, [bytes(got.state)]).run(rounds=2)
        [loaded] = back.done().devices
        assert loaded.digest == moved.digest
        assert there.content() == here.content()
        assert (here.state(), there.state()) == (STOP, RUNNING)
    assert events(tmp_path / "destination") == ["begun", "ready", "go", "running"]


def test_messages_come_in_the_order_of_the_page(tmp_path: Path) -> None:
    with devices("sim:?size=300001") as sources:
        near, far = socket.socketpair()
        with far:
            job = sending(near, sources, tmp_path)
            oracle = Destination(lambda: far, 1)
            oracle.run()
        report = job.done()
    heard = [kind for kind in oracle.heard if kind != "status"]
    marks = ["mark 0"] * report.rounds
    assert heard == ["begin", *marks, "stopping", "end 0", "go", "bye"]
    assert oracle.last["begin"]["lease_ns"] == 30_000_000_000
    bye = oracle.last["bye"]
    assert bye["downtime_ns"] == report.downtime_ns
    assert bye["downtime_error_ns"] <= bye["source_downtime_ns"]


@pytest.mark.parametrize("count", [1, 2])
def test_two_devices_come_over_as_many_connections(tmp_path: Path, count: int) -> None:
    url, path = "sim:?size=500001&seed={}", tmp_path / "socket"
    with devices(url.format(1), url.format(2)) as sources, ExitStack() as stack:
        before = [device.content() for device in sources]
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(30)
        options = SendOptions(journal=tmp_path / "j", connections=count, pre_copy=None)
        job = Job(lambda: vfiomig.send(sources, f"unix:{path}", options))
        oracle = Destination(lambda: stack.enter_context(listener.accept()[0]), 2)
        oracle.run()
        job.done()
        assert len(oracle.connections) == count
        assert [bytes(device.state) for device in oracle.devices] == before


def test_a_destination_that_says_it_never_ran_lets_the_source_run_again(tmp_path: Path) -> None:
    with devices("sim:?size=300001") as sources:
        near, far = socket.socketpair()
        with far:
            job = sending(near, sources, tmp_path)
            oracle = Destination(lambda: far, 1)
            oracle.meet()
            oracle.take_all()
            oracle.ready()
            oracle.until("go")
            reason = {"error": "DeviceStateError", "message": "it will not run", "hint": ""}
            oracle.control.say("fail", code=6, phase="resume", **reason)
            oracle.control.say("left", never_ran=True, states=["it is blank"])
            assert oracle.until("left")["never_ran"] is False
        failure = job.failure()
        assert failure.code == 9
        assert "it will not run" in str(failure)
        assert failure.destination_state == "it is blank"
        assert sources[0].state() is RUNNING
    assert events(tmp_path / "source") == ["begun", "go", "back"]


def test_a_destination_that_goes_after_go_leaves_the_source_held(tmp_path: Path) -> None:
    with devices("sim:?size=300001") as sources:
        near, far = socket.socketpair()
        with far:
            job = sending(near, sources, tmp_path)
            oracle = Destination(lambda: far, 1)
            oracle.meet()
            oracle.take_all()
            oracle.ready()
            oracle.until("go")
        failure = job.failure()
        assert isinstance(failure, vfiomig.OutcomeUnknownError)
        assert sources[0].state() is STOP
    assert events(tmp_path / "source") == ["begun", "go"]
    [path] = (tmp_path / "source").glob("*")
    assert path.name == f"{failure.session}.source.journal"


@pytest.mark.parametrize("wrong", ["bytes", "digest"])
def test_a_ready_with_other_counts_is_no_ready(tmp_path: Path, wrong: str) -> None:
    with devices("sim:?size=300001") as sources:
        near, far = socket.socketpair()
        with far:
            job = sending(near, sources, tmp_path)
            oracle = Destination(lambda: far, 1)
            oracle.meet()
            oracle.take_all()
            [got] = oracle.devices
            got.digest.update(b"" if wrong == "bytes" else b"x")
            got.state += b"x" if wrong == "bytes" else b""
            oracle.ready()
            assert oracle.until("fail")["phase"] == "stop-copy"
            oracle.control.say("left", never_ran=True, states=[])
        assert job.failure().code == 9
        assert sources[0].state() is RUNNING
        assert "go" not in oracle.heard


def test_a_destination_that_takes_less_than_there_is_makes_the_source_warn(tmp_path: Path) -> None:
    with devices("sim:?size=300001") as sources:
        near, far = socket.socketpair()
        with far:
            job = sending(near, sources, tmp_path)
            Destination(lambda: far, 1).run(max_state_bytes=300_000)
        assert "takes 300000" in job.done().warnings[0]


# vfiomig's destination.


@pytest.mark.parametrize("rounds", [0, 3])
def test_what_the_oracle_gives_arrives_and_runs(tmp_path: Path, rounds: int) -> None:
    state = content("sim:?size=300001&zeros=50&seed=7")
    with devices("sim:?size=300001") as destinations:
        near, far = socket.socketpair()
        with near:
            job = receiving(far, destinations, tmp_path)
            oracle = Source(lambda: near, [state])
            oracle.run(rounds=rounds, length=65536)
        report = job.done()
        assert destinations[0].content() == state
        assert destinations[0].state() is RUNNING
        assert report.devices[0].pre_copy_bytes == min(65536 * rounds, len(state))
        assert report.devices[0].zero_bytes > 0 or not rounds
        assert (report.downtime_ns, report.downtime_error_ns) == (3, 2)
        assert report.session == oracle.session.hex()
    assert oracle.last["done"]["stopped_ns"] >= oracle.last["done"]["ran_after_ns"]
    assert oracle.last["hello"]["max_state_bytes"] == 1 << 40


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_oracle_gives_three_devices_over_so_many_connections(
    tmp_path: Path, count: int
) -> None:
    urls = [f"sim:?size=300001&seed={seed}" for seed in range(3)]
    states = [content(url) for url in urls]
    with (
        devices(*["sim:?size=300001&seed=9"] * 3) as destinations,
        dialing(tmp_path, destinations) as (job, connect),
    ):
        Source(connect, states, count).run(rounds=2)
        job.done()
        assert [device.content() for device in destinations] == states


@contextmanager
def dialing(
    directory: Path, destinations: list[Simulated]
) -> Iterator[tuple[Job, Callable[[], socket.socket]]]:
    """Receive at a UNIX socket: the job, and what connects to it. Closes the connections."""
    path, listens = directory / "socket", threading.Event()

    def note(event: Event) -> None:
        if isinstance(event, Connected):
            listens.set()

    options = ReceiveOptions(journal=directory / "destination", silence_ns=SILENCE_NS)
    job = Job(lambda: vfiomig.receive(destinations, f"unix:{path}", options, on_event=note))
    assert listens.wait(30)
    with ExitStack() as stack:

        def connect() -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            return sock

        yield job, connect


def test_a_stranger_is_told_to_wait_and_disturbs_nobody(tmp_path: Path) -> None:
    state = content("sim:?size=300001&seed=7")
    with (
        devices("sim:?size=300001") as destinations,
        dialing(tmp_path, destinations) as (
            job,
            connect,
        ),
    ):
        oracle = Source(connect, [state], 2)
        oracle._greet(0, bytes(16))
        oracle.control.say("hello", tool="oracle", devices=[entry("oracle0")])
        token = bytes.fromhex(oracle.hear("hello")["token"])
        for greeting in (
            Greeting(os.urandom(16)),
            Greeting(oracle.session, 1, 2, os.urandom(16)),
        ):
            stranger = Connection(connect(), from_source=True)
            stranger.greet(greeting)
            stranger.greeted()
            stranger.say("hello", tool="oracle", devices=[])
            assert stranger.next().message["code"] == 5
            part([stranger])
        oracle._greet(1, token)
        oracle.begin()
        oracle.stop()
        oracle.ready()
        oracle.go()
        oracle.part()
        job.done()
        assert destinations[0].content() == state


def spoil_the_digest(oracle: Source) -> None:
    oracle.begin()
    oracle.give(0, 1000, damaged=True)


def spoil_the_end(oracle: Source) -> None:
    oracle.begin()
    oracle.give(0, 1000)
    oracle.of(0).say("end", 0, device_bytes=1000, digest="0" * 16)


def end_short(oracle: Source) -> None:
    oracle.begin()
    oracle.give(0, 1000)
    oracle.of(0).say("end", 0, device_bytes=999, digest=oracle._digests[0].hexdigest())


def send_before_begin(oracle: Source) -> None:
    oracle.give(0, 1000)


def send_after_the_end(oracle: Source) -> None:
    oracle.begin()
    oracle.control.say("stopping", expected_downtime_ns=0)
    oracle.give(0, 1000)
    oracle.end(0)
    oracle.give(0, 1000)


def send_for_a_device_that_is_not_there(oracle: Source) -> None:
    oracle.begin()
    oracle.control.frame(DATA, 2, b"x")


def send_for_no_device(oracle: Source) -> None:
    oracle.begin()
    oracle.control.frame(DATA, CONTROL, b"x")


def repeat_a_frame(oracle: Source) -> None:
    oracle.begin()
    sent = dict(oracle.control._sent)
    oracle.give(0, 1000)
    oracle.control._sent = sent
    oracle.give(0, 1000)


def set_a_reserved_flag(oracle: Source) -> None:
    oracle.begin()
    oracle.give(0, 1000, flags=4)


def say_what_there_is_not(oracle: Source) -> None:
    oracle.begin()
    oracle.control.say("hurry")


def say_too_much(oracle: Source) -> None:
    oracle.begin()
    oracle.control.say("status", text="x" * (64 << 10))


def end_without_stopping(oracle: Source) -> None:
    oracle.begin()
    for device in range(2):
        oracle.give(device, 1 << 20)
        oracle.end(device)


def go_before_ready(oracle: Source) -> None:
    oracle.begin()
    oracle.control.say("go")
    oracle.stop()


def give_no_lease(oracle: Source) -> None:
    oracle.control.say("begin", lease_ns=0)


@pytest.mark.parametrize(
    ("misdeed", "why"),
    [
        (spoil_the_digest, "damaged on its way"),
        (spoil_the_end, "the source sent 1000"),
        (end_short, "the source sent 999"),
        (send_before_begin, "when none was to come"),
        (send_after_the_end, "when none was to come"),
        (send_for_a_device_that_is_not_there, "there is none"),
        (send_for_no_device, "of no device"),
        (repeat_a_frame, "not the one that belongs here"),
        (set_a_reserved_flag, "flags 0x4"),
        (say_what_there_is_not, "there is no message 'hurry'"),
        (say_too_much, "a MESSAGE frame of"),
        (end_without_stopping, "without having stopped"),
        (go_before_ready, "before anything is ready"),
        (give_no_lease, "a lease of no time"),
    ],
)
def test_what_the_page_does_not_allow_ends_in_a_reset(
    tmp_path: Path, misdeed: Callable[[Source], None], why: str
) -> None:
    url = "sim:?size=300001&seed=9"
    with devices(url, url) as destinations:
        near, far = socket.socketpair()
        with near:
            job = receiving(far, destinations, tmp_path)
            oracle = Source(lambda: near, [bytes(range(256)) * 100] * 2)
            oracle.meet()
            misdeed(oracle)
            with pytest.raises(Refused, match=r"^9: "):
                oracle.hear("ready")
            assert oracle.hear("left")["never_ran"] is True
        failure = job.failure()
        assert why in str(failure)
        assert failure.code == 9
        is_untouched = misdeed in {send_before_begin, give_no_lease}
        for device in destinations:
            assert device.state() is RUNNING
            assert (device.content() == content(url)) == is_untouched
    assert events(tmp_path / "destination") == ["begun", "forgotten"]


def test_a_lease_that_ends_is_a_reset_that_is_recorded_before(tmp_path: Path) -> None:
    with devices("sim:?size=300001&seed=9") as destinations:
        near, far = socket.socketpair()
        with near:
            job = receiving(far, destinations, tmp_path)
            oracle = Source(lambda: near, [content("sim:?size=300001")])
            oracle.meet()
            oracle.begin(lease_ns=1_000_000)
            oracle.stop()
            oracle.ready()
            with pytest.raises(Refused, match="lease"):
                oracle.hear("left")
            assert oracle.hear("left")["never_ran"] is True
        assert job.failure().code == 9
        assert not any(destinations[0].content())
    assert events(tmp_path / "destination") == ["begun", "ready", "forgetting", "forgotten"]


def test_a_session_that_was_here_before_is_refused(tmp_path: Path) -> None:
    state = content("sim:?size=300001&seed=7")
    with devices("sim:?size=300001") as destinations:
        session = b""
        for attempt in range(2):
            near, far = socket.socketpair()
            with near:
                job = receiving(far, destinations, tmp_path)
                oracle = Source(iter([near]).__next__, [state])
                oracle.session = session or oracle.session
                session = oracle.session
                if attempt:
                    with pytest.raises(Refused, match=r"^8: "):
                        oracle.run()
                    assert oracle.hear("left")["never_ran"] is True
                else:
                    oracle.run()
                    job.done()
        assert job.failure().code == 8
        assert destinations[0].content() == state


def test_the_oracle_refuses_what_the_page_does_not_allow() -> None:
    near, far = socket.socketpair()
    with near, far:
        here, there = (Connection(each, from_source=each is near) for each in (near, far))
        here.greet(Greeting(os.urandom(16)))
        assert there.greeted().session == here.session
        here.say("hello", 7, number=1)
        heard: Frame = there.next()
        assert heard.message == {"type": "hello", "number": 1}
        here._sent.clear()
        here.say("hello", 7, number=1)
        with pytest.raises(Refused, match="link"):
            there.next()
