"""Live migration between two test devices: pages change while it runs, and the digests agree."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.live import Ends
from kernel.migtest import MigTest, OpenMigTest
from vfiomig import (
    DeviceState,
    MigrationError,
    MigrationReport,
    PreCopyLimits,
    ReceiveOptions,
    SendOptions,
    receive,
    send,
)
from vfiomig.report import Event, StateChange

pytestmark = pytest.mark.usefixtures("driver")

SIZE = 1_000_001
# The lab is slow: what is tested is not how long the device stands still.
PATIENT_NS = 30_000_000_000
S = DeviceState


def migrate(
    here: OpenMigTest,
    there: OpenMigTest,
    journal: Path,
    pre_copy: PreCopyLimits | None = PreCopyLimits(),  # noqa: B008  frozen
    on_event: Callable[[Event], None] | None = None,
) -> tuple[MigrationReport | MigrationError, MigrationReport | MigrationError]:
    """Migrate over a pair of sockets. Returns what each end says, its report or its error."""
    near, far = socket.socketpair()
    received: list[MigrationReport | MigrationError] = []

    def take() -> None:
        options = ReceiveOptions(journal=journal / "there", silence_ns=PATIENT_NS)
        try:
            with far:
                received.append(receive([there.device], f"fd:{far.fileno()}", options))
        except MigrationError as err:
            received.append(err)

    thread = threading.Thread(target=take)
    thread.start()
    options = SendOptions(
        pre_copy=pre_copy,
        downtime_limit_ns=PATIENT_NS,
        silence_ns=PATIENT_NS,
        journal=journal / "here",
    )
    sent: MigrationReport | MigrationError
    try:
        with near:
            sent = send([here.device], f"fd:{near.fileno()}", options, on_event=on_event)
    except MigrationError as err:
        sent = err
    finally:
        thread.join()
    return sent, received[0]


@pytest.mark.parametrize("drained", ["ENOMSG", "0"])
@pytest.mark.parametrize("dirty", [0, 1 << 20])
def test_what_changed_while_it_was_copied_arrives(tmp_path: Path, drained: str, dirty: int) -> None:
    shape: dict[str, int | str] = {"state_bytes": SIZE, "dirty_bytes_per_s": dirty}
    with (
        MigTest.created(seed=7, drained=drained, **shape) as source,
        MigTest.created(seed=8) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):
        before = source.digest
        sent, received = migrate(here, there, tmp_path)
        assert isinstance(sent, MigrationReport), sent
        assert isinstance(received, MigrationReport), received
        assert (source.state, destination.state) == (S.STOP, S.RUNNING)
        assert destination.contents == source.contents
        assert (source.digest != before) is (dirty > 0)
        (moved,), (taken,) = sent.devices, received.devices
        assert moved.digest == taken.digest
        assert moved.pre_copy_bytes >= SIZE


def test_a_device_that_changes_faster_than_it_is_copied_is_stopped_nevertheless(
    tmp_path: Path,
) -> None:
    shape = {"state_bytes": SIZE, "dirty_bytes_per_s": 1 << 30, "seed": 7}
    with (
        MigTest.created(**shape) as source,
        MigTest.created(seed=8) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):
        sent, received = migrate(here, there, tmp_path, PreCopyLimits(duration_ns=1_000_000_000))
        assert isinstance(sent, MigrationReport), sent
        assert isinstance(received, MigrationReport), received
        assert destination.contents == source.contents


def test_initial_data_that_begins_anew_is_copied_anew(tmp_path: Path) -> None:
    shape = {"state_bytes": SIZE, "dirty_bytes_per_s": 1 << 20, "reinit_at": 2, "seed": 7}
    with (
        MigTest.created(**shape) as source,
        MigTest.created(seed=8) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):
        sent, received = migrate(here, there, tmp_path)
        assert isinstance(sent, MigrationReport), sent
        assert isinstance(received, MigrationReport), received
        assert destination.contents == source.contents


@pytest.mark.parametrize(
    "fault",
    [
        "read 500000 errno 5 1",
        f"read {SIZE + 100} errno 5 1",
        "read 500000 reset 0 1",
        "read 500000 error 5 1",
        f"enter {int(S.STOP_COPY)} errno 16 1",
    ],
)
def test_a_source_that_fails_runs_on_and_the_destination_is_reset(
    tmp_path: Path, fault: str
) -> None:
    shape = {"state_bytes": SIZE, "dirty_bytes_per_s": 1 << 20, "seed": 7}
    with (
        MigTest.created(**shape, fault=fault) as source,
        MigTest.created(seed=8) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):
        blank = destination.contents
        sent, received = migrate(here, there, tmp_path)
        assert isinstance(sent, MigrationError), sent
        assert isinstance(received, MigrationError), received
        assert (sent.code, received.code) == (6, 9)
        assert (source.state, destination.state) == (S.RUNNING, S.RUNNING)
        assert destination.contents == blank


@pytest.mark.parametrize(
    "fault",
    [
        "write 500000 errno 28 1",
        "write 500000 reset 0 1",
        "write 500000 error 5 1",
        "arc 4 errno 22",
    ],
)
def test_a_destination_that_fails_leaves_the_source_running(tmp_path: Path, fault: str) -> None:
    with (
        MigTest.created(state_bytes=SIZE, seed=7) as source,
        MigTest.created(seed=8, fault=fault) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):
        blank, before = destination.contents, source.contents
        sent, received = migrate(here, there, tmp_path)
        assert isinstance(sent, MigrationError), sent
        assert isinstance(received, MigrationError), received
        assert (sent.code, received.code) == (9, 6)
        assert (source.state, destination.state) == (S.RUNNING, S.RUNNING)
        assert (source.contents, destination.contents) == (before, blank)
        destination.set("fault", "clear")
        again, taken = migrate(here, there, tmp_path)
        assert isinstance(again, MigrationReport), again
        assert isinstance(taken, MigrationReport), taken
        assert destination.contents == source.contents


def test_a_device_that_is_changed_by_itself_in_pre_copy_arrives_with_its_scratch_register(
    tmp_path: Path,
) -> None:
    with (
        MigTest.created(state_bytes=SIZE, seed=7) as source,
        MigTest.created(seed=8) as destination,
        source.opened() as here,
        destination.opened() as there,
    ):

        def write(event: Event) -> None:
            if isinstance(event, StateChange) and event.wanted is S.PRE_COPY:
                here.write_bar(0x20, 0x5A5A)

        sent, _ = migrate(here, there, tmp_path, on_event=write)
        assert isinstance(sent, MigrationReport), sent
        assert there.read_bar(0x20) == 0x5A5A
        assert there.read_bar(0x08) == int(destination.digest, 16) == int(source.digest, 16)


def test_the_commands_move_two_devices_in_one_session(ends: Ends) -> None:
    shape = {"state_bytes": SIZE, "dirty_bytes_per_s": 1 << 18}
    with (
        MigTest.created(seed=1, **shape) as first,
        MigTest.created(seed=2, **shape) as second,
        MigTest.created(seed=3) as third,
        MigTest.created(seed=4) as fourth,
    ):
        moved = ends.move([first.uuid, second.uuid], [third.uuid, fourth.uuid])
        assert moved.codes == (0, 0), moved.sent.text + moved.received.text
        assert third.contents == first.contents
        assert fourth.contents == second.contents
