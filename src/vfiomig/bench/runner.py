"""Runs the cases: in each round every case once, so that what disturbs one disturbs them all."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vfiomig.bench.baselines import Baseline
from vfiomig.bench.cases import STREAMING, Case
from vfiomig.bench.check import check
from vfiomig.bench.crew import Crew, Worker
from vfiomig.bench.measure import Usage
from vfiomig.bench.messages import Open, Opened, Ready, Receive, Received, Send, Sent
from vfiomig.bench.plan import NOWHERE, Plan
from vfiomig.bench.sinks import Ends, open_ends
from vfiomig.bench.tool import ToolError
from vfiomig.errors import LocalIOError, MigrationError, UsageError
from vfiomig.fd import OwnedFd

OnRound = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a case, over all of its devices. Receivers' figures are None where none is."""

    seconds: float
    device_bytes: int
    stream_bytes: int
    sender_cpu_s: float
    receiver_cpu_s: float | None
    sender_peak_kib: int | None
    receiver_peak_kib: int | None
    buffer_bytes: int | None


@dataclass(slots=True)
class Results:
    """What was found. samples: a list for each case, in the order of rounds.

    skipped: cases that a tool failed in, and why. stable: whether two reads of each device gave the
    same bytes, so that what tools copied could be compared. seconds: what all of it took.
    """

    cases: list[Case]
    devices: list[Opened]
    samples: dict[Case, list[Sample]] = field(default_factory=dict)
    skipped: dict[Case, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def stable(self) -> bool:
        """Whether every device's state stays the same from read to read."""
        return all(device.digest for device in self.devices)


def run_bench(plan: Plan, on_round: OnRound) -> Results:
    """Run the plan. on_round is called before each round: its number, 0 the warm-up, of how many.

    Blocks. Devices are RUNNING afterwards, and files gone, whatever happens; an exception in the
    calling thread (Ctrl-C) ends it early. Raises MigrationError; WrongBytesError when other bytes
    arrived than were sent.
    """
    plan.check()
    started_ns = time.monotonic_ns()
    with ExitStack() as stack:
        name = tempfile.mkdtemp(prefix=".vfiomig-bench-", dir=plan.directory)
        directory = Path(name)
        stack.callback(_remove, directory)
        crew = stack.enter_context(Crew(max(plan.sweep.devices), _borrowed_fd(plan.device)))
        bench = _Bench(plan, crew, directory)
        for number in range(plan.runs + 1):
            on_round(number, plan.runs)
            bench.round(number)
    bench.results.seconds = (time.monotonic_ns() - started_ns) / 1e9
    return bench.results


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def _borrowed_fd(device: str) -> int | None:
    own = re.fullmatch(r"fd:([0-9]{1,9})", device)
    return int(own[1]) if own else None


class _Bench:
    def __init__(self, plan: Plan, crew: Crew, directory: Path) -> None:
        self._plan, self._crew, self._directory = plan, crew, directory
        self._baselines = {baseline.name: baseline for baseline in plan.baselines}
        self._devices: dict[tuple[int, int], Opened] = {}
        self._open_devices()
        self.results = Results(plan.cases(), list(self._devices.values()))

    def _open_devices(self) -> None:
        for number, sender in enumerate(self._crew.senders):
            for zeros in self._plan.sweep.zeros:
                sender.request(Open(zeros, self._plan.device_name(zeros, number)))
                self._devices[zeros, number] = found = sender.answer()
                if not found.device_bytes:
                    raise UsageError(f"{found.name} has no state at all: nothing to measure")
        if self._plan.into != NOWHERE:
            for receiver in self._crew.receivers:
                receiver.request(Open(0, self._plan.into))
                receiver.answer()

    def round(self, number: int) -> None:
        """Run every case once, in every second round from the last to the first."""
        results = self.results
        for case in results.cases[:: -1 if number % 2 else 1]:
            if case in results.skipped:
                continue
            try:
                sample = self._run(case, first=number == 0)
            except ToolError as err:
                results.skipped[case] = str(err)
                results.samples.pop(case, None)
                continue
            if number:
                results.samples.setdefault(case, []).append(sample)

    def _run(self, case: Case, *, first: bool) -> Sample:
        numbers = range(case.devices)
        with ExitStack() as stack:
            try:
                ends = [open_ends(case.sink, self._directory, number) for number in numbers]
            except OSError as err:
                raise LocalIOError(f"{case.sink}: {err.strerror}", errno=err.errno) from err
            for end in ends:
                stack.callback(end.close)
            if case.sink in STREAMING:
                for number in numbers:
                    self._start_receiver(case, number, ends[number], hashing=first)
            for number in numbers:
                self._start_sender(case, number, ends[number])
            sent, received = self._answers(case)
            if case.sink not in STREAMING and case.sink != "null" and (case.is_own or first):
                received = [self._read_back(case, number, ends[number]) for number in numbers]
        devices = [self._devices[case.zeros, number] for number in numbers]
        for number in numbers:
            check(case, devices[number], sent[number], received[number] if received else None)
        return _sample(case, devices, sent, received if case.sink in STREAMING else [])

    def _start_receiver(self, case: Case, number: int, ends: Ends, *, hashing: bool) -> None:
        baseline = self._baselines.get(case.program)
        words: Iterable[str] = ()
        if baseline is not None and baseline.figures:
            keeping = hashing or self._plan.into != NOWHERE
            words = baseline.receive_words(case, keeping=keeping)
        raw = baseline is not None and not baseline.figures
        worker = self._crew.receivers[number]
        worker.request(Receive(tuple(words), raw, hashing), ends.source.fileno())
        ends.source.close()
        if not isinstance(ready := worker.answer(), Ready):
            raise MigrationError(f"the receiver answered {ready!r}")

    def _start_sender(self, case: Case, number: int, ends: Ends) -> None:
        baseline = self._baselines.get(case.program)
        self._crew.senders[number].request(_request(case, baseline, ends), ends.sink.fileno())
        ends.sink.close()

    def _answers(self, case: Case) -> tuple[list[Sent], list[Received]]:
        """Wait for all of them, so that none is under way when the first error is raised."""
        workers: list[Worker] = self._crew.senders[: case.devices]
        if case.sink in STREAMING:
            workers = workers + self._crew.receivers[: case.devices]
        answers = [worker.answer_or_error() for worker in workers]
        errors = [answer for answer in answers if isinstance(answer, MigrationError)]
        if errors:
            # One side that fails makes the other fail: a tool is the likelier cause.
            raise next((error for error in errors if isinstance(error, ToolError)), errors[0])
        return answers[: case.devices], answers[case.devices :]

    def _read_back(self, case: Case, number: int, ends: Ends) -> Received:
        """Let the receiver read the file that was written; this is not measured."""
        ends.source = OwnedFd(os.open(ends.path, os.O_RDONLY | os.O_CLOEXEC))
        self._start_receiver(case, number, ends, hashing=True)
        found: Received = self._crew.receivers[number].answer()
        return found


def _request(case: Case, baseline: Baseline | None, ends: Ends) -> Send:
    if baseline is None:
        return Send(case.zeros, case, ends.path)
    words = tuple(baseline.send_words(case))
    return Send(case.zeros, case, ends.path, words, baseline.figures, baseline.names_its_file)


def _sample(
    case: Case, devices: list[Opened], sent: list[Sent], received: list[Received]
) -> Sample:
    usages = [one.usage for one in sent]
    at_the_end = [one.usage for one in received] or usages
    elapsed_ns = max(usage.end_ns for usage in at_the_end) - min(usage.start_ns for usage in usages)
    # A tool that writes to nowhere says nothing; that it read to the end was looked at.
    counts = [one.device_bytes for one in received or sent]
    moved = [
        device.device_bytes if count is None else count
        for count, device in zip(counts, devices, strict=True)
    ]
    return Sample(
        seconds=elapsed_ns / 1e9,
        device_bytes=sum(moved),
        stream_bytes=sum(one.stream_bytes for one in sent),
        sender_cpu_s=sum(usage.cpu_s for usage in usages),
        receiver_cpu_s=sum(one.usage.cpu_s for one in received) if received else None,
        sender_peak_kib=_peak(usages),
        receiver_peak_kib=_peak([one.usage for one in received]),
        buffer_bytes=sent[0].buffer_bytes or case.buffer_bytes,
    )


def _peak(usages: list[Usage]) -> int | None:
    return max((usage.peak_kib for usage in usages if usage.peak_kib), default=None)
