"""What is done while the devices still run: rounds of pre-copy, and the decision to stop them."""

import time
from collections.abc import Callable, Sequence

from vfiomig.live.forecast import Forecast, probe_link
from vfiomig.live.mover import Mover
from vfiomig.live.session import Words
from vfiomig.options import PreCopyLimits
from vfiomig.switchover import Decision
from vfiomig.threads import together

# How long to wait where a round found nothing: a device is not asked in a spin.
_IDLE_NS = 100_000_000


class Rounds:
    """For the working thread. count: rounds begun so far. forecast: its last word is the decision.

    check() raises what ends the session.
    """

    def __init__(
        self,
        movers: Sequence[Mover],
        words: Words,
        forecast: Forecast,
        check: Callable[[], None],
    ) -> None:
        self._movers, self._words, self._check = movers, words, check
        self.forecast, self.count, self._mark = forecast, 0, 0

    def run(self, limits: PreCopyLimits | None) -> None:
        """Return when the devices are to be stopped. limits: None for no pre-copy.

        Raises TimeLimitError when they are not, and what ends the session.
        """
        copying = [mover for mover in self._movers if mover.has_pre_copy and limits is not None]
        if limits is None or not copying:
            return self._decide_at_once()
        together([mover.start_pre_copy for mover in copying], self._words.fail)
        ends_ns = time.monotonic_ns() + limits.duration_ns
        while True:
            self._ask()
            left = limits.device_bytes - sum(mover.device_bytes for mover in copying)
            over = self.count >= limits.rounds or time.monotonic_ns() >= ends_ns or left <= 0
            if self.forecast.decide(exhausted=over) is Decision.SWITCH:
                return None
            self.count += 1
            self._copy_round(copying, left, ends_ns)

    def _decide_at_once(self) -> None:
        """Without pre-copy: nothing but the link can be measured before the stop."""
        self._ask()
        mover, self._mark = self._movers[0], self._mark + 1
        sent, started_ns = probe_link(mover, sum(each.pending_bytes for each in self._movers))
        mover.mark(self._mark)
        self._await_marks([mover])
        self.forecast.probed(sent, time.monotonic_ns() - started_ns)
        self.forecast.decide(exhausted=True)

    def _ask(self) -> None:
        """Ask every device what is left, each in its own thread: it may take a device's time."""
        together([mover.ask for mover in self._movers], self._words.fail)

    def _copy_round(self, movers: Sequence[Mover], most_bytes: int, ends_ns: int) -> None:
        self._mark += 1
        started_ns, before = time.monotonic_ns(), _bytes_of(movers)
        share = max(most_bytes // len(movers), 1)
        jobs = [mover.round_job(self._mark, share, ends_ns) for mover in movers]
        together(jobs, self._words.fail)
        self._await_marks(movers)
        moved = _bytes_of(movers) - before
        self.forecast.measured(moved, time.monotonic_ns() - started_ns)
        if not moved:
            self._words.wait(lambda: False, _IDLE_NS)
            self._check()

    def _await_marks(self, movers: Sequence[Mover]) -> None:
        indices = [mover.index for mover in movers]
        self._words.wait(lambda: all(self._words.marks[at] >= self._mark for at in indices))
        for mover in movers:
            mover.acknowledged()


def _bytes_of(movers: Sequence[Mover]) -> int:
    return sum(mover.device_bytes for mover in movers)
