"""Whether a state of one device fits into another: what differs, and what cannot be told. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from vfiomig.errors import IncompatibleError
from vfiomig.framing.manifest import DeviceEntry
from vfiomig.identity import Identity
from vfiomig.uapi import Capability

CAPABILITIES, REGION_BYTES = "capabilities", "region_bytes"
# What a person may declare to fit: the driver that loads it still has the last word.
ALLOWED_FIELDS = frozenset({*Identity.__slots__, CAPABILITIES, REGION_BYTES})


class Misfit(NamedTuple):
    """A field in which two devices differ so that a state does not fit, with both its values.

    Of "capabilities": those that are needed, and those that the destination has.
    """

    field: str
    source: str
    destination: str


def misfits(
    source: DeviceEntry,
    destination: DeviceEntry,
    *,
    allow: frozenset[str] = frozenset(),
    needs: Capability = Capability(0),  # noqa: B008  frozen
) -> tuple[Misfit, ...]:
    """Return why a state of source does not fit into destination; () when it does.

    allow: fields (of ALLOWED_FIELDS) that may differ. needs: what the destination must be able to
    do; none: whatever the source can. What one of them does not tell is no misfit: see doubt().
    """
    found = []
    if source.identity.driver and destination.identity.driver:
        found += [
            Misfit(name, getattr(source.identity, name), getattr(destination.identity, name))
            for name in source.identity.differences(destination.identity)
        ]
    if source.protocol != destination.protocol:
        found.append(Misfit("protocol", source.protocol, destination.protocol))
    elif source.region_bytes > destination.region_bytes > 0:
        sizes = str(source.region_bytes), str(destination.region_bytes)
        found.append(Misfit(REGION_BYTES, *sizes))
    wanted = needs.names or source.capabilities
    if destination.capabilities and not set(wanted) <= set(destination.capabilities):
        found.append(Misfit(CAPABILITIES, ", ".join(wanted), ", ".join(destination.capabilities)))
    return tuple(misfit for misfit in found if misfit.field not in allow)


def doubt(source: DeviceEntry, destination: DeviceEntry) -> str:
    """Return a sentence on what could not be compared, "" when everything could."""
    # fd:N and pid:PID/fd:N before Linux 7: fdinfo has no vfio-device-syspath there.
    silent = [entry.name for entry in (source, destination) if not entry.identity.driver]
    sentences = []
    if silent:
        sentences.append(f"{' and '.join(silent)}: the driver is not known")
    # Whatever can migrate has STOP_COPY: no names at all means that nobody asked.
    if mute := [entry.name for entry in (source, destination) if not entry.capabilities]:
        sentences.append(f"{' and '.join(mute)}: the capabilities are not known")
    return "; ".join(sentences) + (": whether they fit is unchecked" if sentences else "")


def incompatible(pairs: Sequence[tuple[str, str, tuple[Misfit, ...]]]) -> IncompatibleError:
    """Return the error for devices that do not fit: (source, destination, misfits) for each pair.

    Pairs without misfits are passed over. The hint names every field that may be allowed.
    """
    wrong = [pair for pair in pairs if pair[2]]
    found = [misfit for _, _, several in wrong for misfit in several]
    fields = dict.fromkeys(misfit.field for misfit in found if misfit.field in ALLOWED_FIELDS)
    hint = f"if you know that it fits: --allow-mismatch {','.join(fields)}" if fields else ""
    return IncompatibleError(
        "; ".join(_sentence(*pair) for pair in wrong),
        fields=tuple((*misfit,) for misfit in found),
        device=", ".join(destination for _, destination, _ in wrong),
        hint=hint,
    )


def _sentence(source: str, destination: str, found: Sequence[Misfit]) -> str:
    listed = ", ".join(_words(misfit) for misfit in found)
    return f"{destination} does not fit {source}: {listed}"


def _words(misfit: Misfit) -> str:
    if misfit.field == REGION_BYTES:
        both = f"has {misfit.destination} bytes, and the source's has {misfit.source}"
        return f"its migration region {both}: a chunk may not fit"
    if misfit.field == CAPABILITIES:
        return f"it has {misfit.destination}, and needs {misfit.source}"
    return f"its {misfit.field} is {misfit.destination!r}, not {misfit.source!r}"
