"""make demo: the main job on simulated devices, as a user would type it."""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VFIOMIG = Path(sys.executable).with_name("vfiomig")


def show(command: str, expected: int = 0) -> None:
    """Print a command, run it, and insist on its exit code."""
    sys.stdout.write(f"\n$ {command}\n")
    sys.stdout.flush()
    found = subprocess.run(command, shell=True, executable="/bin/bash", check=False).returncode
    if found != expected:
        raise SystemExit(f"expected exit code {expected}, got {found}")


def main() -> None:
    """Save, inspect, load, compare; then a damaged file, which must be refused."""
    os.environ["PATH"] = f"{VFIOMIG.parent}:{os.environ['PATH']}"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vfiomig-demo-") as place:
        os.chdir(place)
        source = shlex.quote("sim:source.state?size=512M&profile=mlx5&bandwidth=400M")
        dest = shlex.quote("sim:dest.state?size=512M&profile=mlx5")
        sys.stdout.write("Two simulated devices that behave like mlx5; the first reads 400 MB/s.\n")
        show(f"vfiomig info {source}")
        show(f"vfiomig save {source} state.vmig")
        show("vfiomig inspect state.vmig")
        show(f"vfiomig load state.vmig {dest}")
        show("sha256sum source.state dest.state; cmp source.state dest.state && echo identical")
        sys.stdout.write("\nA byte of the stream is changed: it must not get into a device.\n")
        show(r"printf '\xff' | dd of=state.vmig bs=1 seek=200000000 conv=notrunc status=none")
        show(f"vfiomig load state.vmig {dest}", expected=7)
        show(f"vfiomig state {dest}")
    took = time.monotonic() - started
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    sys.stdout.write(f"\ndone in {took:.1f} s; peak memory of a command {peak_mib:.0f} MiB\n")


main()
