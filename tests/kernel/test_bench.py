"""The bench on a real device: its data_fd can only be read, and nothing of it may be lost."""

from pathlib import Path

from kernel.command import installed
from kernel.mtty import SOURCE, Mtty


def test_a_real_device_is_measured_and_runs_as_before(source: Mtty, tmp_path: Path) -> None:
    sweep = ["--sink", "null,file,pipe", "--buffer", "64K", "--runs", "1", "--baselines", "dd"]
    done = installed("bench", source.uuid, *sweep, "--dir", str(tmp_path), "--json")
    assert done.code == 0, done.err
    (result,) = done.of_type("result")
    found = {(row["program"], row["sink"]) for row in result["cases"]}
    assert found == {
        (name, sink) for name in ("vfiomig", "dd") for sink in ("null", "file", "pipe")
    }
    said = " ".join(record["text"] for record in done.of_type("warning"))
    assert f"stops {source.uuid} for as long as the copy takes" in said
    assert source.is_untouched(SOURCE)
    assert list(tmp_path.iterdir()) == []
