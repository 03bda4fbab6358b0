"""Shielded work: signals reach the caller and never the job, which always gets to its roll-back."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from vfiomig.errors import CancelledError, MigrationError
from vfiomig.worker import Cancellation, run_shielded

InThread = Callable[[Callable[[], object]], threading.Thread]
OpenFds = Callable[[], dict[int, str]]
SIGNAL = signal.SIGUSR1


@pytest.fixture(autouse=True)
def nothing_stays(open_fds: OpenFds) -> Iterator[None]:
    fds, threads, mask = open_fds(), threading.enumerate(), signal.pthread_sigmask(0, [])
    yield
    assert open_fds() == fds
    assert threading.enumerate() == threads
    assert signal.pthread_sigmask(0, []) == mask


@pytest.fixture
def cancellation() -> Iterator[Cancellation]:
    made = Cancellation()
    yield made
    made.close()


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Call a function in the handler of SIGNAL."""
    old = signal.getsignal(SIGNAL)

    def handle(action: Callable[[], object]) -> None:
        signal.signal(SIGNAL, lambda *_: action())

    yield handle
    signal.signal(SIGNAL, old)


OnSignal = Callable[[Callable[[], object]], None]


def send() -> None:
    os.kill(os.getpid(), SIGNAL)


def test_the_job_runs_in_a_thread_of_its_own(cancellation: Cancellation) -> None:
    name = run_shielded(lambda: threading.current_thread().name, cancellation)
    assert name == "vfiomig"
    assert not cancellation.cancelled


def test_all_signals_are_blocked_inside_the_job(cancellation: Cancellation) -> None:
    blocked = run_shielded(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []), cancellation)
    assert blocked >= signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def test_signals_arrive_in_the_main_thread_while_the_job_runs(
    cancellation: Cancellation, on_signal: OnSignal
) -> None:
    handled, threads = threading.Event(), list[threading.Thread]()

    def handler() -> None:
        threads.append(threading.current_thread())
        handled.set()

    def job() -> str:
        send()
        assert handled.wait(30)
        return "done"

    on_signal(handler)
    assert run_shielded(job, cancellation) == "done"
    assert threads == [threading.main_thread()]
    assert not cancellation.cancelled


class Interrupting:
    """A handler that raises each time until is_over, and lets the job wait until it does."""

    def __init__(self, error: BaseException) -> None:
        self._error, self._raised, self.times = error, threading.Semaphore(0), 0
        self.is_over = False

    def __call__(self) -> None:
        self.times += 1
        self._raised.release()
        if not self.is_over:
            raise self._error if self.times == 1 else RuntimeError("a later one")

    def strike(self) -> None:
        send()
        assert self._raised.acquire(timeout=30)


def wait_for(cancellation: Cancellation) -> None:
    assert select.select([cancellation], [], [], 30)[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("handler")])
def test_an_interrupted_caller_waits_for_the_roll_back(
    cancellation: Cancellation, on_signal: OnSignal, error: BaseException
) -> None:
    interrupt, log, returned = Interrupting(error), list[str](), threading.Event()

    def job() -> None:
        interrupt.strike()
        wait_for(cancellation)
        try:
            cancellation.check()
        finally:
            assert not returned.wait(0.05)
            for number in range(100):  # they are noted, and the roll-back goes on
                send()
                log.append(f"roll-back {number}")

    on_signal(interrupt)

    def call() -> None:
        try:
            run_shielded(job, cancellation)
        finally:
            returned.set()

    with pytest.raises(type(error)) as failure:
        call()
    assert failure.value is error
    assert isinstance(failure.value.__cause__, CancelledError)
    assert log == [f"roll-back {number}" for number in range(100)]
    assert cancellation.cancelled
    assert interrupt.times > 1


def test_a_signal_that_another_thread_takes_does_not_tear_the_roll_back(
    cancellation: Cancellation, on_signal: OnSignal
) -> None:
    # A progress display has such a thread: what the caller has blocked does not hold it back.
    interrupt, log, over = Interrupting(KeyboardInterrupt()), list[str](), threading.Event()
    other = threading.Thread(target=over.wait)

    def job() -> None:
        signal.pthread_kill(other.ident or 0, SIGNAL)
        wait_for(cancellation)
        for number in range(100):
            signal.pthread_kill(other.ident or 0, SIGNAL)
            log.append(f"roll-back {number}")

    on_signal(interrupt)
    other.start()
    try:
        # The last of them may reach us after the job's end.
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run_shielded(job, cancellation)
    finally:
        interrupt.is_over = True
        over.set()
        other.join()
    assert len(log) == 100


def test_an_interruption_is_not_lost_when_the_job_succeeds(
    cancellation: Cancellation, on_signal: OnSignal
) -> None:
    interrupt = Interrupting(KeyboardInterrupt())

    def job() -> str:
        interrupt.strike()
        wait_for(cancellation)
        return "too late to cancel"

    on_signal(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_shielded(job, cancellation)


def test_a_signal_before_the_job_begins_keeps_it_from_beginning(
    cancellation: Cancellation, on_signal: OnSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the worst moment: the thread is there, and the caller does not wait for it yet.
    interrupt, log, threads = (
        Interrupting(KeyboardInterrupt()),
        list[str](),
        set(threading.enumerate()),
    )
    start = threading.Thread.start

    def start_and_send(thread: threading.Thread) -> None:
        start(thread)
        send()

    on_signal(interrupt)
    monkeypatch.setattr(threading.Thread, "start", start_and_send)
    with pytest.raises(KeyboardInterrupt):
        run_shielded(lambda: log.append("begun"), cancellation)
    assert log == []
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(
    "error", [MigrationError("no"), KeyError("x"), KeyboardInterrupt(), SystemExit(1)]
)
def test_what_the_job_raises_is_raised(cancellation: Cancellation, error: BaseException) -> None:
    def job() -> None:
        raise error

    with pytest.raises(type(error)) as failure:
        run_shielded(job, cancellation)
    assert failure.value is error
    assert not cancellation.cancelled


def test_a_thread_that_cannot_be_had_leaves_the_caller_as_it_was(
    cancellation: Cancellation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        run_shielded(lambda: None, cancellation)


def test_any_thread_may_be_the_caller(cancellation: Cancellation, in_thread: InThread) -> None:
    found = list[object]()

    def call() -> None:
        found.append(run_shielded(lambda: 7, cancellation))
        try:
            run_shielded(cancellation.check, cancellation)
        except CancelledError as err:
            found.append(err.code)

    in_thread(call).join()
    assert found == [7]
    cancellation.cancel()
    in_thread(call).join()
    assert found == [7, 7, 14]


def test_a_cancellation_is_seen_by_whoever_waits_for_it(cancellation: Cancellation) -> None:
    cancellation.check()
    assert not select.select([cancellation], [], [], 0)[0]
    cancellation.cancel()
    cancellation.cancel()
    assert select.select([cancellation], [], [], 0)[0]
    with pytest.raises(CancelledError, match="cancelled"):
        cancellation.check()


def test_a_cancellation_may_be_used_after_it_was_closed() -> None:
    made = Cancellation()
    made.close()
    made.close()
    made.cancel()
    assert made.cancelled
