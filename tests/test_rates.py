"""What devices were measured to do: kept, bounded, and never in the way of a migration."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from vfiomig.identity import Identity
from vfiomig.rates import KEPT, MAX_DEVICES, Measured, Rates, Role
from vfiomig.switchover import Band

VF, OTHER = Identity("mlx5_vfio_pci", "", "15b3", "101e"), Identity("sim:xe")
MIB = 1 << 20


def add(rates: Rates, *values: int, role: Role = "read", identity: Identity = VF) -> None:
    for value in values:
        rates.add(role, identity, bytes_per_s=value, fixed_ns=value * 2, moved_bytes=MIB)


def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    add(Rates(tmp_path), 300, 100, 200)
    expected = Measured(Band(200, 100, 300), Band(400, 200, 600))
    assert Rates(tmp_path).read("read", VF) == expected


def test_nothing_is_known_of_another_role_or_device(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    assert rates.read("read", VF) is None
    add(rates, 100)
    assert rates.read("source", VF) is None
    assert rates.read("read", OTHER) is None
    assert rates.read("read", Identity("mlx5_vfio_pci", "", "15b3", "101f")) is None


def test_the_last_measurements_are_kept(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    add(rates, 9999, *range(1, KEPT + 1))
    assert rates.read("read", VF) == Measured(Band(4, 1, 8), Band(8, 2, 16))


def test_a_small_transfer_tells_what_is_fixed_but_no_rate(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    rates.add("read", VF, bytes_per_s=5, fixed_ns=100, moved_bytes=MIB - 1)
    assert rates.read("read", VF) == Measured(None, Band(100, 80, 125))
    rates.add("read", VF, bytes_per_s=0, fixed_ns=100, moved_bytes=MIB)
    assert rates.read("read", VF) == Measured(None, Band(100, 100, 100))


def test_the_kinds_of_devices_are_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    kinds = [Identity(f"driver{number}") for number in range(MAX_DEVICES + 1)]
    for kind in kinds:
        add(rates, 1, identity=kind)
        add(rates, 1, identity=kinds[1])  # in use: it stays
    assert rates.read("read", kinds[0]) is None
    assert rates.read("read", kinds[1]) is not None
    assert rates.read("read", kinds[-1]) is not None


def test_the_file_is_the_owners_alone_and_nothing_else_is_left(tmp_path: Path) -> None:
    rates = Rates(tmp_path / "new/directory")
    add(rates, 1, 2)
    (file,) = (tmp_path / "new/directory").iterdir()
    assert file.name == "rates.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert json.loads(file.read_text())["version"] == 1


def test_of_sessions_the_fastest_counts(tmp_path: Path) -> None:
    """A slow link says nothing of a device: it only shows less."""
    rates = Rates(tmp_path)
    assert rates.of_source(VF) is rates.of_destination(VF) is None
    add(rates, 100, 300, 200, role="source")
    add(rates, 10, 20, 30, role="destination")
    assert rates.of_source(VF) == Measured(Band(300, 100, 300), Band(400, 200, 600))
    assert rates.of_destination(VF) == Measured(Band(30, 10, 30), Band(40, 20, 60))


def test_at_the_source_a_reading_goes_before_sessions(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    add(rates, 100, 300, 200, role="read")
    assert rates.of_source(VF) == rates.read("read", VF)
    add(rates, 1, 2, 3, role="source")
    assert rates.of_source(VF) == Measured(Band(200, 100, 300), Band(4, 2, 6))
    rates.add("read", OTHER, bytes_per_s=0, fixed_ns=7, moved_bytes=9)
    add(rates, 1, 3, role="source", identity=OTHER)
    assert rates.of_source(OTHER) == Measured(Band(3, 1, 3), Band(2, 2, 6))


ENTRY = {"role": "read", "identity": {name: "" for name in Identity.__slots__}}
DAMAGE = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "no text": b"\xff\xfe",
    "nested": b"[" * 100_000,
    "no measurements": b'{"version":1}',
    "text for numbers": json.dumps(
        {"measurements": [ENTRY | {"bytes_per_s": ["1"], "fixed_ns": []}]}
    ).encode(),
    "negative": json.dumps(
        {"measurements": [ENTRY | {"bytes_per_s": [-1], "fixed_ns": []}]}
    ).encode(),
    "true": json.dumps(
        {"measurements": [ENTRY | {"bytes_per_s": [True], "fixed_ns": []}]}
    ).encode(),
    "no identity": json.dumps(
        {"measurements": [{"role": "read", "bytes_per_s": [], "fixed_ns": []}]}
    ).encode(),
    "endless": b" " * (1 << 20),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_nothing_known_and_is_written_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rates.json").write_bytes(data)
    rates = Rates(tmp_path)
    assert rates.read("read", VF) is None
    add(rates, 1)
    assert rates.read("read", VF) is not None


def test_a_link_or_a_fifo_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "rates.json").symlink_to(target)
    rates = Rates(tmp_path)
    assert rates.read("read", VF) is None
    add(rates, 1)
    assert (target.read_text(), rates.read("read", VF) is None) == ("precious", False)
    (tmp_path / "rates.json").unlink()
    os.mkfifo(tmp_path / "rates.json")
    assert rates.read("read", VF) is None


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rates = Rates(tmp_path / "file")
    add(rates, 1)
    assert rates.read("read", VF) is None
    (tmp_path / "rates.json").mkdir()
    rates = Rates(tmp_path)
    add(rates, 1)
    assert rates.read("read", VF) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "rates.json"]


def test_several_threads_keep_a_sound_file(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    threads = [threading.Thread(target=add, args=(rates, number)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rates.read("read", VF) == Measured(Band(4, 1, 8), Band(8, 2, 16))
