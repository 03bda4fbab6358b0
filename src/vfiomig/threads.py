"""Threads that no signal is delivered to, one or several at once."""

import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial


def start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread that no signal is delivered to."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    # A new thread inherits the mask: there is no moment in which it could get one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def together(
    jobs: Sequence[Callable[[], object]], on_failure: Callable[[BaseException], None]
) -> None:
    """Run jobs at the same time, each in a thread of its own, and wait until all have ended.

    on_failure is told the first exception at once, so that the others can be ended; that one is
    raised, the others are notes on it.
    """
    if len(jobs) == 1:
        try:
            jobs[0]()
        except BaseException as err:
            on_failure(err)
            raise
        return
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            jobs[index]()
        except BaseException as err:  # noqa: BLE001  raised below, in the thread that waits
            failures.append(err)
            if len(failures) == 1:
                on_failure(err)

    threads = [
        start_thread(partial(run, index), f"vfiomig device {index}") for index in range(len(jobs))
    ]
    for thread in threads:
        thread.join()
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"and: {other!r}")
        raise failures[0]
