"""Live migration of real devices: what was written before and during pre-copy arrives, and runs."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.command import run
from kernel.live import Ends
from kernel.mtty import DESTINATION, SCRATCH, SOURCE, Mtty, OpenMtty
from vfiomig import (
    DeviceState,
    MigrationReport,
    ReceiveOptions,
    SendOptions,
    StateChange,
    ioctl,
    receive,
    send,
)
from vfiomig.report import Event, OnEvent, StoppingSoon


@contextmanager
def opened(*devices: Mtty) -> Iterator[list[OpenMtty]]:
    with ExitStack() as stack:
        yield [stack.enter_context(mtty.opened()) for mtty in devices]


def migrate(
    sources: list[OpenMtty],
    destinations: list[OpenMtty],
    journal: Path,
    *,
    on_source: OnEvent | None = None,
    on_destination: OnEvent | None = None,
) -> tuple[MigrationReport, MigrationReport]:
    """Migrate over a pair of sockets, the destination in a thread of its own."""
    near, far = socket.socketpair()
    received: list[MigrationReport] = []

    def take() -> None:
        with far:
            options = ReceiveOptions(journal=journal / "there")
            devices, url = [mtty.device for mtty in destinations], f"fd:{far.fileno()}"
            received.append(receive(devices, url, options, on_event=on_destination))

    thread = threading.Thread(target=take)
    thread.start()
    try:
        with near:
            devices, url = [mtty.device for mtty in sources], f"fd:{near.fileno()}"
            sent = send(devices, url, SendOptions(journal=journal / "here"), on_event=on_source)
    finally:
        thread.join()
    return sent, received[0]


def test_what_was_written_before_during_and_at_the_end_of_pre_copy_arrives(
    source: Mtty, destination: Mtty, tmp_path: Path
) -> None:
    def write(event: Event) -> None:
        if isinstance(event, StateChange) and event.wanted is DeviceState.PRE_COPY:
            here.registers.write(0, SCRATCH, 0x5A)
        elif isinstance(event, StoppingSoon):
            here.registers.write(1, SCRATCH, 0xA7)

    with opened(source) as [here], opened(destination) as [there]:
        sent, received = migrate([here], [there], tmp_path, on_source=write)
        assert here.device.state() is DeviceState.STOP
        assert there.device.state() is DeviceState.RUNNING
        expected = [replace(SOURCE[0], scratch=0x5A), replace(SOURCE[1], scratch=0xA7)]
        assert there.registers.ports() == expected
    (moved,), (loaded,) = sent.devices, received.devices
    assert (moved.device_bytes, moved.pre_copy_bytes) == (96, 24)
    assert (loaded.device_bytes, loaded.pre_copy_bytes) == (96, 24)
    assert moved.digest == loaded.digest


def test_the_downtime_of_the_reports_is_true_within_what_they_say(
    source: Mtty, destination: Mtty, tmp_path: Path
) -> None:
    stopping: list[int] = []
    changes: list[StateChange] = []

    def look(event: Event) -> None:
        if isinstance(event, StoppingSoon):
            stopping.append(time.monotonic_ns())
        elif isinstance(event, StateChange) and stopping:
            changes.append(event)

    def note(event: Event) -> None:
        if isinstance(event, StateChange) and event.wanted is DeviceState.RUNNING:
            changes.append(event)

    with opened(source) as here, opened(destination) as there:
        sent, received = migrate(here, there, tmp_path, on_source=look, on_destination=note)
    longest_ns = time.monotonic_ns() - stopping[0]
    (running,) = [change for change in changes if change.wanted is DeviceState.RUNNING]
    shortest_ns = running.started_ns - (changes[0].started_ns + changes[0].duration_ns)
    downtime_ns, error_ns = sent.downtime_ns, sent.downtime_error_ns
    assert downtime_ns is not None
    assert error_ns is not None
    assert shortest_ns <= downtime_ns + error_ns
    assert downtime_ns - error_ns <= longest_ns
    assert (received.downtime_ns, received.downtime_error_ns) == (downtime_ns, error_ns)
    assert received.source_downtime_ns == sent.source_downtime_ns


def test_it_runs_at_one_end_only_and_shows_what_came_when_it_is_committed(
    source: Mtty, destination: Mtty, tmp_path: Path
) -> None:
    seen: list[tuple[str, list[int]]] = []
    sources: list[DeviceState] = []

    def look(event: Event) -> None:
        if isinstance(event, StateChange):
            seen.append((event.wanted.name, there.registers.scratch))
            sources.append(ioctl.get_device_state(here.device_fd))

    with opened(source) as [here], opened(destination) as [there]:
        migrate([here], [there], tmp_path, on_destination=look)
    old, new = [0xD1, 0xD2], [0x51, 0x52]
    assert seen == [
        ("RUNNING_P2P", old),
        ("STOP", old),
        ("RESUMING", old),
        ("STOP", new),
        ("RUNNING_P2P", new),
        ("RUNNING", new),
    ]
    assert sources[:3] == [DeviceState.RUNNING] * 3
    assert set(sources[3:]) <= {DeviceState.STOP_COPY, DeviceState.STOP}


def test_of_two_devices_none_is_stopped_or_runs_while_the_other_may_not_hear_it(
    source: Mtty,
    destination: Mtty,
    small_source: Mtty,
    small_destination: Mtty,
    tmp_path: Path,
) -> None:
    stops: list[str] = []
    starts: list[str] = []

    def note(states: list[str]) -> OnEvent:
        return lambda event: (
            states.append(event.wanted.name) if isinstance(event, StateChange) else None
        )

    with opened(source, small_source) as here, opened(destination, small_destination) as there:
        migrate(here, there, tmp_path, on_source=note(stops), on_destination=note(starts))
        assert there[0].registers.ports() == list(SOURCE)
        assert there[1].registers.ports() == list(SOURCE[:1])
    assert stops.count("PRE_COPY_P2P") == 2
    assert "PRE_COPY_P2P" not in stops[stops.index("STOP_COPY") :]
    assert starts[-4:] == ["RUNNING_P2P", "RUNNING_P2P", "RUNNING", "RUNNING"]


@pytest.mark.parametrize(
    ("url", "connections"), [("tcp:127.0.0.1:0", "2"), ("tcp:[::1]:0", "1"), ("", "1")]
)
def test_the_commands_move_two_devices_in_one_session(
    source: Mtty,
    destination: Mtty,
    small_source: Mtty,
    small_destination: Mtty,
    ends: Ends,
    url: str,
    connections: str,
) -> None:
    here = [source.uuid, small_source.uuid]
    there = [destination.uuid, small_destination.uuid]
    with ends.receiving(*there, url or ends.socket) as (receiver, address):
        with ends.sending(*here, address, "--connections", connections) as sender:
            sent = sender.finish()
        received = receiver.finish()
    assert (sent.code, received.code) == (0, 0), sent.text + received.text
    (result,), (taken,) = sent.of_type("result"), received.of_type("result")
    assert [moved["device_bytes"] for moved in result["devices"]] == [96, 60]
    digests = [moved["digest"] for moved in result["devices"]]
    assert [moved["digest"] for moved in taken["devices"]] == digests
    assert result["session"] == taken["session"]
    assert result["downtime_ns"] == taken["downtime_ns"] > 0
    assert destination.is_untouched(SOURCE)
    assert small_destination.is_untouched(SOURCE[:1])
    assert [mtty.state().name for mtty in (source, small_source)] == ["STOP", "STOP"]


def test_without_pre_copy_it_is_stopped_before_anything_is_read(
    source: Mtty, destination: Mtty, ends: Ends
) -> None:
    moved = ends.move([source.uuid], [destination.uuid], "--pre-copy", "off")
    assert moved.codes == (0, 0), moved.sent.text
    states = [change["wanted"] for change in moved.sent.of_type("transition")]
    assert states == ["RUNNING_P2P", "STOP", "STOP_COPY", "STOP"]
    (result,) = moved.sent.of_type("result")
    (device,) = result["devices"]
    assert (device["device_bytes"], device["pre_copy_bytes"], result["rounds"]) == (96, 0, 0)
    assert destination.is_untouched(SOURCE)


def test_after_a_reset_here_it_runs_at_both_ends(
    source: Mtty, destination: Mtty, ends: Ends
) -> None:
    moved = ends.move([source.uuid], [destination.uuid], "--after", "reset")
    assert moved.codes == (0, 0), moved.sent.text
    assert source.state() is DeviceState.RUNNING
    assert destination.is_untouched(SOURCE)


def test_it_moves_there_and_back_again(source: Mtty, destination: Mtty, ends: Ends) -> None:
    moved = ends.move([source.uuid], [destination.uuid], "--after", "reset")
    assert moved.codes == (0, 0), moved.sent.text
    moved = ends.move([destination.uuid], [source.uuid])
    assert moved.codes == (0, 0), moved.sent.text
    assert source.is_untouched(SOURCE)
    assert destination.state() is DeviceState.STOP


def test_two_of_one_type_fit_and_others_do_not_by_sysfs_alone(
    source: Mtty, destination: Mtty, small_destination: Mtty
) -> None:
    with source.opened():  # what is in use can be checked as well
        done = run("check", source.uuid, destination.uuid, "--json")
    (result,) = done.of_type("result")
    assert (done.code, result["fits"], result["fields"]) == (0, True, [])
    done = run("check", source.uuid, small_destination.uuid, "--json")
    (result,) = done.of_type("result")
    assert (done.code, result["fits"]) == (12, False)
    assert [field["field"] for field in result["fields"]] == ["model"]


def test_a_destination_of_another_type_is_refused_before_anything_is_stopped(
    source: Mtty, small_destination: Mtty, ends: Ends
) -> None:
    moved = ends.move([source.uuid], [small_destination.uuid])
    assert moved.codes == (12, 12), moved.sent.text
    assert moved.sent.of_type("transition") == moved.received.of_type("transition") == []
    for end in (moved.sent, moved.received):
        (error,) = end.of_type("error")
        assert "mtty-2" in error["message"]
        assert "mtty-1" in error["message"]
    assert source.is_untouched(SOURCE)
    assert small_destination.is_untouched(DESTINATION[:1])


def test_a_state_that_the_driver_refuses_leaves_the_source_running(
    source: Mtty, small_destination: Mtty, ends: Ends
) -> None:
    with (
        ends.receiving(small_destination.uuid, ends.socket, "--allow-mismatch", "model") as there,
        ends.sending(source.uuid, there[1]) as sender,
    ):
        sent, received = sender.finish(), there[0].finish()
    assert (sent.code, received.code) == (9, 6), sent.text + received.text
    (error,) = received.of_type("error")
    assert (error["errno_name"], error["phase"]) == ("EFAULT", "load")  # mtty's: another header
    assert "was reset and is RUNNING" in sent.of_type("error")[0]["dest_state"]
    assert source.is_untouched(SOURCE)
    assert small_destination.state() is DeviceState.RUNNING
