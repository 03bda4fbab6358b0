"""How a simulated device is named: sim:[FILE][?key=value&key=value...], %-encoded where needed.

Without FILE it lives in this process's memory. With FILE its state is that file's bytes, and
FILE.sim beside it keeps the parameters and the device state. Parameters of the device, kept there:

    profile=NAME        generic (default), mlx5, virtio, hisi, qat, pds, xe, mtty (mtty-2), mtty-1
    size=SIZE           bytes of its state; after a reset it has so many zeros
    seed=NUMBER         what a new state is filled with (default 0)
    zeros=PERCENT       how much of a new state is zero, in runs of 64 KiB, as holes (default 0)
    capabilities=NAMES  stop_copy,p2p,pre_copy: not more than the profile has
    initial=SIZE        how much of a pre-copy counts as initial data (default: the whole state)
    dirty=RATE          how fast the device changes its own state in PRE_COPY (default 0)
    precopy_end=enomsg|zero           what read() says when pre-copy has nothing now
    accept=any|fits|exact|complete    what RESUMING -> STOP takes; see profiles.Accept
    protocol=v2|v1      v1: the legacy one, by a migration region; FILE.region while it is open
    region=SIZE         v1: the data section of that region, the largest chunk (default 64K)
    dma_log=0|1         whether it logs its writes to memory (default: as its profile)

Parameters of this opening, not kept:

    reported_size=SIZE|max|error|ERRNO   what MIG_DATA_SIZE answers (max: 2^64-1; error: EIO)
    bandwidth=RATE      how fast reads and writes go
    latency=DURATION    how long each burst of reads (a chunk, or 1 MiB) takes to begin
    chunk=SIZE          the most that one read gives
    dma_writes=COUNT    pages of 4 KiB that it writes to memory between two reports of its DMA log
    fault=...           see faults.py; may be repeated
"""

from collections.abc import Callable, Mapping
from errno import EIO, ENOMSG
from typing import Any, NamedTuple

from vfiomig.errors import UsageError
from vfiomig.quantities import parse_duration, parse_rate, parse_size
from vfiomig.region import CAPABILITIES
from vfiomig.simulator.faults import FaultScript, parse_errno, parse_fault
from vfiomig.simulator.profiles import PROFILES, Accept, DmaLogging, Precopy, Profile
from vfiomig.uapi import Capability

SCHEME = "sim:"
# Ours: small enough that a state has several chunks, and what vendors' modules had at least.
_REGION_BYTES, _MOST_REGION_BYTES = 64 << 10, 1 << 30
_ENDS = {"enomsg": ENOMSG, "zero": 0}


class Parameters(NamedTuple):
    """What a simulated device is; kept with its state. Bytes, and bytes per second."""

    profile_name: str
    profile: Profile
    size: int
    seed: int
    zeros: int
    capabilities: Capability
    initial: int | None
    dirty: int
    drained_errno: int
    accept: Accept
    protocol: str = "v2"
    region: int = 0
    dma_logging: DmaLogging | None = None

    def as_texts(self) -> dict[str, str]:
        """Return the parameters as parse_parameters() takes them."""
        texts = {
            "profile": self.profile_name,
            "size": str(self.size),
            "seed": str(self.seed),
            "zeros": str(self.zeros),
            "capabilities": ",".join(self.capabilities.names).lower(),
            "dirty": str(self.dirty),
            "precopy_end": next(k for k, v in _ENDS.items() if v == self.drained_errno),
            "accept": self.accept.value,
        }
        if self.protocol == "v1":
            texts |= {"protocol": self.protocol, "region": str(self.region)}
        if self.dma_logging != self.profile.dma_logging:
            texts["dma_log"] = "1" if self.dma_logging else "0"
        return texts if self.initial is None else texts | {"initial": str(self.initial)}


class Opening(NamedTuple):
    """How this opening of a device behaves. Rates in bytes per second, 0 is unlimited."""

    reported_size: int | None
    reported_errno: int
    bandwidth: int
    latency_ns: int
    chunk: int
    dma_writes: int
    faults: FaultScript

    @property
    def is_shaped(self) -> bool:
        """Whether its streams are slowed down or cut into chunks."""
        return bool(self.bandwidth or self.latency_ns or self.chunk)


class SimUrl(NamedTuple):
    """A name taken apart. path: "" for a device in memory. given: the device's own parameters."""

    name: str
    path: str
    given: Mapping[str, str]
    opening: Opening


def parse_url(url: str) -> SimUrl:
    """Take a name apart and check every parameter. Raises UsageError."""
    if not url.startswith(SCHEME):
        raise UsageError(f"{url!r} does not name a simulated device: it must begin with {SCHEME}")
    path, _, query = url.removeprefix(SCHEME).partition("?")
    path = _unquoted(path)
    if "\0" in path:
        raise UsageError(f"{url!r}: a file name cannot contain a zero byte")
    pairs = [_pair(part) for part in query.split("&") if part]
    faults = [value for key, value in pairs if key == "fault"]
    once = [(key, value) for key, value in pairs if key != "fault"]
    if len(dict(once)) != len(once):
        raise UsageError(f"{url!r}: a parameter is given twice")
    given = {key: value for key, value in once if key in _DEVICE_KEYS}
    opening = {key: value for key, value in once if key not in _DEVICE_KEYS}
    parse_parameters(given)
    return SimUrl(SCHEME + path if path else url, path, given, _opening(opening, faults))


def parse_parameters(texts: Mapping[str, str]) -> Parameters:
    """Return the device these texts describe, defaults filled in. Raises UsageError."""
    name = texts.get("profile", "generic")
    if name not in PROFILES:
        raise UsageError(f"there is no profile {name!r}; known are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    found = Parameters(
        profile_name=name,
        profile=profile,
        size=profile.size_bytes,
        seed=0,
        zeros=0,
        capabilities=profile.capabilities,
        initial=None,
        dirty=0,
        drained_errno=profile.drained_errno,
        accept=profile.accept,
    )
    given = _parsed(texts)
    is_logging = given.pop("dma_log", bool(profile.dma_logging))
    logging = (profile.dma_logging or DmaLogging()) if is_logging else None
    found = found._replace(dma_logging=logging, **given)
    if found.protocol == "v1":
        if "capabilities" not in given:
            found = found._replace(capabilities=found.capabilities & CAPABILITIES)
        if "region" not in given:
            found = found._replace(region=_REGION_BYTES)
    _check(found)
    return found


def _parsed(texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        _FIELDS.get(key, key): _DEVICE_KEYS[key](text)
        for key, text in texts.items()
        if key != "profile"
    }


def agree(stored: Mapping[str, str], given: Mapping[str, str], what: str) -> Parameters:
    """Return the stored parameters. Raises UsageError when one that is given says otherwise."""
    kept = parse_parameters(stored)
    for key, text in given.items():
        if parse_parameters({**stored, key: text}) != kept:
            raise UsageError(
                f"{what}: it exists, and its {key} is {stored.get(key, 'not set')}, not {text}",
                hint="leave the parameter out, or use another file",
            )
    return kept


def _check(found: Parameters) -> None:
    profile = found.profile
    if not profile.smallest_bytes <= found.size <= profile.largest_bytes:
        allowed = f"{profile.smallest_bytes} to {profile.largest_bytes}"
        if profile.smallest_bytes == profile.largest_bytes:
            allowed = str(profile.size_bytes)
        raise UsageError(f"a {profile.name} device cannot have {found.size} bytes, only {allowed}")
    if found.protocol == "v1" and found.capabilities != CAPABILITIES:
        raise UsageError("a device with protocol v1 has stop_copy and pre_copy, and nothing else")
    if found.region and found.protocol != "v1":
        raise UsageError("only a device with protocol=v1 has a region")
    if found.protocol == "v1" and not 0 < found.region <= _MOST_REGION_BYTES:
        raise UsageError(f"a region of {found.region} bytes: 1 byte to 1 GiB")
    if found.capabilities & ~profile.capabilities:
        raise UsageError(f"a {profile.name} device has no such capability")
    if found.capabilities & Capability.PRE_COPY and profile.precopy is Precopy.NONE:
        raise UsageError(f"a {profile.name} device has no pre-copy")


def _opening(texts: Mapping[str, str], faults: list[str]) -> Opening:
    reported = texts.get("reported_size", "")
    size: int | None = None
    number = 0
    if reported == "max":
        size = 2**64 - 1
    elif reported == "error":
        number = EIO
    elif reported[:1].upper() == "E":
        number = parse_errno(reported)
    elif reported or "reported_size" in texts:
        size = parse_size(reported)
    return Opening(
        reported_size=size,
        reported_errno=number,
        bandwidth=_positive(parse_rate, texts, "bandwidth"),
        latency_ns=_positive(parse_duration, texts, "latency"),
        chunk=_positive(parse_size, texts, "chunk"),
        dma_writes=_positive(_number, texts, "dma_writes"),
        faults=FaultScript([parse_fault(text) for text in faults]),
    )


def _positive(parse: Callable[[str], int], texts: Mapping[str, str], key: str) -> int:
    if key not in texts:
        return 0
    value = parse(texts[key])
    if value <= 0:
        raise UsageError(f"{key} must be more than nothing: {texts[key]!r}")
    return value


def _pair(part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    key = _unquoted(key)
    if not equals or key not in (*_DEVICE_KEYS, *_OPENING_KEYS):
        known = ", ".join((*_DEVICE_KEYS, *_OPENING_KEYS))
        raise UsageError(f"there is no parameter {key!r}=VALUE; known are {known}")
    return key, _unquoted(value)


def _unquoted(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote  # it brings ipaddress along, and most names need neither

    return unquote(text)


def _number(text: str) -> int:
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 40:
        raise UsageError(f"{text!r} is not a number")
    return int(text)


def _percent(text: str) -> int:
    value = _number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise UsageError(f"{text!r} is not a percentage from 0 to 100")
    return value


def _capabilities(text: str) -> Capability:
    found = Capability(0)
    for name in text.split(","):
        try:
            found |= Capability[name.strip().upper()]
        except KeyError:
            raise UsageError(f"{name!r} is not a capability: stop_copy, p2p, pre_copy") from None
    if not found & Capability.STOP_COPY:
        raise UsageError("every migratable device has stop_copy")
    return found


def _end(text: str) -> int:
    if text not in _ENDS:
        raise UsageError(f"precopy_end is enomsg or zero, not {text!r}")
    return _ENDS[text]


def _accept(text: str) -> Accept:
    try:
        return Accept(text)
    except ValueError:
        raise UsageError(f"accept is any, fits, exact or complete, not {text!r}") from None


def _protocol(text: str) -> str:
    if text not in ("v1", "v2"):
        raise UsageError(f"protocol is v2 or v1, not {text!r}")
    return text


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise UsageError(f"dma_log is 0 or 1, not {text!r}")
    return text == "1"


_FIELDS = {"precopy_end": "drained_errno"}
_DEVICE_KEYS: dict[str, Callable[[str], object]] = {
    "profile": str,
    "size": parse_size,
    "seed": _number,
    "zeros": _percent,
    "capabilities": _capabilities,
    "initial": parse_size,
    "dirty": parse_rate,
    "precopy_end": _end,
    "accept": _accept,
    "protocol": _protocol,
    "region": parse_size,
    "dma_log": _switch,
}
_OPENING_KEYS = ("reported_size", "bandwidth", "latency", "chunk", "dma_writes", "fault")
