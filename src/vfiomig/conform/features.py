"""The group "features": what VFIO_DEVICE_FEATURE answers, also to arguments that are wrong."""

import errno

from vfiomig import uapi
from vfiomig.conform.raw import (
    BAD_ADDRESS,
    UNKNOWN_FEATURE,
    feature,
    feature_error,
    ioctl_error,
)
from vfiomig.conform.rule import Need, rule
from vfiomig.conform.subject import Subject
from vfiomig.uapi import Capability, Feature

GROUP = "features"
_GET_MIGRATION = Feature.GET | Feature.MIGRATION
_GET_STATE = Feature.GET | Feature.MIG_DEVICE_STATE
_SET_STATE = Feature.SET | Feature.MIG_DEVICE_STATE
_VFIO_MAIN = "drivers/vfio/vfio_main.c, vfio_ioctl_device_feature()"
_KNOWN = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY
_PAYLOAD = bytes(8)  # of MIGRATION and of MIG_DEVICE_STATE
_STATE_BYTES = uapi.FEATURE_MIG_STATE.size


@rule(
    "capabilities",
    group=GROUP,
    text="The capabilities have STOP_COPY, and no bit that the header does not know.",
    source="linux/vfio.h, VFIO_DEVICE_FEATURE_MIGRATION",
)
def _capabilities(subject: Subject) -> None:
    subject.log.begin("GET of VFIO_DEVICE_FEATURE_MIGRATION")
    flags = subject.ops.get_migration_flags()
    subject.log.done("asked for the capabilities")
    subject.saw(f"flags {flags:#x}: {', '.join(Capability(flags & _KNOWN).names)}")
    subject.expect(bool(flags & Capability.STOP_COPY), "STOP_COPY is not among the capabilities")
    if unknown := flags & ~_KNOWN:
        subject.note(f"the bits {unknown:#x} are unknown: of a newer kernel")


@rule(
    "get-gives-no-fd",
    group=GROUP,
    text="GET of the state gives a data_fd of -1.",
    source="linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
    needs=[Need.KERNEL],
)
def _get_gives_no_fd(subject: Subject) -> None:
    # 0x55: a driver that does not write it would give back what was there.
    payload = feature(subject.device_fd, _GET_STATE, b"\x55" * _STATE_BYTES)
    state, data_fd = uapi.FEATURE_MIG_STATE.unpack(payload)
    subject.log.done("GET of VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE")
    subject.saw(f"state {state}, data_fd {data_fd}")
    subject.expect(data_fd == -1, f"data_fd came back as {data_fd}")


@rule(
    "probe",
    group=GROUP,
    text="PROBE, alone or with the directions that a feature has, succeeds and does nothing.",
    source=f"linux/vfio.h, VFIO_DEVICE_FEATURE_PROBE; {_VFIO_MAIN}",
    needs=[Need.KERNEL],
)
def _probe(subject: Subject) -> None:
    before = subject.state()
    asked = {
        "MIGRATION": Feature.MIGRATION,
        "GET MIGRATION": _GET_MIGRATION,
        "MIG_DEVICE_STATE": Feature.MIG_DEVICE_STATE,
        "GET and SET MIG_DEVICE_STATE": _GET_STATE | Feature.SET,
    }
    for name, flags in asked.items():
        payload = b"\xa5" * 8
        subject.log.begin(f"PROBE of {name}")
        answer = feature(subject.device_fd, Feature.PROBE | flags, payload)
        subject.log.done(f"PROBE of {name}")
        subject.expect(answer == payload, f"PROBE of {name} wrote into the payload")
    subject.expect(subject.state() is before, "a PROBE changed the state")
    subject.saw(f"{len(asked)} probes succeed")


@rule(
    "probe-wrong-direction",
    group=GROUP,
    text="PROBE with a direction that a feature does not have is refused with EINVAL.",
    source=f"{_VFIO_MAIN}, vfio_check_feature()",
    needs=[Need.KERNEL],
)
def _probe_wrong_direction(subject: Subject) -> None:
    flags = Feature.PROBE | Feature.SET | Feature.MIGRATION
    _expect(subject, "PROBE of SET MIGRATION", errno.EINVAL, flags, _PAYLOAD)


@rule(
    "argsz",
    group=GROUP,
    text="An argsz that is too small is refused with EINVAL, and one that is larger is taken.",
    source=f"linux/vfio.h, struct vfio_device_feature; {_VFIO_MAIN}",
    needs=[Need.KERNEL],
)
def _argsz(subject: Subject) -> None:
    for argsz in (0, 7, 8, 15):
        what = f"GET MIGRATION with argsz {argsz}"
        _expect(subject, what, errno.EINVAL, _GET_MIGRATION, _PAYLOAD, argsz)
    _expect(subject, "SET with argsz 15", errno.EINVAL, _SET_STATE, _PAYLOAD, 15)
    _expect(subject, "GET MIGRATION with argsz 40", 0, _GET_MIGRATION, bytes(32))


@rule(
    "unknown-flags",
    group=GROUP,
    text="Flags that the header does not have are refused with EINVAL.",
    source=_VFIO_MAIN,
    needs=[Need.KERNEL],
)
def _unknown_flags(subject: Subject) -> None:
    for bit in (19, 31):
        what = f"GET MIGRATION with bit {bit}"
        _expect(subject, what, errno.EINVAL, _GET_MIGRATION | 1 << bit, _PAYLOAD)


@rule(
    "one-direction",
    group=GROUP,
    text="Without PROBE there must be one direction: both at once, or none, is EINVAL.",
    source=f"linux/vfio.h, VFIO_DEVICE_FEATURE; {_VFIO_MAIN}",
    needs=[Need.KERNEL],
)
def _one_direction(subject: Subject) -> None:
    both, none = _GET_STATE | Feature.SET, int(Feature.MIG_DEVICE_STATE)
    _expect(subject, "GET and SET of the state", errno.EINVAL, both, _PAYLOAD)
    _expect(subject, "neither GET nor SET", errno.EINVAL, none, _PAYLOAD)


@rule(
    "unknown-feature",
    group=GROUP,
    text="A feature that the device does not have is ENOTTY, also for PROBE.",
    source=f"linux/vfio.h, VFIO_DEVICE_FEATURE; {_VFIO_MAIN}",
    needs=[Need.KERNEL],
)
def _unknown_feature(subject: Subject) -> None:
    for name, flags in {"GET": Feature.GET, "SET": Feature.SET, "PROBE": Feature.PROBE}.items():
        what = f"{name} of feature {UNKNOWN_FEATURE:#x}"
        _expect(subject, what, errno.ENOTTY, flags | UNKNOWN_FEATURE, _PAYLOAD)


@rule(
    "bad-address",
    group=GROUP,
    text="An argument that is no memory of the caller's is EFAULT.",
    source=_VFIO_MAIN,
    needs=[Need.KERNEL],
)
def _bad_address(subject: Subject) -> None:
    found = ioctl_error(subject.device_fd, uapi.VFIO_DEVICE_FEATURE, BAD_ADDRESS)
    subject.log.done(f"VFIO_DEVICE_FEATURE at address {BAD_ADDRESS}")
    subject.expect_error(found, [errno.EFAULT], f"address {BAD_ADDRESS}")


def _expect(
    subject: Subject, what: str, wanted: int, flags: int, payload: bytes, argsz: int = -1
) -> None:
    found = feature_error(subject.device_fd, flags, payload, argsz)
    subject.log.done(what)
    subject.expect_error(found, [wanted], what)
