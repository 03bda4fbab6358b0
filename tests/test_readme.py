"""The examples of the README run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_commands_and_the_library_example_run(tmp_path: Path) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "VFIOMIG_JOURNAL": str(tmp_path / "journal"),
    }
    lines = [line for block in blocks("console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert len(commands) >= 8
    for command in commands:
        run = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{command}\n{run.stderr}"
    (example,) = blocks("python")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, check=True)


def test_every_page_it_names_exists() -> None:
    # Links and file names in backquotes that look like paths of the project.
    named = re.findall(r"`((?:docs|tests|src)/[\w./-]+)`", README.read_text())
    assert named
    assert [name for name in named if not (README.parent / name).exists()] == []
