"""Simulated devices: where they live, what they consist of, and as a Device."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from contract.driving import (
    begun,
    load,
    save,
    write_all,
)
from vfiomig.errors import (
    DeviceBusyError,
    DeviceLostError,
    DeviceStateError,
    LocalIOError,
    NoSuchDeviceError,
    NotMigratableError,
    UsageError,
)
from vfiomig.simulator.device import SimulatedOps, open_simulated, state_bytes
from vfiomig.uapi import DeviceState as S

Open = Callable[[str], SimulatedOps]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(SimulatedOps.open(url)))


def test_a_device_with_a_file_lives_on_when_closed(tmp_path: Path, opened: Open) -> None:
    url = f"sim:{tmp_path}/device"
    first = opened(f"{url}?size=200K&seed=7&profile=mlx5")
    first.set_device_state(S.STOP)
    digest = first.state_digest()
    first.close()
    again = opened(url)
    assert (again.get_device_state(), again.state_digest()) == (S.STOP, digest)
    assert again.identity.driver == "sim:mlx5"
    assert state_bytes(url) == again.read_state()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "device.sim"]


def test_a_loaded_device_has_the_file_of_the_saved_one(tmp_path: Path, opened: Open) -> None:
    source = opened(f"sim:{tmp_path}/a?size=300K&seed=3&zeros=40")
    destination = opened(f"sim:{tmp_path}/b")
    load(destination, save(source))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.sim", "b", "b.sim"]


def test_a_file_that_was_there_is_the_state(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "state").write_bytes(b"what I want to load" * 10)
    ops = opened(f"sim:{tmp_path}/state")
    assert save(ops) == b"what I want to load" * 10
    ops.reset_device()
    assert (tmp_path / "state").read_bytes() == bytes(190)


def test_a_parameter_that_contradicts_the_device_is_refused(tmp_path: Path, opened: Open) -> None:
    url = f"sim:{tmp_path}/device"
    opened(f"{url}?size=64K&seed=1").close()
    opened(f"{url}?size=65536&seed=1&bandwidth=1G&fault=get:EIO*1&reported_size=1").close()
    with pytest.raises(UsageError, match="its seed is 1, not 2"):
        SimulatedOps.open(f"{url}?seed=2")
    with pytest.raises(UsageError, match="its initial is not set, not 1K"):
        SimulatedOps.open(f"{url}?initial=1K")
    (tmp_path / "old").write_bytes(b"1234")
    with pytest.raises(UsageError, match="its size is 4, not 5"):
        SimulatedOps.open(f"sim:{tmp_path}/old?size=5")
    assert not (tmp_path / "old.sim").exists()


def test_a_device_in_use_is_busy(tmp_path: Path, opened: Open) -> None:
    url = f"sim:{tmp_path}/device?size=4K"
    ops = opened(url)
    ops.set_device_state(S.STOP)  # the sidecar is replaced, the lock stays
    with pytest.raises(DeviceBusyError, match="in use by another process"):
        SimulatedOps.open(url)
    ops.close()
    opened(url)


def test_the_lock_of_a_sidecar_that_was_replaced_meanwhile_is_not_enough(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sim:{tmp_path}/device?size=4K"
    opened(url).close()
    sidecar, flock = tmp_path / "device.sim", fcntl.flock

    def replace_once_then_lock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "other").write_bytes(sidecar.read_bytes())
        (tmp_path / "other").rename(sidecar)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", replace_once_then_lock)
    opened(url)
    with pytest.raises(DeviceBusyError):
        SimulatedOps.open(url)


def test_a_link_names_the_same_device(tmp_path: Path, opened: Open) -> None:
    ops = opened(f"sim:{tmp_path}/device?size=4K")
    (tmp_path / "link").symlink_to("device")
    with pytest.raises(DeviceBusyError):
        SimulatedOps.open(f"sim:{tmp_path}/link")
    ops.close()
    opened(f"sim:{tmp_path}/link").reset_device()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "device").read_bytes() == bytes(4096)


def test_of_many_openers_at_once_one_wins(tmp_path: Path) -> None:
    url = f"sim:{tmp_path}/device?size=4K"
    barrier = threading.Barrier(8)
    got: list[SimulatedOps] = []
    busy: list[DeviceBusyError] = []

    def open_it() -> None:
        barrier.wait()
        try:
            got.append(SimulatedOps.open(url))
        except DeviceBusyError as err:
            busy.append(err)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(busy)) == (1, 7)
    got[0].close()


def test_a_process_killed_in_resuming_leaves_the_device_there(tmp_path: Path, opened: Open) -> None:
    url = f"sim:{tmp_path}/device?size=4K"
    program = (
        "import os, sys\n"
        "from vfiomig.simulator.device import SimulatedOps\n"
        "from vfiomig.uapi import DeviceState\n"
        "channel = SimulatedOps.open(sys.argv[1]).set_device_state(DeviceState.RESUMING)\n"
        "os.write(channel.fileno(), b'half of it')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    for _ in range(2):
        opened(url).close()
        before = state_bytes(url)
        with subprocess.Popen(
            [sys.executable, "-c", program, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            child.kill()
        assert state_bytes(url) == before
        ops = opened(url)
        assert ops.get_device_state() is S.RESUMING
        ops.reset_device()
        assert state_bytes(url) == bytes(4096)
        ops.close()
        assert not (tmp_path / "device.resuming").exists()


def test_a_load_left_in_resuming_is_what_a_later_stop_commits(tmp_path: Path, opened: Open) -> None:
    # The trap of the real drivers: a stream cut anywhere is taken, so it must not be committed.
    url = f"sim:{tmp_path}/device?size=4K"
    ops = opened(url)
    write_all(begun(ops, S.RESUMING), b"half of it")
    ops.close()
    again = opened(url)
    again.set_device_state(S.STOP)
    assert state_bytes(url) == b"half of it"


def test_a_damaged_sidecar_is_told(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(b"x")
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "parameters": {}, "state": "X"}'):
        (tmp_path / "device.sim").write_text(text)
        with pytest.raises(LocalIOError, match="does not describe a simulated device"):
            SimulatedOps.open(f"sim:{tmp_path}/device")
    assert (tmp_path / "device").read_bytes() == b"x"


def test_what_cannot_be_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("directory", "fifo"):
        with pytest.raises(LocalIOError, match=f"{name}: not a regular file"):
            SimulatedOps.open(f"sim:{tmp_path}/{name}")
    with pytest.raises(NoSuchDeviceError):
        SimulatedOps.open(f"sim:{tmp_path}/none/device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "fifo"]


def test_names_are_percent_decoded_and_relative_to_here(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ops = opened("sim:a%20b%3f~+?size=4K")
    monkeypatch.chdir("/")
    ops.reset_device()
    assert (tmp_path / "a b?~+").stat().st_size == 4096
    assert ops.name == "sim:a b?~+"


def test_devices_in_memory_are_different_ones(opened: Open) -> None:
    one, other = opened("sim:?size=4K"), opened("sim:?size=4K")
    one.reset_device()
    assert one.state_digest() != other.state_digest()
    with pytest.raises(UsageError, match="in memory"):
        state_bytes("sim:")


@pytest.mark.parametrize(
    "url",
    [
        "mem:",
        "sim:?size",
        "sim:?siez=1M",
        "sim:?size=1M&size=1M",
        "sim:?size=-1",
        "sim:?seed=x",
        "sim:?zeros=101",
        "sim:?profile=mlx6",
        "sim:?profile=mtty&size=97",
        "sim:?profile=pds&size=1M",
        "sim:?profile=pds&capabilities=stop_copy,pre_copy",
        "sim:?capabilities=p2p",
        "sim:?capabilities=stop_copy,fly",
        "sim:?precopy_end=maybe",
        "sim:?accept=most",
        "sim:?bandwidth=0",
        "sim:?latency=5",
        "sim:?chunk=0",
        "sim:?reported_size=EWHAT",
        "sim:?reported_size=",
        "sim:%00",
    ],
)
def test_parameters_that_make_no_sense_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        SimulatedOps.open(url)


def test_the_seed_decides_the_contents(opened: Open) -> None:
    digests = [opened(f"sim:?size=3M&seed={seed}").state_digest() for seed in (1, 1, 2, -1)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("percent", [0, 1, 50, 95, 100])
def test_so_much_of_a_new_state_is_zero(percent: int, opened: Open) -> None:
    state = opened(f"sim:?size=6400K&zeros={percent}").read_state()
    runs = [state[at : at + 65536] for at in range(0, len(state), 65536)]
    assert sum(not any(run) for run in runs) == percent


def test_the_zeros_of_a_file_are_holes(tmp_path: Path, opened: Open) -> None:
    opened(f"sim:{tmp_path}/device?size=64M&zeros=99")
    assert (tmp_path / "device").stat().st_blocks * 512 < 2 << 20


def test_an_odd_size_is_exact(opened: Open) -> None:
    for size in (0, 1, 7, 8, 65537, (1 << 20) + 3):
        assert len(save(opened(f"sim:?size={size}"))) == size


def test_a_plain_save_can_be_spliced_and_has_no_thread(opened: Open) -> None:
    ops = opened("sim:?size=1M")
    threads = threading.active_count()
    channel = begun(ops, S.STOP_COPY)
    assert threading.active_count() == threads
    with open(os.memfd_create("copy"), "r+b") as copy:
        assert os.sendfile(copy.fileno(), channel.fileno(), None, 1 << 20) == 1 << 20
        assert os.pread(copy.fileno(), 1 << 20, 0) == ops.read_state()


def test_a_device_recovers_or_says_that_it_is_lost() -> None:
    with open_simulated("sim:?size=4K&fault=set:EIO@STOP_COPY:ERROR*1") as device:
        with pytest.raises(DeviceStateError) as caught:
            device.set_state(S.STOP_COPY)
        assert caught.value.actual is S.ERROR
        assert device.recover(S.RUNNING) is S.RUNNING
    url = "sim:?size=4K&fault=set:EIO@STOP_COPY:ERROR&fault=reset:EIO"
    with open_simulated(url) as device:
        with pytest.raises(DeviceStateError):
            device.set_state(S.STOP_COPY)
        with pytest.raises(DeviceLostError):
            device.recover(S.RUNNING)


def test_a_device_without_migration_is_refused() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotMigratableError):
        open_simulated("sim:?size=4K&fault=caps:ENOTTY")
    assert os.listdir("/proc/self/fd") == before
