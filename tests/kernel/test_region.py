"""The legacy protocol v1 against a kernel: the test device with a migration region."""

import errno
from pathlib import Path

import pytest

from kernel.command import run
from kernel.migtest import MigTest
from vfiomig import (
    DeviceIOError,
    DeviceState,
    DeviceStateError,
    LoadOptions,
    NotMigratableError,
    PreCopyLimits,
    QemuFraming,
    SaveOptions,
    StreamMismatchError,
    inspect,
    load,
    open_device,
    save,
)
from vfiomig.backends.kernel_region import find_region
from vfiomig.incoming.checked import FrameInfo
from vfiomig.region import RegionOps

S = DeviceState
MODES = {
    "native": SaveOptions(buffer_bytes=8192),
    "native-pre-copy": SaveOptions(pre_copy=PreCopyLimits()),
    "qemu": SaveOptions(framing=QemuFraming()),
}
pytestmark = pytest.mark.usefixtures("driver")


def test_a_device_without_v2_is_driven_through_its_region() -> None:
    with MigTest.created("v1", region_data_bytes=10_000) as device, device.opened() as opened:
        assert opened.device.protocol == "v1"
        assert isinstance(opened.device.ops, RegionOps)
        assert opened.device.region_bytes > 10_000
        assert opened.device.state() is S.RUNNING


def test_v2_is_spoken_where_a_device_has_it() -> None:
    with MigTest.created("v2") as device, device.opened() as opened:
        assert opened.device.protocol == "v2"
        assert find_region(opened.device_fd) is None


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("mmap", [0, 1])
def test_what_was_saved_is_loaded_and_the_digest_proves_it(
    tmp_path: Path, options: SaveOptions, mmap: int
) -> None:
    shape = {"state_bytes": 1_000_001, "region_data_bytes": 30_000, "region_mmap": mmap}
    with (
        MigTest.created("v1", seed=7, **shape) as source,
        MigTest.created("v1", seed=8, **shape) as destination,
    ):
        before = source.contents
        assert destination.digest != source.digest
        with open_device(source.uuid) as device:
            report = save(device, tmp_path / "out", options)
        assert report.device_bytes >= 1_000_001
        with open_device(destination.uuid) as device:
            assert load(tmp_path / "out", device).digest == report.digest
            assert device.state() is S.RUNNING
        assert destination.contents == source.contents == before


def test_chunks_keep_their_sizes(tmp_path: Path) -> None:
    sizes: list[int] = []
    chunk = 0
    options = SaveOptions(buffer_bytes=4096, elide_zeros=False)
    with (
        MigTest.created("v1", state_bytes=100_000, region_data_bytes=30_000) as source,
        open_device(source.uuid) as device,
    ):
        save(device, tmp_path / "out", options)
    frames: list[FrameInfo] = []
    inspect(tmp_path / "out", on_frame=frames.append)
    for frame in frames:
        if frame.kind == "DATA":
            chunk += frame.length_bytes
        if frame.ends_chunk:
            sizes.append(chunk)
            chunk = 0
    assert sum(sizes) == 100_000
    assert max(sizes) <= 30_000
    assert len(sizes) == 4


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_device_that_takes_chunks_only_as_they_left_takes_them(
    tmp_path: Path, options: SaveOptions
) -> None:
    shape = {"state_bytes": 100_000, "region_data_bytes": 30_000, "region_framed": 1}
    with (
        MigTest.created("v1", **shape) as source,
        MigTest.created("v1", seed=5, **shape) as destination,
    ):
        with open_device(source.uuid) as device:
            save(device, tmp_path / "out", options)
        with open_device(destination.uuid) as device:
            load(tmp_path / "out", device)
        assert destination.contents == source.contents


def test_a_smaller_region_is_refused_before_the_first_write(tmp_path: Path) -> None:
    with (
        MigTest.created("v1", state_bytes=100_000, region_data_bytes=30_000) as source,
        MigTest.created("v1", seed=5, state_bytes=100_000, region_data_bytes=8192) as destination,
    ):
        with open_device(source.uuid) as device:
            save(device, tmp_path / "out")
        before = destination.contents
        arcs = destination.get("arcs")
        with open_device(destination.uuid) as device:
            with pytest.raises(StreamMismatchError, match="migration region"):
                load(tmp_path / "out", device)
            allowed = LoadOptions(allow_mismatch=frozenset({"region_bytes"}))
            assert destination.get("arcs") == arcs
            with pytest.raises(DeviceIOError) as caught:
                load(tmp_path / "out", device, allowed)
            assert caught.value.errno == errno.EMSGSIZE
            assert device.state() is S.RUNNING
        assert before[1] == destination.held_bytes


@pytest.mark.parametrize("fault", ["read 50000 errno 5", "read 50000 reset 0", "enter 3 errno 5"])
def test_a_save_that_fails_leaves_a_running_device(tmp_path: Path, fault: str) -> None:
    with (
        MigTest.created("v1", state_bytes=100_000, fault=[f"{fault} 1"]) as source,
        open_device(source.uuid) as device,
    ):
        with pytest.raises((DeviceIOError, DeviceStateError)):
            save(device, tmp_path / "out")
        assert device.state() is S.RUNNING
        assert not (tmp_path / "out").exists()
        save(device, tmp_path / "out")


@pytest.mark.parametrize("fault", ["write 50000 errno 28", "write 50000 reset 0"])
def test_a_load_that_fails_ends_in_a_reset(tmp_path: Path, fault: str) -> None:
    with (
        MigTest.created("v1", state_bytes=100_000) as source,
        MigTest.created("v1", seed=5, state_bytes=100_000, fault=[f"{fault} 1"]) as destination,
    ):
        with open_device(source.uuid) as device:
            save(device, tmp_path / "out")
        with open_device(destination.uuid) as device:
            with pytest.raises(DeviceIOError):
                load(tmp_path / "out", device)
            assert device.state() is S.RUNNING
            load(tmp_path / "out", device)
        assert destination.digest == source.digest


def test_a_damaged_state_is_refused_at_the_commit(tmp_path: Path) -> None:
    with (
        MigTest.created("v1", state_bytes=100_000) as source,
        MigTest.created("v1", seed=5, state_bytes=100_000) as destination,
    ):
        options = SaveOptions(framing=QemuFraming())
        with open_device(source.uuid) as device:
            save(device, tmp_path / "out", options)
        data = bytearray((tmp_path / "out").read_bytes())
        data[60_000] ^= 1  # QEMU's records carry no checksum: only the device can notice
        (tmp_path / "out").write_bytes(data)
        with open_device(destination.uuid) as device:
            with pytest.raises(DeviceStateError, match="cannot enter RUNNING"):
                load(tmp_path / "out", device)
            assert device.state() is S.RUNNING


def test_the_command_says_the_protocol_and_cannot_send_it(tmp_path: Path) -> None:
    with MigTest.created("v1") as device:
        shown = run("info", "--open", "--json", device.uuid).records[-1]
        assert (shown["protocol"], shown["state"]) == ("v1", "RUNNING")
        assert run("save", device.uuid, str(tmp_path / "out")).code == 0
        assert run("verify", str(tmp_path / "out")).code == 0
        sent = run("send", device.uuid, f"unix:{tmp_path}/socket")
        assert sent.code == NotMigratableError.code
