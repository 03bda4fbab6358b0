"""The two kernels of the lab, fetched and built into a cache folder.

"debian" is Debian's own 6.12 kernel (VFIO groups only) with mtty built as a module beside it.
"cdev" is built from Debian's 6.12 source with cdev.config: iommufd, device cdevs, mtty.
Nothing outside the cache folder is written. A folder gets its final name only when complete.
"""

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CDEV_CONFIG = HERE / "cdev.config"
SERIES = "6.12"
NAMES = ("debian", "cdev")

# Loaded by the guest on Debian's kernel, each after what it depends on; the rest is built in.
DEBIAN_MODULES = ("9pnet_virtio", "9p", "overlay", "vfio_iommu_type1", "mdev", "mtty")


class LabError(Exception):
    """The lab itself failed, not the command that it was to run."""


@dataclass(frozen=True)
class Kernel:
    """image: what QEMU boots. modules: files to load in this order (.ko or .ko.xz)."""

    image: Path
    modules: tuple[Path, ...]


def cache_folder() -> Path:
    """Return the folder for kernels and builds; it need not exist yet."""
    if named := os.environ.get("VFIOMIG_VM_CACHE"):
        return Path(named).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "vfiomig" / "vm"


def prepare(name: str, cache: Path) -> Kernel:
    """Return the named kernel, fetching or building what the cache lacks (minutes when cold)."""
    find, make = (_find_debian, _make_debian) if name == "debian" else (_find_cdev, _make_cdev)
    if kernel := find(cache):
        return kernel
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Somebody else may have made it while we waited.
        if (kernel := find(cache)) is None:
            sys.stderr.write(f"lab: making the {name} kernel in {cache}\n")
            make(cache)
            kernel = find(cache)
    if kernel is None:
        raise LabError(f"{cache} lacks the {name} kernel that was just made")
    return kernel


def _find_debian(cache: Path) -> Kernel | None:
    if not (roots := sorted(cache.glob("debian-*"), key=_version_key)):
        return None
    (image,) = roots[-1].glob("boot/vmlinuz-*")
    return Kernel(image, _load_order(roots[-1], DEBIAN_MODULES))


def _make_debian(cache: Path) -> None:
    release = _newest_release()
    flavour = f"{release}-amd64"
    packages = [f"linux-{kind}-{flavour}" for kind in ("image", "headers")]
    packages += [f"linux-headers-{release}-common", f"linux-kbuild-{release}"]
    with _building(cache) as tmp:
        root = tmp / "root"
        for deb in _download(packages, tmp):
            _tool("dpkg-deb", "-x", deb, root)
        headers = root / "usr/src" / f"linux-headers-{flavour}"
        # The package names /usr/src here; all else in it is found by relative links.
        common = f"../linux-headers-{release}-common/Makefile"
        (headers / "Makefile").write_text(f"include {common}\n")
        _build_mtty(_source_archive(cache, tmp), headers, root / "mtty")
        root.rename(cache / f"debian-{flavour}")


def _build_mtty(source_archive: Path, headers: Path, folder: Path) -> None:
    member = f"linux-source-{SERIES}/samples/vfio-mdev/mtty.c"
    folder.mkdir()
    _tool("tar", "-xJf", source_archive, "-C", folder, "--strip-components=3", member)
    (folder / "Makefile").write_text("obj-m += mtty.o\n")
    # BTF needs pahole and is of no use here.
    _tool("make", "-C", headers, f"M={folder}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules")


def _find_cdev(cache: Path) -> Kernel | None:
    folder = _cdev_folder(cache)
    return Kernel(folder / "bzImage", ()) if folder and folder.exists() else None


def _make_cdev(cache: Path) -> None:
    with _building(cache) as tmp:
        _tool("tar", "-xJf", _source_archive(cache, tmp), "-C", tmp)
        _build_cdev(tmp / f"linux-source-{SERIES}", tmp / "built")
        if folder := _cdev_folder(cache):
            (tmp / "built").rename(folder)


def _cdev_folder(cache: Path) -> Path | None:
    """Return where the kernel of this source and this cdev.config belongs."""
    if (source := _source_package(cache)) is None:
        return None
    key = hashlib.sha256(CDEV_CONFIG.read_bytes() + source.name.encode()).hexdigest()
    return cache / f"cdev-{key[:12]}"


def _build_cdev(tree: Path, out: Path) -> None:
    _tool("make", "-s", "tinyconfig", cwd=tree)
    _tool("scripts/kconfig/merge_config.sh", "-m", ".config", CDEV_CONFIG, cwd=tree)
    _tool("make", "-s", "olddefconfig", cwd=tree)
    config = set((tree / ".config").read_text().splitlines())
    wanted = [line for line in CDEV_CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    if refused := [line for line in wanted if line not in config]:
        raise LabError(f"the kernel's configuration did not take {', '.join(refused)}")
    _tool("nice", "-n", "10", "make", "-s", f"-j{os.cpu_count() or 1}", "bzImage", cwd=tree)
    out.mkdir()
    shutil.copy(tree / "arch/x86/boot/bzImage", out / "bzImage")
    shutil.copy(tree / ".config", out / "config")


def _source_package(cache: Path) -> Path | None:
    return max(cache.glob("linux-source-*.deb"), key=_version_key, default=None)


def _source_archive(cache: Path, tmp: Path) -> Path:
    """Return the kernel source, a .tar.xz in tmp. Its package stays in the cache."""
    if (package := _source_package(cache)) is None:
        (downloaded,) = _download([f"linux-source-{SERIES}"], tmp)
        package = downloaded.rename(cache / downloaded.name)
    _tool("dpkg-deb", "-x", package, tmp / "source")
    return tmp / "source/usr/src" / f"linux-source-{SERIES}.tar.xz"


def _download(packages: list[str], tmp: Path) -> list[Path]:
    folder = Path(tempfile.mkdtemp(dir=tmp))
    _tool("apt-get", "download", *packages, cwd=folder)
    return sorted(folder.glob("*.deb"))


def _newest_release() -> str:
    """Return the newest release, such as 6.12.117+deb12, of which apt has every package."""
    pattern = rf"^linux-(image|headers|kbuild)-{re.escape(SERIES)}\."
    found = {line.split()[0] for line in _tool("apt-cache", "search", "-n", pattern).splitlines()}
    releases = {
        match[1]
        for package in found
        if (match := re.fullmatch(r"linux-headers-([\d.]+\+deb\d+)-amd64", package))
        and {f"linux-image-{match[1]}-amd64", f"linux-kbuild-{match[1]}"} <= found
    }
    if not releases:
        raise LabError(f"apt offers no kernel of the {SERIES} series; is its list up to date?")
    return max(releases, key=_version_key)


def _version_key(name: str | Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", Path(name).name)]


def read_module(file: Path) -> bytes:
    """Return a module's ELF image, unpacked if need be."""
    data = file.read_bytes()
    return lzma.decompress(data) if file.suffix == ".xz" else data


def _load_order(root: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the files of the named modules, each after those that it depends on."""
    files = {file.name.split(".")[0].replace("-", "_"): file for file in root.rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        if (file := files[name]) in order:
            return
        # .modinfo: "depends=a,b", one NUL-terminated string, "-" already turned into "_".
        depends = re.search(rb"\0depends=([^\0]*)\0", read_module(file))
        for needed in depends[1].decode().split(",") if depends and depends[1] else ():
            add(needed)
        order.append(file)

    for name in names:
        add(name)
    return tuple(order)


@contextmanager
def _building(cache: Path) -> Iterator[Path]:
    """Give a fresh folder inside the cache. What an interrupted run left behind goes first."""
    for stale in cache.glob("tmp-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache) as tmp:
        yield Path(tmp)


def _tool(*argv: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return its output. Raises LabError with its last lines."""
    words = [str(word) for word in argv]
    env = os.environ | {"LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            words, cwd=cwd, env=env, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as err:
        raise LabError(f"cannot run {words[0]}: {err.strerror} (see packages.txt)") from err
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise LabError(f"{' '.join(words)} failed with status {done.returncode}:\n{tail}")
    return done.stdout
