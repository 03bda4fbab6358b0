"""Memory is constant, whatever the size of the state: measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

# Beyond 2^31: the counters have to hold it as well.
SMALL, LARGE = 64 << 20, (2 << 30) + 4097
# Measured: 0.1 MiB between the two (Zen 4, Python 3.11, 23 Nov 2026).
ALLOWED_KIB = 4 << 10
PROGRAM = """
import resource, sys
import vfiomig
job, url, path, framing = sys.argv[1:]
with vfiomig.open_device(url) as device:
    if job == "save":
        kind = "native" if framing == "native" else vfiomig.QemuFraming()
        report = vfiomig.save(device, path, vfiomig.SaveOptions(framing=kind, force=True))
    elif job == "load":
        report = vfiomig.load(path, device)
    else:
        report = vfiomig.inspect(path)
        assert report.sound
print(report.device_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(job: str, url: str, path: Path, framing: str, size: int) -> int:
    """Return the largest resident set of a process that does this to a state of so many bytes."""
    words = [sys.executable, "-c", PROGRAM, job, url, str(path), framing]
    out = subprocess.run(words, capture_output=True, check=True, timeout=120).stdout
    device_bytes, kib = map(int, out.split())
    assert device_bytes == size
    return kib


@pytest.mark.parametrize("framing", ["native", "qemu"])
def test_a_state_of_gigabytes_takes_no_more_than_a_small_one(tmp_path: Path, framing: str) -> None:
    peaks: dict[str, list[int]] = {}
    for size in (SMALL, LARGE):
        url = f"sim:{tmp_path}/device{size}?size={size}&zeros=100"
        # QEMU's framing has no runs of zeros: nothing that would fill a disk is kept of it.
        path = tmp_path / "stream" if framing == "native" else Path("/dev/null")
        peaks.setdefault("save", []).append(peak_kib("save", url, path, framing, size))
        if framing == "native":
            for job in ("inspect", "load"):
                peaks.setdefault(job, []).append(peak_kib(job, url, path, framing, size))
    for job, (small, large) in peaks.items():
        assert large - small < ALLOWED_KIB, f"{job}: {small} KiB, then {large} KiB"
