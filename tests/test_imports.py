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
    {"_fastcopy", "uapi", "_version", "bitmap"},
    {"errors", "states", "fd", "identity", "framing", "threads", "dirty_report"},
    {"quantities", "ioctl", "report", "worker", "sysfs", "switchover"}
    | {"framing.native", "framing.qemu", "framing.strict_json"},
    {"channel", "transport", "recorder", "doctor", "framing.manifest"},
    {"device", "outgoing", "options", "incoming.checked", "fit", "rates"},
    {"region"},
    {"incoming.native_frames", "incoming.qemu_sections", "copyloop"},
    {"incoming"},
    {"save", "load", "inspection", "lending", "dirty"},
    {"backends.kernel_region"},
    {"backends.kernel"},
    # A session between two hosts: what is said, what carries it, one device, both ends.
    {"live"},
    {"live.address", "live.wire", "live.handover", "live.relay"},
    {"live.tls"},
    {"live.messages", "live.connection", "live.verdict", "live.options"},
    {"live.link", "live.listener", "live.record"},
    {"live.session", "live.journal"},
    {"live.arrivals", "live.dialing", "live.mover", "live.taker", "live.order"},
    {"live.forecast", "live.party"},
    {"live.rounds"},
    {"live.source", "live.destination"},
    # The simulator, which is a house of its own: what a name says, files, sessions, the device.
    {"simulator"},
    {"simulator.faults", "simulator.profiles", "simulator.updates", "simulator.file"},
    {"simulator.url", "simulator.session"},
    {"simulator.content", "simulator.dma_log"},
    {"simulator.storage"},
    {"simulator.commit", "simulator.home", "simulator.feeder"},
    {"simulator.drain", "simulator.precopy", "simulator.region"},
    {"simulator.device"},
    {"backends"},
    # The conformance check: what is seen, the device under test, a rule, groups of them, the run.
    {"conform.result", "conform.raw", "conform.streams", "conform.owner"},
    {"conform.findings"},
    {"conform.subject"},
    {"conform.rule"},
    {"conform.dma_logging"},
    {"conform.features", "conform.paths", "conform.saving", "conform.precopy"}
    | {"conform.descriptors", "conform.dma_reports", "conform.refusals", "conform.loading"}
    | {"conform.resets", "conform.owners"},
    {"conform.catalog", "conform.junit"},
    {"conform.run"},
    {"conform"},
    {"live.remains"},
    {"live.resolve"},
    {"vfiomig"},
    {"aio"},
    # The bench: what is measured; one transfer; both sides' processes; all rounds; what of it.
    {"bench"},
    {"bench.cases", "bench.measure", "bench.post", "bench.scratch", "bench.sinks", "bench.machine"},
    {"bench.messages", "bench.baselines", "bench.tool", "bench.worker"},
    {"bench.check", "bench.plan"},
    {"bench.crew", "bench.sender", "bench.receiver"},
    {"bench.runner"},
    {"bench.summary"},
    {"bench.notes", "bench.table", "bench.export"},
    {"bench.plot"},
    {"cli.output", "cli.host_values"},
    {"cli.arguments", "cli.transfer_text", "cli.watch", "cli.live_text", "cli.dirty_text"},
    {"cli.live_arguments", "cli.far_end"},
    {f"cli.{path.stem}" for path in (ROOT / "cli").glob("*_command.py")},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SOURCES = sorted(ROOT.rglob("*.py"))
# Slow to import, or not the library's business: each is imported where it is used, or never.
HEAVY = {"rich", "argparse", "ssl", "asyncio", "logging", "ctypes", "socket", "subprocess", "shlex"}
# A millisecond of start-up or more, each with what it brings along: fine where it is used, and not
# before (docs/architecture.md, "Start-up").
SLOW = {"dataclasses", "inspect", "json", "pathlib", "urllib.parse", "ipaddress", "datetime"} | {
    "decimal",
    "hashlib",
    "difflib",
    "shutil",
    "zlib",
    "importlib.metadata",
}


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


def test_mypy_sees_every_name_where_the_package_finds_it() -> None:
    seen = {
        alias.name: (node.module or "").removeprefix("vfiomig.")
        for block in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == vfiomig._ROOMS
    assert set(seen) < set(vfiomig.__all__)


def test_every_public_name_is_there_and_listed() -> None:
    everything: dict[str, object] = {}
    exec("from vfiomig import *", everything)
    assert set(vfiomig.__all__) == set(everything) - {"__builtins__"}
    assert set(vfiomig.__all__) <= set(dir(vfiomig))
    with pytest.raises(AttributeError, match="module 'vfiomig' has no attribute 'saev'"):
        getattr(vfiomig, "saev")  # noqa: B009  mypy knows that it is not there


@pytest.mark.parametrize("name", ["save", "load"])
@pytest.mark.parametrize(
    "first", ["pass", "import vfiomig.{0}", "from vfiomig.{0} import *", "import vfiomig.{0} as m"]
)
def test_save_and_load_are_functions_whatever_was_imported_first(first: str, name: str) -> None:
    program = f"{first.format(name)}; import vfiomig; print(type(vfiomig.{name}).__name__)"
    assert printed_by(program) == "function\n"


def printed_by(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    ).stdout


def modules_after(statement: str) -> set[str]:
    return set(printed_by(f"import sys; {statement}; print(*sys.modules)").split())


def test_the_library_imports_nothing_heavy() -> None:
    before = modules_after("pass")
    # A live migration is between sockets; whoever does not ask for one needs none.
    names = [name for name in vfiomig.__all__ if vfiomig._ROOMS.get(name, "")[:5] != "live."]
    everything_else = f"from vfiomig import {', '.join(names)}"
    for statement in (everything_else, "import vfiomig.simulator.device"):
        assert (modules_after(statement) - before) & HEAVY == set()


def test_the_library_does_not_import_the_simulator_nor_the_command() -> None:
    found = modules_after("from vfiomig import *")
    assert "vfiomig.save" in found
    assert not [name for name in found if name.startswith(("vfiomig.cli", "vfiomig.simulator"))]


def test_the_package_alone_imports_only_what_every_program_needs() -> None:
    found = modules_after("import vfiomig") - modules_after("pass")
    ours = {name for name in found if within(name)}
    assert ours == {"vfiomig", "vfiomig._version", "vfiomig.errors", "vfiomig.uapi"}
    assert found & (HEAVY | SLOW) == set()


def test_info_of_a_simulated_device_imports_only_what_it_uses() -> None:
    run = "cli.main(['info', 'sim:', '--json'])"
    found = modules_after(f"import vfiomig.cli as cli; {run}") - modules_after("pass")
    assert "vfiomig.simulator.device" in found
    # A device's identity is a dataclass, and JSON was asked for.
    assert found & (HEAVY | SLOW) == {"argparse", "dataclasses", "inspect", "json"}
    unused = {"save", "load", "inspection", "options", "report", "sysfs", "lending", "_fastcopy"}
    assert found & {f"vfiomig.{room}" for room in unused} == set()


def test_no_state_change_waits_for_an_import() -> None:
    program = """
import sys, vfiomig
told = []
with vfiomig.open_device("sim:?size=1000") as device, device.observed(told.append):
    before = set(sys.modules)
    device.set_state(vfiomig.DeviceState.STOP)
    assert told
    print(*set(sys.modules) - before)
"""
    assert printed_by(program) == "\n"


def test_the_command_imports_rich_only_for_a_terminal() -> None:
    run = "cli.main(['save', 'sim:?size=1000', '/dev/null', '-q'])"
    found = modules_after(f"import vfiomig.cli as cli; {run}")
    assert "vfiomig.cli.watch" in found
    assert "rich" not in found
