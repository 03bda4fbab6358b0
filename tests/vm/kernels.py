"""The kernels of the lab, fetched and built into a cache folder, and the test device for each.

"debian" is Debian's own kernel (VFIO groups only) with mtty built as a module beside it. "cdev" is
built from Debian's source with cdev.config: iommufd, device cdevs, mtty. "debug" is cdev with what
finds the mistakes of a driver. The module in the folder driver/ is built for each of them.
Nothing outside the cache folder is written. A folder gets its final name only when complete.
"""

import fcntl
import hashlib
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
DRIVER = HERE.parents[1] / "driver"
SERIES = os.environ.get("VFIOMIG_VM_SERIES") or "6.12"
# What is merged into "make tinyconfig" for the kernels that are built here.
CONFIGS = {
    "cdev": (HERE / "cdev.config",),
    "debug": (HERE / "cdev.config", HERE / "debug.config"),
}
NAMES = ("debian", *CONFIGS)
# Settings of 6.12 that a later series, here 7.3, does not have any more.
GONE_LATER = {"CONFIG_PREEMPT_VOLUNTARY=y", "CONFIG_PROC_SYSCTL=y"}

# Loaded by the guest on Debian's kernel, each after what it depends on; the rest is built in.
DEBIAN_MODULES = ("9pnet_virtio", "9p", "overlay", "vfio_iommu_type1", "mdev", "mtty")


class LabError(Exception):
    """The lab itself failed, not the command that it was to run."""


@dataclass(frozen=True)
class Kernel:
    """image: what QEMU boots. modules: files to load in this order (.ko or .ko.xz).

    headers: the folder in which a module is built for it (make -C).
    """

    image: Path
    modules: tuple[Path, ...]
    headers: Path


def cache_folder() -> Path:
    """Return the folder for kernels and builds; it need not exist yet."""
    if named := os.environ.get("VFIOMIG_VM_CACHE"):
        return Path(named).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "vfiomig" / "vm"


def prepare(name: str, cache: Path) -> Kernel:
    """Return the named kernel, fetching or building what the cache lacks (minutes when cold)."""
    if kernel := _find(cache, name):
        return kernel
    with _locked(cache):
        # Somebody else may have made it while we waited.
        if (kernel := _find(cache, name)) is None:
            sys.stderr.write(f"lab: making the {name} kernel in {cache}\n")
            _make(cache, name)
            kernel = _find(cache, name)
    if kernel is None:
        raise LabError(f"{cache} lacks the {name} kernel that was just made")
    return kernel


def with_driver(kernel: Kernel, cache: Path, folder: Path = DRIVER) -> Kernel:
    """Return the kernel with the test device of folder as its last module, built if need be.

    Where there is no such folder, the kernel has no test device. Raises LabError with the end of
    what the compiler said; its warnings are errors.
    """
    sources = [file for file in sorted(folder.glob("*")) if file.is_file() and _is_source(file)]
    if not sources:
        return kernel
    key = hashlib.sha256(str(kernel.headers).encode())
    for file in sources:
        key.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    built = cache / f"driver-{key.hexdigest()[:12]}"
    if not built.exists():
        with _locked(cache):
            if not built.exists():
                _build_driver(sources, kernel.headers, built, cache)
    (module,) = built.glob("*.ko")
    return replace(kernel, modules=(*kernel.modules, module))


def _is_source(file: Path) -> bool:
    """Whether it is a source, and not what a build by hand left beside them."""
    return file.name in ("Makefile", "Kbuild") or (
        file.suffix in (".c", ".h") and not file.name.endswith(".mod.c")
    )


def _build_driver(sources: Sequence[Path], headers: Path, built: Path, cache: Path) -> None:
    with _building(cache) as tmp:
        folder = tmp / "driver"
        folder.mkdir()
        for file in sources:
            shutil.copy(file, folder)
        _make_modules(headers, folder, "W=1", "KCFLAGS=-Werror")
        # The objects are of no use, and a debugging kernel's are large.
        (tmp / "built").mkdir()
        for module in folder.glob("*.ko"):
            module.rename(tmp / "built" / module.name)
        (tmp / "built").rename(built)


def _make_modules(headers: Path, folder: Path, *settings: str) -> None:
    # BTF needs pahole and is of no use here.
    of_btf = "CONFIG_DEBUG_INFO_BTF_MODULES="
    _tool("make", "-C", headers, f"M={folder}", of_btf, *settings, "modules")


def _find(cache: Path, name: str) -> Kernel | None:
    return _find_debian(cache) if name == "debian" else _find_built(cache, name)


def _make(cache: Path, name: str) -> None:
    if name == "debian":
        _make_debian(cache)
    else:
        _make_built(cache, name)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find_debian(cache: Path) -> Kernel | None:
    if not (roots := sorted(cache.glob(f"debian-{SERIES}.*"), key=_version_key)):
        return None
    root = roots[-1]
    (image,) = root.glob("boot/vmlinuz-*")
    return Kernel(image, _load_order(root, DEBIAN_MODULES), _debian_headers(root))


def _make_debian(cache: Path) -> None:
    release = _newest_release()
    flavour = f"{release}-amd64"
    packages = [f"linux-{kind}-{flavour}" for kind in ("image", "headers")]
    packages += [f"linux-headers-{release}-common", f"linux-kbuild-{release}"]
    with _building(cache) as tmp:
        root = tmp / "root"
        for deb in _download(packages, tmp):
            _tool("dpkg-deb", "-x", deb, root)
        headers = _debian_headers(root)
        # The package names /usr/src here; all else in it is found by relative links.
        common = f"../linux-headers-{release}-common/Makefile"
        (headers / "Makefile").write_text(f"include {common}\n")
        _build_mtty(_source_archive(cache, tmp), headers, root / "mtty")
        root.rename(cache / f"debian-{flavour}")


def _debian_headers(root: Path) -> Path:
    (headers,) = root.glob("usr/src/linux-headers-*-amd64")
    return headers


def _build_mtty(source_archive: Path, headers: Path, folder: Path) -> None:
    member = f"linux-source-{SERIES}/samples/vfio-mdev/mtty.c"
    folder.mkdir()
    _tool("tar", "-xJf", source_archive, "-C", folder, "--strip-components=3", member)
    (folder / "Makefile").write_text("obj-m += mtty.o\n")
    _make_modules(headers, folder)


def _find_built(cache: Path, name: str) -> Kernel | None:
    folder = _built_folder(cache, name)
    if folder is None or not folder.exists():
        return None
    return Kernel(folder / "bzImage", (), folder / "build")


def _make_built(cache: Path, name: str) -> None:
    with _building(cache) as tmp:
        _tool("tar", "-xJf", _source_archive(cache, tmp), "-C", tmp)
        tree = tmp / f"linux-source-{SERIES}"
        _configure(tree, CONFIGS[name])
        _build(tree, tmp / "built")
        if folder := _built_folder(cache, name):
            (tmp / "built").rename(folder)


def _built_folder(cache: Path, name: str) -> Path | None:
    """Return where the kernel of this source and these configurations belongs."""
    if (source := _source_package(cache)) is None:
        return None
    key = hashlib.sha256(b"".join(file.read_bytes() for file in CONFIGS[name]))
    key.update(source.name.encode())
    return cache / f"{name}-{key.hexdigest()[:12]}"


def _configure(tree: Path, fragments: Sequence[Path]) -> None:
    _tool("make", "-s", "tinyconfig", cwd=tree)
    _tool("scripts/kconfig/merge_config.sh", "-m", ".config", *fragments, cwd=tree)
    _tool("make", "-s", "olddefconfig", cwd=tree)
    config = set((tree / ".config").read_text().splitlines())
    setting = re.compile(r"^(?:CONFIG_\w+=.*|# CONFIG_\w+ is not set)$", re.MULTILINE)
    wanted = {line for file in fragments for line in setting.findall(file.read_text())}
    if refused := sorted(wanted - config - GONE_LATER):
        raise LabError(f"the kernel's configuration did not take {', '.join(refused)}")


def _build(tree: Path, out: Path) -> None:
    jobs = f"-j{os.cpu_count() or 1}"
    # "modules" makes Module.symvers, though there are none.
    _tool("nice", "-n", "10", "make", "-s", jobs, "bzImage", "modules", cwd=tree)
    out.mkdir()
    shutil.copy(tree / "arch/x86/boot/bzImage", out / "bzImage")
    shutil.copy(tree / ".config", out / "config")
    # What a module needs to be built, as the packages of headers have it.
    install = f"sh scripts/package/install-extmod-build {shlex.quote(str(out / 'build'))}"
    _tool("make", "-s", "run-command", f"KBUILD_RUN_COMMAND={install}", cwd=tree)


def _source_package(cache: Path) -> Path | None:
    return max(cache.glob(f"linux-source-{SERIES}_*.deb"), key=_version_key, default=None)


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
