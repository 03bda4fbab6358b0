"""Save, load and inspect the migration state of VFIO devices, without a VMM.

    with vfiomig.open_device("sim:disk.state?size=64M") as device:
        report = vfiomig.save(device, "disk.vmig")

The library prints nothing, installs no signal handlers, sets up no logging and never exits. Every
error it raises on purpose is a MigrationError, whose code is the exit code of the command.
"""

from vfiomig._version import __version__
from vfiomig.backends import open_device
from vfiomig.device import Device
from vfiomig.errors import (
    AccessError,
    CancelledError,
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceStateError,
    IllegalArcError,
    LocalIOError,
    MigrationError,
    NoSuchDeviceError,
    NotMigratableError,
    OutOfSyncError,
    PeerError,
    ResourceLimitError,
    StaleChannelError,
    StreamError,
    StreamMismatchError,
    UsageError,
)
from vfiomig.identity import Identity
from vfiomig.inspection import Inspection, inspect
from vfiomig.load import load
from vfiomig.options import LoadOptions, PreCopyLimits, QemuFraming, SaveOptions
from vfiomig.report import Chunk, Event, Phase, Progress, StateChange, TransferReport, Warning
from vfiomig.save import save
from vfiomig.uapi import Capability, DeviceState
from vfiomig.worker import Cancellation

__all__ = [
    "AccessError",
    "Cancellation",
    "CancelledError",
    "Capability",
    "Chunk",
    "Device",
    "DeviceBusyError",
    "DeviceIOError",
    "DeviceLostError",
    "DeviceState",
    "DeviceStateError",
    "Event",
    "Identity",
    "IllegalArcError",
    "Inspection",
    "LoadOptions",
    "LocalIOError",
    "MigrationError",
    "NoSuchDeviceError",
    "NotMigratableError",
    "OutOfSyncError",
    "PeerError",
    "Phase",
    "PreCopyLimits",
    "Progress",
    "QemuFraming",
    "ResourceLimitError",
    "SaveOptions",
    "StaleChannelError",
    "StateChange",
    "StreamError",
    "StreamMismatchError",
    "TransferReport",
    "UsageError",
    "Warning",
    "__version__",
    "inspect",
    "load",
    "open_device",
    "save",
]
