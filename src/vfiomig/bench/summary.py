"""From the runs of each case to what a person compares: medians, spread, ratios."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from vfiomig.bench.cases import Case
from vfiomig.bench.runner import Results, Sample

GB = 1e9
# Below this a median says little; the issue of every comparison.
ENOUGH_RUNS = 7


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, and between what they lie."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One case. Rates in GB (10^9 bytes of the device) per second, CPU in seconds per GB.

    ratio: the median, over the rounds, of this case's rate through the baseline's in the same
    round. cpu_ratio: the same of the baseline's CPU time, both sides, through this case's; both
    are above 1 where the case is better, and None without a baseline in the same setting.
    """

    case: Case
    runs: int
    device_bytes: int
    buffer_bytes: int | None
    gb_per_s: Spread
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float | None
    sender_peak_kib: int | None
    receiver_peak_kib: int | None
    ratio: float | None
    cpu_ratio: float | None

    def as_dict(self) -> dict[str, object]:
        """Return plain values, one level deep."""
        plain = asdict(self)
        case, rate = plain.pop("case"), plain.pop("gb_per_s")
        case["requested_buffer_bytes"] = case.pop("buffer_bytes")
        rates = {f"gb_per_s_{name}": value for name, value in rate.items()}
        return {**case, **plain, **rates}


def summarize(results: Results, against: str | None) -> list[Row]:
    """Return a row for each case that was measured, in the order of the sweep, sink by sink."""
    bases = {
        case.setting: samples
        for case, samples in reversed(results.samples.items())
        if case.program == against
    }
    order = {case: place for place, case in enumerate(results.cases)}
    sinks = list(dict.fromkeys(case.sink for case in results.cases))
    measured = sorted(results.samples, key=lambda case: (sinks.index(case.sink), order[case]))
    return [_row(case, results.samples[case], bases.get(case.setting)) for case in measured]


def _row(case: Case, samples: Sequence[Sample], base: Sequence[Sample] | None) -> Row:
    receiver = [
        sample.receiver_cpu_s / (sample.device_bytes / GB)
        for sample in samples
        if sample.receiver_cpu_s is not None
    ]
    sender = [sample.sender_cpu_s / (sample.device_bytes / GB) for sample in samples]
    return Row(
        case=case,
        runs=len(samples),
        device_bytes=samples[-1].device_bytes,
        buffer_bytes=samples[-1].buffer_bytes,
        gb_per_s=Spread.of([rate(sample) for sample in samples]),
        sender_cpu_s_per_gb=median(sender),
        receiver_cpu_s_per_gb=median(receiver) if receiver else None,
        sender_peak_kib=_most([sample.sender_peak_kib for sample in samples]),
        receiver_peak_kib=_most([sample.receiver_peak_kib for sample in samples]),
        ratio=_paired([rate(one) for one in samples], [rate(one) for one in base or ()]),
        cpu_ratio=_paired([_cpu(one) for one in base or ()], [_cpu(one) for one in samples]),
    )


def rate(sample: Sample) -> float:
    """Return the GB per second of a run."""
    return sample.device_bytes / GB / sample.seconds


def _cpu(sample: Sample) -> float:
    return (sample.sender_cpu_s + (sample.receiver_cpu_s or 0.0)) / sample.device_bytes


def _paired(values: Sequence[float], through: Sequence[float]) -> float | None:
    """Return the median of the quotients round by round; a time of 0 is too short to compare."""
    if not values or not through:
        return None
    quotients = [value / divisor for value, divisor in zip(values, through, strict=True) if divisor]
    return median(quotients) if quotients else None


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
