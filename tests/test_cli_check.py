"""vfiomig check: would the state of one device fit into another? Devices, streams, printed JSON."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Run, run
from devices import names_in
from faketree import FakeTree, opens_recorded
from vfiomig import sysfs

DATA = Path(__file__).parent / "data"
MLX5, XE = "sim:?profile=mlx5&size=70000", "sim:?profile=xe&size=70000"
VF = "0000:3b:00.2"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty directory with the same device as stream and as JSON."""
    monkeypatch.chdir(tmp_path)
    for name, url in (("mlx5", MLX5), ("xe", XE)):
        assert run("save", url, f"{name}.vmig").code == 0
        Path(f"{name}.json").write_text(run("info", url, "--json").out)
    return tmp_path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTree:
    """A host with one virtual function, which nothing can open."""
    (tmp_path / "host").mkdir()
    tree = FakeTree(tmp_path / "host")
    tree.pci(VF, "mlx5_vfio_pci", "3", vf=True)
    find = sysfs.find
    monkeypatch.setattr(
        sysfs, "find", lambda name: find(name, sys_root=tree.sys, modules_root=tree.modules)
    )
    return tree


def checked(*words: object) -> Run:
    found = run("check", *words, "--json")
    assert found.err == ""
    return found


SAME = [MLX5, "mlx5.vmig", "mlx5.json"]


@pytest.mark.parametrize("source", SAME)
@pytest.mark.parametrize("destination", SAME)
def test_a_device_its_stream_and_its_json_fit_each_other(source: str, destination: str) -> None:
    found = checked(source, destination)
    assert (found.code, found.last["fits"], found.last["fields"]) == (0, True, [])
    assert found.last["unchecked"] == ""
    assert " fits sim:" in run("check", source, destination).out


@pytest.mark.parametrize("source", SAME)
@pytest.mark.parametrize("destination", [XE, "xe.vmig", "xe.json"])
def test_what_differs_is_listed_source_first(source: str, destination: str) -> None:
    found = checked(source, destination)
    fields = found.last["fields"]
    names = ("STOP_COPY, P2P, PRE_COPY", "STOP_COPY, P2P")
    assert (found.code, found.last["fits"]) == (12, False)
    assert [tuple(field.values()) for field in fields] == [
        ("driver", "sim:mlx5", "sim:xe", False),
        ("capabilities", *names, False),
    ]
    assert checked(destination, source).last["fields"][0]["source"] == "sim:xe"
    for_people = run("check", source, destination)
    assert (for_people.code, for_people.err) == (12, "")
    assert "does not fit sim:" in for_people.out
    assert "  driver        sim:mlx5                  sim:xe\n" in for_people.out
    assert "--allow-mismatch driver,capabilities" in for_people.out


def test_what_may_differ_is_shown_and_fits() -> None:
    found = checked(MLX5, XE, "--allow-mismatch", "driver")
    assert (found.code, found.last["hint"][-12:]) == (12, "capabilities")
    assert [field["allowed"] for field in found.last["fields"]] == [True, False]
    found = checked(MLX5, XE, "--allow-mismatch", "driver,capabilities")
    assert (found.code, found.last["fits"], found.last["hint"]) == (0, True, "")
    assert "allowed" in run("check", MLX5, XE, "--allow-mismatch", "driver,capabilities").out


def test_the_names_say_which_file_it_was() -> None:
    found = checked("mlx5.vmig", "xe.json").last
    assert (found["source"], found["destination"]) == (f"{MLX5} (mlx5.vmig)", f"{XE} (xe.json)")


def test_a_file_called_as_a_simulated_device_is_no_stream(here: Path) -> None:
    os.rename("mlx5.vmig", "sim:b")
    assert checked("sim:b?profile=xe&size=70000", XE).code == 0
    assert {"b", "b.sim", "sim:b"} <= set(names_in(here))


# Devices of the host: looked at in sysfs, and not opened.


def test_a_device_of_the_host_is_not_opened(tree: FakeTree) -> None:
    tree.vfio_dev(tree.sys / "devices/pci0000:3a" / VF, "vfio0")
    golden = DATA / "native-v1-precopy.vmig"
    with opens_recorded() as opened:
        found = checked(golden, VF)
    assert not [path for path in opened if path.startswith("/dev/")]
    assert found.last["destination"] == VF
    assert "0000:3b:00.2: the capabilities are not known" in found.last["unchecked"]
    assert "driver" not in [field["field"] for field in found.last["fields"]]


def test_debugfs_tells_the_capabilities(tree: FakeTree) -> None:
    tree.debugfs(VF, "RUNNING", "stop-copy p2p")
    found = checked("mlx5.json", VF)
    assert (found.code, found.last["unchecked"]) == (12, "")
    fields = {field["field"]: field["destination"] for field in found.last["fields"]}
    assert fields["capabilities"] == "STOP_COPY, P2P"
    Path("vf.json").write_text(run("info", VF, "--json").out)
    assert checked("vf.json", VF).last["fits"] is True
    again = {
        field["field"]: field["destination"]
        for field in checked("mlx5.json", "vf.json").last["fields"]
    }
    assert again == fields


def test_as_far_as_they_tell_is_said(tree: FakeTree) -> None:
    found = run("check", VF, VF)
    assert found.code == 0
    assert found.out.startswith("0000:3b:00.2 fits 0000:3b:00.2, as far as they tell\n")
    assert "the capabilities are not known" in found.out


def test_open_asks_the_device_and_says_so(tree: FakeTree) -> None:
    found = run("check", VF, "mlx5.json", "--open")
    assert found.code in (4, 5)  # there is nothing to open
    assert "opening 0000:3b:00.2 by name" in found.err


def test_what_info_open_prints_is_taken_with_its_warning() -> None:
    warning = json.dumps({"schema": 1, "type": "warning", "text": "opening"})
    Path("two.json").write_text(f"{warning}\n{Path('mlx5.json').read_text()}")
    assert checked("two.json", "mlx5.json").code == 0
    Path("pretty.json").write_text(run("info", MLX5, "--pretty").out)
    assert checked("pretty.json", "mlx5.json").code == 0


# Bad input.

BAD: dict[str, tuple[object, int, str]] = {
    "an empty file": (b"", 7, "the stream is empty"),
    "noise": (b"noise", 8, "neither a vfiomig stream nor"),
    "a cut stream": (b"VFIOMIG", 8, ""),
    "no JSON": (b"{", 8, "is not what info prints"),
    "JSON of something else": (b"{}", 8, "name is missing"),
    "no driver": (b'{"name":"a"}', 8, "driver is missing"),
    "a driver that is a number": (b'{"name":"a","driver":1}', 8, "driver is missing"),
    "capabilities as text": (b'{"name":"a","driver":"b","capabilities":"P2P"}', 8, "no list"),
    "a name twice": (b'{"name":"a","name":"b","driver":"c"}', 8, "twice"),
    "nested": (b'{"a":' * 30 + b"1" + b"}" * 30, 8, "nested"),
    "endless JSON": (b"{" + b" " * 70000, 8, "too long"),
}


@pytest.mark.parametrize(("data", "code", "text"), BAD.values(), ids=BAD)
def test_a_file_that_is_neither_is_a_sentence(data: bytes, code: int, text: str) -> None:
    Path("bad").write_bytes(data)
    found = run("check", "bad", MLX5)
    assert found.code in (7, 8)
    assert text in found.err
    assert found.out == ""
    if text:
        assert (found.code, "bad" in found.err) == (code, True)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["sim:"], 2, "required: DESTINATION"),
        (["sim:", "sim:", "--allow-mismatch", "diver"], 2, "no such field: diver"),
        (["sim:", "sim:", "--allow-mismatch", ""], 2, "no such field"),
        (["sim:", "no-such-file"], 2, "no-such-file"),
        (["sim:", "."], 2, ""),
        (["sim:", "fd:999"], 5, "no descriptor 999"),
        (["sim:", DATA / "qemu-10.0-mtty-2.sections.bin"], 8, "do not say of what device"),
    ],
)
def test_bad_arguments_are_a_sentence(words: list[Any], code: int, text: str) -> None:
    found = run("check", *words)
    assert (found.code, found.out) == (code, "")
    assert text in found.err
    assert run("check", *words, "--json").last["code"] == code


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    Path("evil.json").write_text(json.dumps({"name": "\x1b[2J", "driver": "\x1b[31m"}))
    found = run("check", "evil.json", MLX5)
    assert found.code == 12
    assert "\x1b" not in found.out
