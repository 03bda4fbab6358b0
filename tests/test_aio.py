"""vfiomig.aio: results, events in the loop's thread, and tasks that are cancelled."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devices import Simulated, entered, no_leak
from live_ends import Ends, ends
from vfiomig import DeviceState, MigrationProgress, MigrationReport, SaveOptions, SendOptions, aio
from vfiomig.errors import DeviceIOError, LocalIOError, PeerError, StreamMismatchError
from vfiomig.report import Event

S = DeviceState
SLOW = "sim:?size=8M&bandwidth=8M"
FAST = "sim:?size=8M"


def run(job: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop of its own; one that hangs fails."""
    asyncio.run(asyncio.wait_for(job, 60))


class Signal:
    """An on_event that sets an asyncio.Event at the first event that is wanted.

    Calls of any other thread than the loop's fail the test.
    """

    def __init__(self, wanted: Callable[[Event], bool]) -> None:
        self.set, self._wanted, self.events = asyncio.Event(), wanted, list[Event]()
        self._thread = threading.current_thread()

    def __call__(self, event: Event) -> None:
        assert threading.current_thread() is self._thread
        assert asyncio.get_running_loop()
        self.events.append(event)
        if self._wanted(event):
            self.set.set()


@contextmanager
def sockets() -> Iterator[tuple[str, str]]:
    """Two URLs that lead to each other."""
    near, far = socket.socketpair()
    with near, far:
        yield f"fd:{near.fileno()}", f"fd:{far.fileno()}"


async def migrated(both: Ends, **on_event: Callable[[Event], None]) -> list[object]:
    """Migrate, both ends in this loop. Returns what each came to, errors included."""
    with sockets() as (near, far):
        sending = aio.send(both.sources, near, both.send_options(), **on_event)
        receiving = aio.receive(both.destinations, far, both.receive_options())
        return list(await asyncio.gather(sending, receiving, return_exceptions=True))


def test_both_ends_of_a_migration_run_in_one_loop(tmp_path: Path) -> None:
    async def job() -> None:
        heard = Signal(entered(S.STOP_COPY))
        both.source.report, both.destination.report = await migrated(both, on_event=heard)  # type: ignore[assignment]
        assert heard.set.is_set()

    with no_leak(), ends(tmp_path, "sim:?size=300001") as both:
        run(job())
        both.check_moved()
        assert isinstance(both.source.report, MigrationReport)


def test_sessions_of_one_loop_do_not_disturb_each_other_nor_the_loop(tmp_path: Path) -> None:
    async def job() -> None:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.create_task(turn())
        one, other = await asyncio.gather(migrated(first), migrated(second))
        turning.cancel()
        first.source.report, first.destination.report = one  # type: ignore[assignment]
        assert isinstance(other[0], DeviceIOError)
        assert isinstance(other[1], PeerError)
        assert turns > 100

    with (
        no_leak(),
        ends(tmp_path / "a", "sim:?size=3M&bandwidth=30M", "sim:?size=3M") as first,
        ends(tmp_path / "b", "sim:?size=3M&fault=read:EIO@1M", "sim:?size=3M") as second,
    ):
        run(job())
        first.check_moved()
        second.check_stayed()


def test_a_state_is_saved_and_loaded(tmp_path: Path) -> None:
    async def job(source: Simulated, destination: Simulated) -> None:
        heard = Signal(entered(S.STOP_COPY))
        saved = await aio.save(source, tmp_path / "state", on_event=heard)
        loaded = await aio.load(tmp_path / "state", destination, on_event=Signal(bool))
        assert saved.digest == loaded.digest
        assert heard.set.is_set()
        assert destination.content() == source.content()

    with no_leak(), Simulated("sim:?size=3M&seed=1") as one, Simulated("sim:?size=3M") as other:
        run(job(one, other))


def test_an_error_is_raised_where_it_is_awaited(tmp_path: Path) -> None:
    async def job(device: Simulated) -> None:
        with pytest.raises(LocalIOError):
            await aio.save(device, tmp_path / "none" / "below")
        (tmp_path / "bad").write_bytes(b"no stream" * 1000)
        with pytest.raises(StreamMismatchError, match="neither a vfiomig stream"):
            await aio.load(tmp_path / "bad", device)
        options = SendOptions(journal=tmp_path / "journal")
        with pytest.raises(PeerError):
            await aio.send([device], f"unix:{tmp_path}/nobody", options)
        assert device.state() is S.RUNNING

    with no_leak(), Simulated("sim:?size=1M") as device:
        run(job(device))


async def cancelled(task: "asyncio.Task[Any]", at: Signal) -> None:
    """Cancel a task once at was set; it must be cancelled then."""
    await at.set.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


def test_a_save_that_is_cancelled_is_rolled_back_before_that_is_told(tmp_path: Path) -> None:
    async def job(device: Simulated) -> None:
        stopped = Signal(entered(S.STOP_COPY))
        task = asyncio.create_task(aio.save(device, tmp_path / "state", on_event=stopped))
        await cancelled(task, stopped)
        assert device.history[-1][1] is S.RUNNING
        assert list(tmp_path.iterdir()) == []

    with no_leak(), Simulated(SLOW) as device:
        run(job(device))


def test_a_load_that_is_cancelled_is_reset_before_that_is_told(tmp_path: Path) -> None:
    async def job(source: Simulated, device: Simulated) -> None:
        await aio.save(source, tmp_path / "state", SaveOptions(elide_zeros=False))
        resuming = Signal(entered(S.RESUMING))
        task = asyncio.create_task(aio.load(tmp_path / "state", device, on_event=resuming))
        await cancelled(task, resuming)
        assert device.history[-1][1] is S.RUNNING
        assert device.content() != source.content()

    with no_leak(), Simulated(f"{FAST}&seed=1") as one, Simulated(SLOW) as other:
        run(job(one, other))


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_migration_that_is_cancelled_is_rolled_back_before_that_is_told(
    tmp_path: Path, side: str
) -> None:
    async def job() -> None:
        begun = Signal(entered(S.PRE_COPY if side == "source" else S.RESUMING))
        on_source, on_destination = (begun, None) if side == "source" else (None, begun)
        with sockets() as (near, far):
            sending = asyncio.create_task(
                aio.send(both.sources, near, both.send_options(), on_event=on_source)
            )
            receiving = asyncio.create_task(
                aio.receive(both.destinations, far, both.receive_options(), on_event=on_destination)
            )
            mine, other = (sending, receiving) if side == "source" else (receiving, sending)
            await cancelled(mine, begun)
            device = (both.sources if side == "source" else both.destinations)[0]
            assert device.history[-1][1] is S.RUNNING
            with pytest.raises(PeerError, match="cancelled"):
                await other

    with no_leak(), ends(tmp_path, SLOW, FAST) as both:
        run(job())
        both.check_stayed()


def test_a_cancellation_while_nobody_comes_ends_the_wait(tmp_path: Path) -> None:
    async def job() -> None:
        listening = Signal(bool)
        task = asyncio.create_task(
            aio.receive(
                both.destinations,
                f"unix:{tmp_path}/sock",
                both.receive_options(),
                on_event=listening,
            )
        )
        await cancelled(task, listening)

    with no_leak(), ends(tmp_path, FAST) as both:
        run(job())


def test_a_cancellation_that_comes_too_late_gives_the_report(tmp_path: Path) -> None:
    async def job() -> None:
        # The last step there, so that GO has been said.
        running = Signal(entered(S.RUNNING_P2P))
        with sockets() as (near, far):
            sending = asyncio.create_task(aio.send(both.sources, near, both.send_options()))
            receiving = asyncio.create_task(
                aio.receive(
                    both.destinations,
                    far,
                    both.receive_options(),
                    on_event=lambda event: resuming(event, running),
                )
            )
            await running.set.wait()
            sending.cancel()
            receiving.cancel()
            both.source.report, both.destination.report = await sending, await receiving
        assert not sending.cancelled()
        assert sending.done()

    def resuming(event: Event, running: Signal) -> None:
        if getattr(event, "before", None) is S.STOP:
            running(event)

    hanging = "sim:?size=1M&fault=hang:200ms@set:RUNNING"
    with no_leak(), ends(tmp_path, "sim:?size=1M", hanging) as both:
        run(job())
        both.check_moved()


def test_progress_comes_while_the_work_goes_on(tmp_path: Path) -> None:
    async def job() -> None:
        progress = Signal(lambda event: isinstance(event, MigrationProgress))
        with sockets() as (near, far):
            receiving = asyncio.create_task(
                aio.receive(both.destinations, far, both.receive_options())
            )
            sending = asyncio.create_task(
                aio.send(both.sources, near, both.send_options(), on_event=progress)
            )
            await progress.set.wait()
            assert not sending.done()
            both.source.report, both.destination.report = await sending, await receiving

    with no_leak(), ends(tmp_path, "sim:?size=4M&bandwidth=8M", "sim:?size=4M") as both:
        run(job())
        both.check_moved()
