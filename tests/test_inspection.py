"""Looking into streams: how far each is sound, what is wrong where, and how two differ."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

import stream_oracle as oracle
from vfiomig.errors import CancelledError, LocalIOError, StreamError, StreamMismatchError
from vfiomig.fd import OwnedFd
from vfiomig.incoming.checked import FrameInfo
from vfiomig.inspection import diff, inspect
from vfiomig.worker import Cancellation

Filled = Callable[[bytes], OwnedFd]
OpenFds = Callable[[], dict[int, str]]
DATA = Path(__file__).parent / "data"
NATIVE, QEMU = DATA / "native-v1-precopy.vmig", DATA / "qemu-10.0-mtty-2.sections.bin"
SMALL = DATA / "native-v1-config.vmig"
QEMU_STATE = bytes.fromhex(
    json.loads((DATA / "qemu-10.0-mtty-2.json").read_text())["device_state_hex"]
)


@pytest.fixture(autouse=True)
def nothing_stays(open_fds: OpenFds) -> Iterator[None]:
    fds, threads = open_fds(), threading.enumerate()
    yield
    assert open_fds() == fds
    assert threading.enumerate() == threads


def test_a_sound_native_file_is_described() -> None:
    found = inspect(NATIVE)
    assert (found.framing, found.sound, found.sound_bytes) == ("native", True, 32768)
    assert (found.device_bytes, found.pre_copy_bytes, found.zero_bytes) == (5096, 1000, 4096)
    assert (found.digest, found.frames, found.config) == ("117331e9403dbc84", 4, b"")
    assert (found.problem, found.problem_offset, found.code) == ("", None, 0)
    assert found.manifest is not None
    assert found.manifest.devices[0].identity.driver == "mlx5_vfio_pci"
    assert (found.name, found.section_id, found.idstr) == (str(NATIVE), None, None)
    assert json.loads(json.dumps(found.as_dict()))["config_bytes"] == 0


def test_sound_qemu_sections_are_described() -> None:
    found = inspect(str(QEMU))
    assert (found.framing, found.sound, found.sound_bytes) == ("qemu", True, 4402)
    assert (found.device_bytes, found.section_id, found.idstr) == (96, 38, "0000:00:05.0/vfio")
    assert found.digest == xxhash.xxh3_64_hexdigest(QEMU_STATE)
    assert (len(found.config), found.manifest, found.code) == (4116, None, 0)


def test_each_sound_frame_is_told_once() -> None:
    frames = list[FrameInfo]()
    inspect(NATIVE, on_frame=frames.append)
    assert [(f.kind, f.offset, f.length_bytes, f.detail) for f in frames] == [
        ("DATA", 12288, 1000, "PRE_COPY"),
        ("ZEROS", 20480, 4096, ""),
        ("TRAILER", 24576, 32, ""),
    ]


@pytest.mark.parametrize("more", [0, 1, 63, 100])
def test_long_frames_are_counted_once(filled: Filled, more: int) -> None:
    length, frames = (16 << 20) + more, list[FrameInfo]()
    with filled(oracle.write([oracle.data(b"x" * length, oracle.PRE_COPY)])) as file:
        found = inspect(file, on_frame=frames.append)
    assert (found.sound, found.pre_copy_bytes, len(frames)) == (True, length, 2)


def test_a_truncated_file_is_sound_up_to_its_last_whole_frame(filled: Filled) -> None:
    stream = SMALL.read_bytes()
    ends = [64 + 64 + oracle.read(stream).frames[0].length + 63 & ~63]  # type: ignore[operator]
    inspect(SMALL, on_frame=lambda f: ends.append(f.offset))
    ends = sorted({*ends[:1], *ends[2:], len(stream)})
    for size in range(1, len(stream), 7):
        with filled(stream[:size]) as file:
            found = inspect(file)
        assert (found.sound, found.code) == (False, 7)
        assert found.problem_offset is not None
        assert found.sound_bytes == max([end for end in ends if end <= size], default=0)
        assert found.sound_bytes <= found.problem_offset <= size
        assert f"at byte {found.problem_offset}" in found.problem


def test_a_flipped_bit_is_found_where_it_is(filled: Filled) -> None:
    stream = bytearray(NATIVE.read_bytes())
    stream[16384 + 500] ^= 4
    with filled(bytes(stream)) as file:
        found = inspect(file)
    assert (found.sound, found.code, found.sound_bytes) == (False, 7, 12288)
    assert found.problem_offset == 16384
    assert found.problem.startswith("the state in frame 1 is damaged, 1000 bytes of it")
    assert found.pre_copy_bytes == 0
    assert found.manifest is not None


@pytest.mark.parametrize(("at", "sound_bytes"), [(54, 52), (140, 133), (233, 153), (4401, 234)])
def test_damage_in_qemu_sections_is_found(filled: Filled, at: int, sound_bytes: int) -> None:
    stream = bytearray(QEMU.read_bytes())
    stream[at] ^= 1
    with filled(bytes(stream)) as file:
        found = inspect(file)
    assert (found.sound, found.code, found.framing) == (False, 7, "qemu")
    assert found.problem_offset is not None
    assert sound_bytes <= found.problem_offset
    assert found.sound_bytes <= found.problem_offset


def test_a_damaged_first_header_leaves_nothing_sound(filled: Filled) -> None:
    with filled(oracle.prologue(align=65)) as file:
        found = inspect(file)
    assert (found.sound, found.sound_bytes, found.framing, found.digest) == (False, 0, "", "")
    assert (found.problem_offset, found.code) == (12, 7)


def test_what_is_no_stream_is_an_error(filled: Filled, tmp_path: Path) -> None:
    with filled(b"GIF89a") as file, pytest.raises(StreamMismatchError):
        inspect(file)
    with pytest.raises(LocalIOError, match="No such file"):
        inspect(tmp_path / "missing")
    with pytest.raises(LocalIOError, match="Is a directory"):
        inspect(tmp_path)
    with OwnedFd(os.open("/dev/null", os.O_WRONLY)) as file, pytest.raises(LocalIOError):
        inspect(file)


def test_an_empty_file_is_damaged(filled: Filled) -> None:
    with filled(b"") as file:
        found = inspect(file)
    assert (found.problem, found.problem_offset) == ("the stream is empty (at byte 0)", 0)


def test_an_endless_stream_ends(filled: Filled) -> None:
    with filled(oracle.write([oracle.zeros(1000)])) as file:
        found = inspect(file, max_state_bytes=999)
    assert (found.sound, found.code) == (False, 7)
    with pytest.raises(StreamMismatchError):
        inspect("/dev/zero")


def test_an_inspection_can_be_cancelled() -> None:
    stop = Cancellation()
    with pytest.raises(CancelledError):
        inspect(NATIVE, on_frame=lambda _: stop.cancel(), cancellation=stop)
    with pytest.raises(CancelledError):
        inspect(NATIVE, cancellation=stop)
    stop.close()


def states(filled: Filled, *frames: oracle.Frame) -> OwnedFd:
    return filled(oracle.write(list(frames)))


def test_the_same_state_is_the_same_in_any_framing(filled: Filled) -> None:
    with states(filled, oracle.data(QEMU_STATE[:50]), oracle.data(QEMU_STATE[50:])) as file:
        found = diff(file, QEMU)
    assert found.same_state
    assert found.first_offset is None
    assert found.device_bytes == (96, 96)
    assert found.digests[0] == found.digests[1] == xxhash.xxh3_64_hexdigest(QEMU_STATE)
    fields = {name: (one, other) for name, one, other in found.fields}
    assert fields["framing"] == ("native", "qemu")
    assert fields["config_bytes"] == ("0", "4116")
    assert fields["idstr"] == ("", "0000:00:05.0/vfio")


def test_zeros_are_the_same_however_they_travel(filled: Filled) -> None:
    with (
        states(filled, oracle.zeros(300_000)) as one,
        states(filled, *[oracle.data(bytes(100_000))] * 3) as other,
    ):
        found = diff(one, other)
    assert (found.same_state, found.fields) == (True, ())


@pytest.mark.parametrize("at", [0, 1, 65535, 65536, 1_000_000, (3 << 20) - 1])
def test_the_first_different_byte_is_found(filled: Filled, at: int) -> None:
    state = bytearray(b"abc" * (1 << 20))
    with states(filled, oracle.data(bytes(state))) as one:
        state[at] ^= 1
        state[-1] ^= 2
        with states(filled, oracle.data(bytes(state))) as other:
            found = diff(one, other)
    assert (found.same_state, found.first_offset) == (False, at)
    assert found.digests[0] != found.digests[1]


@pytest.mark.parametrize(("one_length", "other_length"), [(10, 0), (0, 10), (65536, 65537), (9, 5)])
def test_states_of_different_length_differ_where_one_ends(
    filled: Filled, one_length: int, other_length: int
) -> None:
    frames = [[oracle.zeros(length)] if length else [] for length in (one_length, other_length)]
    with states(filled, *frames[0]) as one, states(filled, *frames[1]) as other:
        found = diff(one, other)
    assert found.device_bytes == (one_length, other_length)
    assert found.first_offset == min(one_length, other_length)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("damage", [0, 100, 3 << 20])
def test_a_damaged_file_is_not_compared(filled: Filled, damage: int, *, turned: bool) -> None:
    # 3 MiB: more than a pipe holds, so the other side's thread is in the middle of its work.
    stream = oracle.write([oracle.data(b"x" * (3 << 20))])
    broken = stream[:damage] + b"\xff" + stream[damage + 1 :]
    with filled(stream) as sound, filled(broken) as damaged:
        pair = (damaged, sound) if turned else (sound, damaged)
        with pytest.raises(StreamMismatchError if damage == 0 else StreamError):
            diff(*pair)


def test_a_file_that_is_not_there_is_not_compared(tmp_path: Path) -> None:
    for pair in ((NATIVE, tmp_path / "missing"), (tmp_path / "missing", NATIVE)):
        with pytest.raises(LocalIOError):
            diff(*pair)
    with OwnedFd(os.open("/dev/null", os.O_WRONLY)) as file, pytest.raises(LocalIOError):
        diff(NATIVE, file)
