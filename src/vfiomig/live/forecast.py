"""How long the devices of a session would be stopped, reckoned again with all that is measured."""

import time
from collections.abc import Sequence

from vfiomig.errors import TimeLimitError
from vfiomig.live.messages import Hello
from vfiomig.live.mover import Mover
from vfiomig.live.options import SendOptions
from vfiomig.quantities import format_duration, format_size
from vfiomig.rates import TELLING_BYTES, Rates
from vfiomig.switchover import FIXED, Band, Decision, Estimate, Part, decide, estimate_together

# Enough to see a link's rate, and over before anybody minds: sent while the devices run.
PROBE_BYTES, PROBE_NS = 16 << 20, 50_000_000


class Forecast:
    """For the working thread; its numbers may be read from any.

    bytes_per_s: what was last measured to arrive in the devices, all together; 0: never yet.
    """

    def __init__(
        self, movers: Sequence[Mover], rates: Rates, hello: Hello, options: SendOptions
    ) -> None:
        """hello: the destination's, with what its devices were measured to load."""
        self._movers, self._options = movers, options
        self.pending_bytes = self.bytes_per_s = self._link_bytes_per_s = 0
        self._moved_bytes = self._took_ns = 0
        self._known: list[Part] = []
        for index, mover in enumerate(movers):
            identity = mover.device.identity
            known = rates.of_source(identity)
            fixed = (known.fixed_ns if known else None, _band(hello.fixed_ns, index))
            reading = known.bytes_per_s if known else None
            self._known.append(Part(0, reading, _band(hello.rates, index), fixed))
        self.expected = Estimate(0, 0, 0, 0, 0, 0)

    def measured(self, moved_bytes: int, took_ns: int) -> None:
        """Take in that so much has arrived in the devices. Too little does not tell a rate."""
        self._moved_bytes += moved_bytes
        self._took_ns += took_ns
        if moved_bytes >= TELLING_BYTES:
            self.bytes_per_s = moved_bytes * 10**9 // max(took_ns, 1)

    def probed(self, sent_bytes: int, took_ns: int) -> None:
        """Take in how long it took the link alone to move so much."""
        if sent_bytes >= TELLING_BYTES:
            self._link_bytes_per_s = sent_bytes * 10**9 // max(took_ns, 1)

    @property
    def overall_bytes_per_s(self) -> int:
        """What has arrived in the devices, by the time in which something was on its way."""
        return self._moved_bytes * 10**9 // max(self._took_ns, 1)

    def reckon(self) -> Estimate:
        """Estimate, with what the devices said last of what they have left."""
        self.pending_bytes = sum(mover.pending_bytes for mover in self._movers)
        parts = [
            part._replace(pending=mover.pending_bytes)
            for part, mover in zip(self._known, self._movers, strict=True)
        ]
        most = self._options.bytes_per_s
        rates = [rate for rate in (self._link_bytes_per_s, most) if rate]
        self.expected = estimate_together(
            parts, link=min(rates, default=0), end_to_end=self.bytes_per_s
        )
        return self.expected

    def decide(self, *, exhausted: bool) -> Decision:
        """Reckon, and decide whether to stop the devices. Raises TimeLimitError: not at all."""
        expected, limit_ns = self.reckon(), self._options.downtime_limit_ns
        decision = decide(
            expected.downtime_ns,
            limit_ns,
            initial_done=all(mover.is_initial_done for mover in self._movers),
            exhausted=exhausted,
            switch_on_limit=self._options.switch_on_limit,
        )
        if decision is Decision.CANCEL:
            why = f"the devices would be stopped for {forecast_text(expected)}"
            if expected.downtime_ns <= limit_ns:
                why = "pre-copy has come to its bounds before all initial data was moved"
            raise TimeLimitError(
                f"{why}; {format_duration(limit_ns)} of downtime are allowed",
                hint="--downtime-limit allows more; --on-limit switch stops them all the same",
            )
        return decision


def forecast_text(expected: Estimate) -> str:
    """Return an estimate as a person reads it."""
    least = "at least " if set(expected.unknown) - {FIXED} else ""
    rate = f" at {format_size(expected.bytes_per_s)}/s" if expected.bytes_per_s else ""
    unknown = f"; never measured: {', '.join(expected.unknown)}" if expected.unknown else ""
    left = format_size(expected.bytes)
    return f"{least}{format_duration(expected.downtime_ns)} ({left}{rate}{unknown})"


def probe_link(mover: Mover, most_bytes: int) -> tuple[int, int]:
    """Send what the destination drops. Returns the bytes, and when it began (CLOCK_MONOTONIC)."""
    started_ns = time.monotonic_ns()
    return mover.probe(min(PROBE_BYTES, most_bytes), PROBE_NS), started_ns


def _band(values: Sequence[int], index: int) -> Band | None:
    value = values[index] if index < len(values) else 0
    return Band.of([value]) if value else None
