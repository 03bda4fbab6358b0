"""The same bytes as QEMU: tests/data/qemu-10.0-mtty-2.json says how its stream was made."""

import json
from pathlib import Path

import pytest

from kernel.command import run
from kernel.mtty import HEADER, SCRATCH, Mtty, Port, state_bytes
from kernel.streams import DATA, QEMU, loaded, piped, saved
from vfiomig import PreCopyLimits, QemuFraming, SaveOptions, inspect

MADE = json.loads((DATA / "qemu-10.0-mtty-2.json").read_text())
SECTIONS = (DATA / MADE["file"]).read_bytes()
*WITHOUT_CONFIG, FULL = MADE["sections"]
STATE = bytes.fromhex(MADE["device_state_hex"])
SCRATCHES = [int(text, 16) for text in MADE["uart_scratch_registers"]]
FRAMING = QemuFraming(MADE["section_id"], MADE["idstr"])


@pytest.fixture
def as_in_qemu(source: Mtty) -> Mtty:
    """A device as QEMU's guest left it: both scratch registers written, and nothing else."""
    with source.opened() as device:
        device.install([Port(), Port()])
        for port, value in enumerate(SCRATCHES):
            device.registers.write(port, SCRATCH, value)
    return source


def test_the_reference_is_a_state_of_two_ports() -> None:
    assert state_bytes([Port(value) for value in SCRATCHES]) == STATE
    assert [HEADER.size, len(STATE) - HEADER.size] == MADE["device_state_pieces"]


def test_the_command_writes_the_sections_of_qemu_byte_for_byte(
    as_in_qemu: Mtty, tmp_path: Path
) -> None:
    file = tmp_path / "sections"
    framing = ["--framing", "qemu", "--section-id", "38", "--idstr", "0000:00:05.0/vfio"]
    done = run("save", as_in_qemu.uuid, str(file), *framing, "--pre-copy")
    assert done.code == 0, done.err
    assert file.read_bytes() == SECTIONS[: FULL["offset"]]
    assert [section["section"] for section in WITHOUT_CONFIG] == ["START", "PART", "PART", "END"]


def test_with_qemus_config_blob_the_stream_is_qemus_to_its_last_byte(as_in_qemu: Mtty) -> None:
    with piped(SECTIONS) as read_end:
        found = inspect(read_end)
    assert found.sound, found.problem
    options = SaveOptions(framing=FRAMING, pre_copy=PreCopyLimits(), config=found.config)
    assert saved(as_in_qemu, options) == SECTIONS


def test_without_precopy_the_state_is_one_record_of_the_end_section(as_in_qemu: Mtty) -> None:
    sections = saved(as_in_qemu, SaveOptions(framing=FRAMING))
    start = SECTIONS[: WITHOUT_CONFIG[0]["bytes"]]
    # Section END and its id; the tag DATA, the length; the state; the tag END, the footer.
    end = SECTIONS[WITHOUT_CONFIG[3]["offset"] :][:13] + (96).to_bytes(8, "big") + STATE
    assert sections == start + end + SECTIONS[FULL["offset"] - 13 : FULL["offset"]]


def test_what_qemu_wrote_loads(destination: Mtty) -> None:
    report = loaded(SECTIONS, destination)
    assert (report.framing, report.device_bytes) == ("qemu", 96)
    assert destination.is_untouched([Port(value) for value in SCRATCHES])
    # What QEMU knows of its guest's PCI device is not for us: it is handed over as it came.
    assert report.config
    assert report.config in SECTIONS[FULL["offset"] :]


def test_the_command_loads_what_qemu_wrote_and_keeps_its_config_blob(
    destination: Mtty, tmp_path: Path
) -> None:
    blob = tmp_path / "config"
    done = run("load", str(DATA / MADE["file"]), destination.uuid, "--config-out", str(blob))
    assert done.code == 0, done.err
    assert destination.is_untouched([Port(value) for value in SCRATCHES])
    assert blob.read_bytes() in SECTIONS[FULL["offset"] :]


def test_an_mdev_is_named_vfio_in_its_sections(source: Mtty) -> None:
    assert saved(source, QEMU)[:10] == bytes([1, 0, 0, 0, 1, 4]) + b"vfio"
