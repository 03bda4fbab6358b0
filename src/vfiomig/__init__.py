"""Save, load, live-migrate and inspect the state of VFIO devices, without a VMM.

    with vfiomig.open_device("sim:disk.state?size=64M") as device:
        report = vfiomig.save(device, "disk.vmig")

The library prints nothing, installs no signal handlers, sets up no logging and never exits. Every
error it raises on purpose is a MigrationError, whose code is the exit code of the command.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from vfiomig._version import __version__
from vfiomig.errors import (
    AccessError,
    AuthenticationError,
    CancelledError,
    DeviceBusyError,
    DeviceIOError,
    DeviceLostError,
    DeviceStateError,
    IllegalArcError,
    IncompatibleError,
    LocalIOError,
    MigrationError,
    NoSuchDeviceError,
    NotMigratableError,
    OutcomeUnknownError,
    OutOfSyncError,
    PeerError,
    ResourceLimitError,
    StaleChannelError,
    StreamError,
    StreamMismatchError,
    TimeLimitError,
    UsageError,
)
from vfiomig.uapi import Capability, DeviceState

if TYPE_CHECKING:
    from vfiomig.backends import open_device
    from vfiomig.conform import ArcTime, Conformance, RuleResult, Verdict, conform
    from vfiomig.device import Device
    from vfiomig.dirty import DirtyLog, stop_logging
    from vfiomig.dirty_report import DirtyPages, DirtyPiece, DirtyReport
    from vfiomig.identity import Identity
    from vfiomig.inspection import Inspection, inspect
    from vfiomig.live.destination import receive
    from vfiomig.live.options import ReceiveOptions, SendOptions
    from vfiomig.live.source import send
    from vfiomig.live.tls import TlsFiles
    from vfiomig.load import load
    from vfiomig.options import LoadOptions, PreCopyLimits, QemuFraming, SaveOptions
    from vfiomig.report import (
        Chunk,
        Connected,
        Event,
        MigrationProgress,
        MigrationReport,
        MovedDevice,
        Phase,
        Progress,
        StateChange,
        TransferReport,
        Warning,
    )
    from vfiomig.save import save
    from vfiomig.worker import Cancellation

__all__ = [
    "AccessError",
    "ArcTime",
    "AuthenticationError",
    "Cancellation",
    "CancelledError",
    "Capability",
    "Chunk",
    "Conformance",
    "Connected",
    "Device",
    "DeviceBusyError",
    "DeviceIOError",
    "DeviceLostError",
    "DeviceState",
    "DeviceStateError",
    "DirtyLog",
    "DirtyPages",
    "DirtyPiece",
    "DirtyReport",
    "Event",
    "Identity",
    "IllegalArcError",
    "IncompatibleError",
    "Inspection",
    "LoadOptions",
    "LocalIOError",
    "MigrationError",
    "MigrationProgress",
    "MigrationReport",
    "MovedDevice",
    "NoSuchDeviceError",
    "NotMigratableError",
    "OutOfSyncError",
    "OutcomeUnknownError",
    "PeerError",
    "Phase",
    "PreCopyLimits",
    "Progress",
    "QemuFraming",
    "ReceiveOptions",
    "ResourceLimitError",
    "RuleResult",
    "SaveOptions",
    "SendOptions",
    "StaleChannelError",
    "StateChange",
    "StreamError",
    "StreamMismatchError",
    "TimeLimitError",
    "TlsFiles",
    "TransferReport",
    "UsageError",
    "Verdict",
    "Warning",
    "__version__",
    "conform",
    "inspect",
    "load",
    "open_device",
    "receive",
    "save",
    "send",
    "stop_logging",
]

# Where the names are that only mypy sees imported above. A room is imported when the first of its
# names is asked for: start-up is most of what a short command takes. tests/test_imports.py
# compares the two lists.
_ROOMS = {
    "ArcTime": "conform",
    "Cancellation": "worker",
    "Chunk": "report",
    "Conformance": "conform",
    "Connected": "report",
    "Device": "device",
    "DirtyLog": "dirty",
    "DirtyPages": "dirty_report",
    "DirtyPiece": "dirty_report",
    "DirtyReport": "dirty_report",
    "Event": "report",
    "Identity": "identity",
    "Inspection": "inspection",
    "LoadOptions": "options",
    "MigrationProgress": "report",
    "MigrationReport": "report",
    "MovedDevice": "report",
    "Phase": "report",
    "PreCopyLimits": "options",
    "Progress": "report",
    "QemuFraming": "options",
    "ReceiveOptions": "live.options",
    "RuleResult": "conform",
    "SaveOptions": "options",
    "SendOptions": "live.options",
    "StateChange": "report",
    "TlsFiles": "live.tls",
    "TransferReport": "report",
    "Verdict": "conform",
    "Warning": "report",
    "conform": "conform",
    "inspect": "inspection",
    "load": "load",
    "open_device": "backends",
    "receive": "live.destination",
    "save": "save",
    "send": "live.source",
    "stop_logging": "dirty",
}


class _Package(ModuleType):
    """This module: finds the names of _ROOMS, and lets save and load be functions.

    Python names a room in its package once somebody has imported it; the rooms save and load would
    hide the functions.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in _ROOMS:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
