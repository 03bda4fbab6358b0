"""Rooms only look down. This test is the picture of the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vfiomig

ROOT = Path(vfiomig.__file__).parent
# docs/architecture.md has the same levels with words. "vfiomig" is the package itself.
LEVELS = [
    {"_fastcopy", "uapi", "_version"},
    {"errors", "states", "fd", "identity", "framing"},
    {"quantities", "ioctl", "report", "worker", "sysfs"}
    | {"framing.manifest", "framing.native", "framing.qemu"},
    {"channel", "transport", "recorder", "doctor"},
    {"device", "outgoing", "options", "incoming.checked"},
    {"incoming.native_frames", "incoming.qemu_sections"},
    {"incoming"},
    {"save", "load", "inspection", "lending", "backends.kernel"},
    # The simulator, which is a house of its own: what a name says, files, sessions, the device.
    {"simulator"},
    {"simulator.faults", "simulator.profiles", "simulator.updates", "simulator.file"},
    {"simulator.url", "simulator.session"},
    {"simulator.content"},
    {"simulator.storage"},
    {"simulator.commit", "simulator.home", "simulator.feeder"},
    {"simulator.drain", "simulator.precopy"},
    {"simulator.device"},
    {"backends"},
    {"vfiomig"},
    {"cli.output", "cli.host_values"},
    {"cli.arguments", "cli.transfer_text", "cli.watch"},
    {f"cli.{path.stem}" for path in (ROOT / "cli").glob("*_command.py")},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SOURCES = sorted(ROOT.rglob("*.py"))
# Slow to import, or not the library's business: each is imported where it is used, or never.
HEAVY = {"rich", "argparse", "ssl", "asyncio", "logging", "ctypes", "socket", "subprocess", "shlex"}


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".") or "vfiomig"


def is_room(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".pyi").exists() or path.with_suffix(".py").exists() or path.is_dir()


def imported_rooms(file: Path) -> set[str]:
    """Return the rooms that a file imports anywhere in it, functions included."""
    rooms = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            rooms |= {name.removeprefix("vfiomig.") for name in names if within(name)}
        elif isinstance(node, ast.ImportFrom) and within(node.module or ""):
            package = (node.module or "").removeprefix("vfiomig").removeprefix(".")
            for alias in node.names:
                inner = f"{package}.{alias.name}".removeprefix(".")
                rooms.add(inner if is_room(inner) else package or "vfiomig")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a room stands"
    return rooms


def within(module: str) -> bool:
    return module == "vfiomig" or module.startswith("vfiomig.")


@pytest.mark.parametrize("file", SOURCES, ids=room_of)
def test_a_room_imports_only_lower_rooms(file: Path) -> None:
    assert room_of(file) in LEVEL, "a new room needs its place in LEVELS"
    own = LEVEL[room_of(file)]
    assert [room for room in sorted(imported_rooms(file)) if LEVEL[room] >= own] == []


def test_every_room_of_the_list_is_there_once() -> None:
    assert sum(map(len, LEVELS)) == len(LEVEL)
    assert set(LEVEL) == {room_of(file) for file in SOURCES} | {"_fastcopy"}


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    return set(out.decode().split())


def test_the_library_imports_nothing_heavy() -> None:
    before = modules_after("pass")
    for statement in ("import vfiomig", "import vfiomig.simulator.device"):
        assert (modules_after(statement) - before) & HEAVY == set()


def test_the_library_does_not_import_the_simulator_nor_the_command() -> None:
    found = modules_after("import vfiomig")
    assert not [name for name in found if name.startswith(("vfiomig.cli", "vfiomig.backends.sim"))]


def test_the_command_imports_rich_only_for_a_terminal() -> None:
    run = "cli.main(['save', 'sim:?size=1000', '/dev/null', '-q'])"
    found = modules_after(f"import vfiomig.cli as cli; {run}")
    assert "vfiomig.cli.watch" in found
    assert "rich" not in found
