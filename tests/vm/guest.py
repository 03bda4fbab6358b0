"""One guest: its initramfs, its QEMU, and what comes out of it.

The guest sees this machine's file system over 9p and reports through files in the run's folder:
stdout, stderr and status ("started", then "exit N") are virtio ports, console.log is the serial
console.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vm.kernels import HERE, Kernel, LabError, read_module

# The guest mounts a tmpfs there: what the host has below them must be shared by name.
HIDDEN = (Path("/tmp"), Path("/var/tmp"), Path("/run"), Path("/dev"))
# How a kernel's report of a bug of its own begins. KASAN's begin with "BUG: ", most of lockdep's
# with "WARNING: ", and some with "[ BUG: ".
REPORT = re.compile(
    r"(?:-+\[ cut here|\[ BUG: |BUG[: ]|Oops: |WARNING: |Kernel panic|UBSAN: |"
    r"general protection fault|watchdog: BUG|INFO: task .* blocked|rcu: INFO: .* detected|"
    r"INFO: trying to register non-static key|sysfs: cannot create duplicate|"
    r"kobject: .* tried to init an initialized object|Unable to handle kernel).*"
)
# On the console it stands behind printk's time stamp (and caller, if configured).
OOPS = re.compile(
    rf"^\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? {REPORT.pattern}",
    re.MULTILINE,
)
POLL_S = 0.1
OOPS_GRACE_S = 30  # The command may still end by itself, and its output is worth having.
POWER_OFF_S = 30

# The kernel's panic ends QEMU (-no-reboot). No layout tricks and no mitigations: TCG is slow.
# Stall detectors off: on a busy machine a TCG guest stalls for seconds without any bug.
BOOT_OPTIONS = (
    "console=ttyS0 panic=-1 nokaslr mitigations=off tsc=reliable random.trust_cpu=on "
    "rcupdate.rcu_cpu_stall_suppress=1 nowatchdog pci=noacpi"
)


class LabTimeout(LabError):
    """The boot or the command took longer than it was given."""


@dataclass(frozen=True)
class Guest:
    """What to run and where. mtty: pairs of UUID and type. Folders are absolute host paths."""

    kernel: Kernel
    command: list[str]
    cwd: Path
    environment: dict[str, str]
    mtty: list[tuple[str, str]]
    read_only: list[Path]
    writable: list[Path]
    memory: str
    cpus: int
    timeout_s: float
    fatal_oops: bool


def run(guest: Guest, folder: Path) -> int:
    """Boot, run the command, copy its output to ours; return its exit status.

    Leaves the logs in folder. Raises LabError when the guest does not boot, reports a kernel bug
    or takes too long.
    """
    for name in ("stdout", "stderr", "status", "console.log"):
        (folder / name).write_bytes(b"")
    (folder / "initrd").write_bytes(_initramfs(guest))
    # setpriv: QEMU dies with us, however we die.
    argv = ["setpriv", "--pdeathsig", "KILL", *_qemu(guest, folder)]
    with (
        (folder / "qemu.log").open("wb") as log,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as qemu,
    ):
        try:
            return _watch(guest, qemu, folder)
        finally:
            qemu.kill()
            (folder / "initrd").unlink()


def _watch(guest: Guest, qemu: "subprocess.Popen[bytes]", folder: Path) -> int:
    deadline = time.monotonic() + guest.timeout_s
    oops = status = None
    with (folder / "stdout").open("rb") as out, (folder / "stderr").open("rb") as err:
        while True:
            ended = qemu.poll() is not None  # Asked first: nothing is written after it.
            _copy(out, sys.stdout.buffer)
            _copy(err, sys.stderr.buffer)
            if oops is None and (oops := _oops(guest, folder)):
                deadline = min(deadline, time.monotonic() + OOPS_GRACE_S)
            if status is None and (status := _status(folder)) is not None:
                deadline = min(deadline, time.monotonic() + POWER_OFF_S)
            if ended or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    if oops:
        raise LabError(f"the kernel reported a bug: {oops}")
    if status is not None:
        return status
    what = "the command" if (folder / "status").stat().st_size else "the boot"
    if not ended:
        raise LabTimeout(f"{what} did not end within {guest.timeout_s / 60:g} minutes")
    # init.sh says on the console why it gave up; QEMU, in its own log.
    reasons = re.findall(r"^lab: (.*)", (folder / "console.log").read_text(errors="replace"), re.M)
    reasons += (folder / "qemu.log").read_text(errors="replace").splitlines()
    raise LabError("; ".join([f"the guest stopped during {what}", *map(str.strip, reasons)]))


def _oops(guest: Guest, folder: Path) -> str | None:
    if not guest.fatal_oops:
        return None
    match = OOPS.search((folder / "console.log").read_text(errors="replace"))
    return match[0] if match else None


def _status(folder: Path) -> int | None:
    match = re.search(r"^exit (\d+)$", (folder / "status").read_text(), re.MULTILINE)
    return int(match[1]) if match else None


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target)
    target.flush()


def _shares(guest: Guest) -> list[tuple[Path, str]]:
    """Return what to mount over the read-only root: folders and mount options, parents first."""
    # Writable shares are not cached: the host sees every write at once.
    shares = dict.fromkeys(guest.read_only, "ro,cache=loose")
    if any(guest.cwd.is_relative_to(hidden) for hidden in HIDDEN):
        shares[guest.cwd] = "ro,cache=loose"
    shares |= dict.fromkeys(guest.writable, "rw,cache=none")
    return sorted(shares.items())


def _settings(guest: Guest) -> str:
    """Return the variables and functions that init.sh expects."""
    devices = " ".join(f"{uuid}:{kind}" for uuid, kind in guest.mtty)
    shares = [
        shlex.join(["share", f"share{number}", options, str(path)])
        for number, (path, options) in enumerate(_shares(guest))
    ]
    environment = [f"{name}={value}" for name, value in guest.environment.items()]
    command = ["/usr/bin/env", "-i", "-C", str(guest.cwd), *environment, *guest.command]
    return "\n".join(
        [
            f"MTTY={shlex.quote(devices)}",
            *("shares() {", ":", *shares, "}"),
            *("command_line() {", shlex.join(["exec", *command]), "}", ""),
        ]
    )


def _qemu(guest: Guest, folder: Path) -> list[str]:
    argv = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "pc", "-cpu", "max"]
    argv += ["-m", guest.memory, "-smp", str(guest.cpus)]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-kernel", str(guest.kernel.image), "-initrd", str(folder / "initrd")]
    argv += ["-append", BOOT_OPTIONS, "-serial", f"file:{_escaped(folder / 'console.log')}"]
    argv += ["-device", "virtio-serial-pci"]
    for number, name in enumerate(("stdout", "stderr", "status"), start=1):
        argv += ["-chardev", f"file,id={name},path={_escaped(folder / name)}"]
        argv += ["-device", f"virtserialport,chardev={name},nr={number}"]
    shared = [("root", Path("/"), True)]
    for number, (path, options) in enumerate(_shares(guest)):
        shared.append((f"share{number}", path, options.startswith("ro")))
    for tag, path, read_only in shared:
        fsdev = f"local,id={tag},path={_escaped(path)},security_model=none,multidevs=remap"
        argv += ["-fsdev", f"{fsdev},readonly={'on' if read_only else 'off'}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return argv


def _escaped(path: Path) -> str:
    """Return the path as QEMU's option parser wants it: commas doubled."""
    return str(path).replace(",", ",,")


def _initramfs(guest: Guest) -> bytes:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("cannot find busybox (see packages.txt)")
    archive = b"".join(_cpio_entry(name, b"", 0o040755) for name in ("bin", "modules", "lab"))
    archive += _cpio_entry("bin/busybox", Path(busybox).read_bytes(), 0o100755)
    archive += _cpio_entry("init", (HERE / "init.sh").read_bytes(), 0o100755)
    archive += _cpio_entry("lab/settings", _settings(guest).encode(), 0o100644)
    for number, module in enumerate(guest.kernel.modules):
        name = f"modules/{number:02}-{module.name.removesuffix('.xz')}"
        archive += _cpio_entry(name, read_module(module), 0o100644)
    return archive + _cpio_entry("TRAILER!!!", b"", 0)


def _cpio_entry(name: str, data: bytes, mode: int) -> bytes:
    """Return one entry of a cpio archive: Documentation/driver-api/early-userspace, "newc"."""
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), name's size, checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
