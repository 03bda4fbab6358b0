"""What a caller can ask of save() and load(). Frozen values, checked before a device is touched."""

import re
from dataclasses import dataclass

from vfiomig.errors import NotMigratableError, UsageError
from vfiomig.framing import native, qemu
from vfiomig.identity import Identity
from vfiomig.uapi import Capability, DeviceState

# QEMU's, hw/vfio/migration.c; 256 KiB to 4 MiB are one plateau (measured, Zen 4, 22 Nov 2026).
DEFAULT_BUFFER_BYTES = 1 << 20
MIN_BUFFER_BYTES = 4096
# What a buffer grows to: the end of that plateau.
GROWN_BUFFER_BYTES = 4 << 20
DEFAULT_RING_SLOTS, MAX_RING_SLOTS = 4, 64
# Writes in flight past the page cache, and slots to fill meanwhile: 2, 4 and 6 writes gave 1.75,
# 1.90 and 1.69 GB/s (512 MiB to ext4, medians of 7, Zen 4, 23 Nov 2026).
DURABLE_WRITES, DURABLE_SLOTS = 4, 6
# Memory is constant: with large buffers a ring has fewer slots, but two.
RING_BYTES = 16 << 20
# Ours: no device has as much; what says that it does is broken.
DEFAULT_MAX_STATE_BYTES = 1 << 40
# What may differ besides the fields of Identity: DeviceEntry's.
REGION_BYTES = "region_bytes"
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


@dataclass(frozen=True, slots=True)
class QemuFraming:
    """QEMU's sections. section_id and idstr as the guest that will read them knows the device.

    idstr None: PCI address of the device + "/vfio", or "vfio".
    """

    section_id: int = 1
    idstr: str | None = None

    def section(self, device: str) -> qemu.Section:
        """Return the section for a device of this name. Raises UsageError."""
        name = self.idstr
        if name is None:
            name = f"{device}/vfio" if _PCI_ADDRESS.fullmatch(device) else "vfio"
        if not name.isprintable():  # lone surrogates, of argv, are among what is not
            raise UsageError(f"an idstr cannot contain what is not printable: {name!a}")
        if name != "vfio" and not name.endswith("/vfio"):
            raise UsageError(f"an idstr is vfio or ends in /vfio (QEMU's vmstate id), not {name!a}")
        return qemu.Section(self.section_id, name)


@dataclass(frozen=True, slots=True)
class PreCopyLimits:
    """When to leave PRE_COPY at the latest: some devices never run dry (virtio, a busy mlx5)."""

    rounds: int = 8
    duration_ns: int = 10_000_000_000
    device_bytes: int = DEFAULT_MAX_STATE_BYTES


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How to save. Every field has a default; sizes in bytes.

    framing: "native", or QemuFraming(). pre_copy: limits, or None for STOP_COPY alone. after:
    RUNNING or STOP, what to leave the device in. from_stop: also accept a device in STOP.
    config: an opaque blob that travels with the state. digest: False, with qemu framing only, skips
    the digest and lets the kernel splice where source and sink can. force: replace a file.

    buffer_bytes: of one read of the device; None: 1 MiB, or 4 MiB when the first reads show that
    they have a high fixed cost (qemu framing: QEMU's rule). ring_slots: buffers between the thread
    that reads and the one that writes, fewer (but two) where they would take more than 16 MiB; 1:
    one thread does both (and for a file in the page cache, unless the device's reads wait).
    elide_zeros: native framing: runs of zeros do not travel. durable: a path is written past the
    page cache (O_DIRECT), several writes at a time, while the device is stopped; else it is synced
    when the device runs again.
    bytes_per_s: 0, or the most to write to the stream in a second.
    """

    framing: str | QemuFraming = "native"
    pre_copy: PreCopyLimits | None = None
    after: DeviceState = DeviceState.RUNNING
    from_stop: bool = False
    config: bytes = b""
    digest: bool = True
    force: bool = False
    buffer_bytes: int | None = None
    ring_slots: int = DEFAULT_RING_SLOTS
    elide_zeros: bool = True
    durable: bool = False
    bytes_per_s: int = 0
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES
    chunk_events: bool = False

    def check(self, name: str, capabilities: Capability) -> None:
        """Raise UsageError or NotMigratableError for what cannot work."""
        if self.framing != "native" and not isinstance(self.framing, QemuFraming):
            raise UsageError(f"unknown framing {self.framing!r}: native or qemu")
        _check_common(
            self.after, DEFAULT_BUFFER_BYTES if self.buffer_bytes is None else self.buffer_bytes
        )
        if not 1 <= self.ring_slots <= MAX_RING_SLOTS:
            raise UsageError(f"a ring of {self.ring_slots} slots: 1 to {MAX_RING_SLOTS}")
        if self.bytes_per_s < 0:
            raise UsageError(f"a rate of {self.bytes_per_s} bytes per second")
        if self.framing == "native" and not self.digest:
            raise UsageError("native framing always carries its digest")
        if isinstance(self.framing, QemuFraming):
            self.framing.section(name)
        limit = native.MAX_CONFIG_BYTES if self.framing == "native" else qemu.MAX_CONFIG_BYTES
        if len(self.config) > limit:
            raise UsageError(f"a config blob of {len(self.config)} bytes: at most {limit}")
        if self.pre_copy is not None and not capabilities & Capability.PRE_COPY:
            raise NotMigratableError(
                f"{name} has no PRE_COPY",
                device=name,
                hint="save it without pre-copy",
            )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load. after: RUNNING or STOP, what to leave the device in.

    allow_mismatch: names of Identity fields in which stream and device may differ; "region_bytes":
    the migration region (protocol v1) may be smaller than that of the source, as long as every
    chunk fits.
    """

    after: DeviceState = DeviceState.RUNNING
    allow_mismatch: frozenset[str] = frozenset()
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    max_state_bytes: int = DEFAULT_MAX_STATE_BYTES
    chunk_events: bool = False

    def check(self) -> None:
        """Raise UsageError for what cannot work."""
        _check_common(self.after, self.buffer_bytes)
        known = (*Identity.__slots__, REGION_BYTES)
        if unknown := self.allow_mismatch - set(known):
            raise UsageError(
                f"no such field of a device: {', '.join(sorted(unknown))};"
                f" there are {', '.join(known)}"
            )


def _check_common(after: DeviceState, buffer_bytes: int) -> None:
    if after not in (DeviceState.RUNNING, DeviceState.STOP):
        raise UsageError(f"a device is left RUNNING or STOP, not {after.name}")
    if not MIN_BUFFER_BYTES <= buffer_bytes <= native.MAX_FRAME_BYTES:
        raise UsageError(f"a buffer of {buffer_bytes} bytes: 4 KiB to 128 MiB")
