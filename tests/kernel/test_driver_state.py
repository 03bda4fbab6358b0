"""Saved from one test device and loaded into another: its digests say whether all of it came."""

import os
import threading
from pathlib import Path

import pytest

from kernel.migtest import MigTest
from kernel.streams import QEMU
from vfiomig import (
    DeviceState,
    LoadOptions,
    PreCopyLimits,
    SaveOptions,
    TransferReport,
    inspect,
    load,
    save,
)
from vfiomig.fd import OwnedFd

pytestmark = pytest.mark.usefixtures("driver")

GIB = 1 << 30
SIZES = [0, 1, 63, 64, 65, 4095, 4096, 4097, 1 << 20]
FRAMINGS = {"native": SaveOptions(), "qemu": QEMU}
framings = pytest.mark.parametrize("options", FRAMINGS.values(), ids=list(FRAMINGS))
PRE_COPY = SaveOptions(pre_copy=PreCopyLimits())


def saved(device: MigTest, target: Path, options: SaveOptions = SaveOptions()) -> TransferReport:  # noqa: B008  frozen
    with device.opened() as source:
        return save(source.device, target, options)


def loaded(file: Path, device: MigTest) -> TransferReport:
    with device.opened() as destination:
        return load(file, destination.device)


@framings
@pytest.mark.parametrize("size", SIZES)
def test_every_size_arrives_whole(tmp_path: Path, size: int, options: SaveOptions) -> None:
    with (
        MigTest.created(state_bytes=size, seed=7) as source,
        MigTest.created(state_bytes=size, seed=8) as destination,
    ):
        assert size == 0 or source.digest != destination.digest
        out, back = (
            saved(source, tmp_path / "state", options),
            loaded(tmp_path / "state", destination),
        )
        assert (out.device_bytes, back.device_bytes) == (size, size)
        assert destination.contents == source.contents
        assert destination.state is source.state is DeviceState.RUNNING


def test_a_destination_of_another_size_takes_the_size_of_what_is_loaded(tmp_path: Path) -> None:
    with (
        MigTest.created(state_bytes=100_000, seed=7) as source,
        MigTest.created(state_bytes=5000, seed=8) as destination,
    ):
        saved(source, tmp_path / "state")
        loaded(tmp_path / "state", destination)
        assert destination.contents == source.contents


def test_two_gibibytes_go_through_a_pipe(tmp_path: Path) -> None:
    """Without ever being anywhere: neither device, nor pipe, nor vfiomig holds it."""
    shape = {"state_bytes": 2 * GIB, "zero_percent": 95}
    read_fd, write_fd = os.pipe()
    reports: list[TransferReport] = []
    with (
        MigTest.created(seed=7, **shape) as source,
        MigTest.created(seed=8, state_bytes=4096) as destination,
        source.opened() as here,
        destination.opened() as there,
        OwnedFd(read_fd),
    ):

        def send() -> None:
            with OwnedFd(write_fd):
                reports.append(save(here.device, write_fd))

        thread = threading.Thread(target=send)
        thread.start()
        back = load(read_fd, there.device)
        thread.join()
        assert back.device_bytes == 2 * GIB
        # What is zero has not travelled, within a tenth of what should be.
        assert back.zero_bytes > 1.8 * GIB
        assert reports[0].digest == back.digest
        assert destination.contents == source.contents


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_runs_of_zeros_arrive_as_zeros(tmp_path: Path, percent: int) -> None:
    with (
        MigTest.created(state_bytes=300_001, zero_percent=percent, seed=7) as source,
        MigTest.created() as destination,
    ):
        report = saved(source, tmp_path / "state")
        loaded(tmp_path / "state", destination)
        assert destination.contents == source.contents
    assert (report.zero_bytes > 0) is (percent > 0)


@framings
def test_what_is_saved_twice_is_the_same(tmp_path: Path, options: SaveOptions) -> None:
    with MigTest.created(state_bytes=50_001) as source:
        first = saved(source, tmp_path / "first", options)
        second = saved(source, tmp_path / "second", options)
    assert first.digest == second.digest


def test_it_moves_on_from_where_it_was_loaded(tmp_path: Path) -> None:
    with (
        MigTest.created(state_bytes=50_001, seed=7) as first,
        MigTest.created() as second,
        MigTest.created() as third,
    ):
        saved(first, tmp_path / "1")
        loaded(tmp_path / "1", second)
        saved(second, tmp_path / "2", PRE_COPY)
        loaded(tmp_path / "2", third)
        assert third.contents == second.contents == first.contents


@pytest.mark.parametrize("drained", ["ENOMSG", "0"])
def test_both_ways_to_say_nothing_now_are_taken_for_what_they_are(
    tmp_path: Path, drained: str
) -> None:
    shape = {"state_bytes": 300_001, "initial_bytes": 50_000}
    with (
        MigTest.created(drained=drained, **shape) as source,
        MigTest.created(seed=8) as destination,
    ):
        saved(source, tmp_path / "state", PRE_COPY)
        found = inspect(tmp_path / "state")
        assert found.pre_copy_bytes == 50_000
        assert found.device_bytes > found.pre_copy_bytes
        loaded(tmp_path / "state", destination)
        assert destination.contents == source.contents


@pytest.mark.parametrize("capabilities", [1, 3, 5, 7])
def test_every_set_of_capabilities_moves(tmp_path: Path, capabilities: int) -> None:
    options = PRE_COPY if capabilities & 4 else SaveOptions()
    with (
        MigTest.created(capabilities=capabilities, state_bytes=10_000, seed=7) as source,
        MigTest.created(capabilities=capabilities) as destination,
    ):
        saved(source, tmp_path / "state", options)
        loaded(tmp_path / "state", destination)
        assert destination.contents == source.contents


@pytest.mark.parametrize(
    "slow",
    [
        {"read_most": 1000},
        {"write_most": 999},
        {"latency_us": 2000},
        {"bytes_per_s": 2_000_000},
        {"read_most": 1, "state_bytes": 500},
        {"poll": 1, "nonblock": 1},
    ],
    ids=str,
)
@framings
def test_short_and_slow_transfers_lose_nothing(
    tmp_path: Path, options: SaveOptions, slow: dict[str, int]
) -> None:
    shape = {"state_bytes": 100_001} | slow
    with (
        MigTest.created(**shape, seed=7) as source,
        MigTest.created(**shape, seed=8) as destination,
    ):
        out = saved(source, tmp_path / "state", options)
        back = loaded(tmp_path / "state", destination)
        assert out.digest == back.digest
        assert destination.contents == source.contents


@pytest.mark.parametrize("claimed", [0, 1, 10_000_000, (1 << 64) - 1])
def test_a_size_that_lies_changes_nothing(tmp_path: Path, claimed: int) -> None:
    with (
        MigTest.created(state_bytes=100_001, reported_bytes=claimed, seed=7) as source,
        MigTest.created() as destination,
    ):
        report = saved(source, tmp_path / "state")
        loaded(tmp_path / "state", destination)
        assert report.device_bytes == 100_001
        assert destination.contents == source.contents


def test_pages_that_change_in_pre_copy_arrive_as_they_were_last(tmp_path: Path) -> None:
    shape = {"state_bytes": 1 << 20, "dirty_bytes_per_s": 1 << 20}
    with MigTest.created(seed=7, **shape) as source, MigTest.created() as destination:
        before = source.digest
        after_stop = SaveOptions(pre_copy=PreCopyLimits(rounds=4), after=DeviceState.STOP)
        report = saved(source, tmp_path / "state", after_stop)
        assert report.device_bytes > 1 << 20
        assert source.digest != before
        loaded(tmp_path / "state", destination)
        assert destination.contents == source.contents


def test_it_may_be_left_in_stop_with_what_was_loaded(tmp_path: Path) -> None:
    with (
        MigTest.created(state_bytes=10_000, seed=7) as source,
        MigTest.created() as destination,
    ):
        saved(source, tmp_path / "state", SaveOptions(after=DeviceState.STOP))
        assert source.state is DeviceState.STOP
        with destination.opened() as there:
            load(tmp_path / "state", there.device, LoadOptions(after=DeviceState.STOP))
        assert destination.state is DeviceState.STOP
        assert destination.contents == source.contents


def test_a_device_that_forgets_is_blank_again_when_it_is_closed(tmp_path: Path) -> None:
    """As those behind vfio-pci: what is loaded lives as long as somebody has it open."""
    with (
        MigTest.created(state_bytes=10_000, seed=7) as source,
        MigTest.created(state_bytes=10_000, seed=8, keeps_state=0) as destination,
    ):
        blank = destination.contents
        saved(source, tmp_path / "state")
        with destination.opened() as there:
            load(tmp_path / "state", there.device)
            assert destination.contents == source.contents
        assert destination.contents == blank
