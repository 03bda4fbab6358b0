"""The drivers a simulated device can play: what they save, what they refuse, and where.

Source, where nothing else is said: drivers/vfio/pci/* and samples/vfio-mdev/mtty.c of Linux 6.12
and 7.3. Real stream formats are played only where they are short and fixed (mtty, and the headers
of hisi and qat); elsewhere the state is opaque bytes.
"""

import errno
import struct
from enum import Enum, auto
from typing import NamedTuple

from vfiomig.uapi import Capability

MTTY_HEADER = struct.Struct("<QIIII")  # struct mtty_data: magic, major, minor, nr_ports, flags
MTTY_MAGIC = 0x7E9D09898C3E2C4E
# struct serial_port as mtty saves it: registers, FIFO, its counters; a new port has a FIFO of 16.
_MTTY_PORT_BYTES, _MTTY_SCRATCH, _MTTY_FIFO_DEPTH = 36, 7, 33
# struct acc_vf_data, the match part: magic, major, minor, qp_num, dev_id, que_iso_cfg, qp_base,
# vf_qm_state, reserved; 0xa256 is the SEC VF. Total: sizeof(struct acc_vf_data).
_HISI_MATCH = struct.pack("<QHHIIIIIQ", 0xAACCFEEDDECADEDE, 1, 0, 16, 0xA256, 0, 0, 0, 0)
_HISI_BYTES = 176
# struct adf_mstate_preh of adf_mstate_mgr.c: magic, version, preh_len, size, n_sects.
_QAT_PREAMBLE = struct.pack("<IHHII", 0xADF5CAEA, 1, 16, 4096 - 16, 4)
_QAT_BYTES = 4096
_PDS_BYTES = 65536  # PDS_LM_DEVICE_STATE_LENGTH
_ALL = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY


class Accept(Enum):
    """What RESUMING -> STOP takes for a whole state."""

    ANY = "any"  # whatever came, cut anywhere, even nothing: the state is then those bytes
    FITS = "fits"  # at most the device's size; what is missing is zero
    EXACT = "exact"  # the device's size, to the byte
    COMPLETE = "complete"  # not cut: at least the device's size, or updates with their end record


class Precopy(Enum):
    """What is read in PRE_COPY."""

    NONE = auto()
    HEADER = auto()  # a compatibility header only; the state follows in STOP_COPY
    DIRTY = auto()  # the state, then what became dirty
    COPIES = auto()  # the state, then a whole new copy once a second: never converges


class DmaLogging(NamedTuple):
    """How a driver logs the device's writes to memory, beyond what the kernel's core checks."""

    # START takes more, and logs the gaps between the nearest as well.
    most_ranges: int = 2**31
    # START's page size is brought into these bounds.
    page_min: int = 1
    page_max: int = 2**63
    # From the first byte of all ranges to the last; more is EOPNOTSUPP.
    longest_span: int = 2**64
    # REPORT answers EINVAL for what does not lie in one range of START.
    in_one_range: bool = False
    # Leaving STOP_COPY ends it.
    ends_with_stop_copy: bool = False
    # Takes everything, at any time, and never has anything to report.
    is_stub: bool = False


class Profile(NamedTuple):
    """One driver. The errnos are what it answers; 0 where it never refuses."""

    name: str
    capabilities: Capability
    size_bytes: int
    smallest_bytes: int = 0
    largest_bytes: int = 2**62
    model: str = ""
    precopy: Precopy = Precopy.NONE
    # read() when pre-copy has nothing now: this errno, or end of file where it is 0.
    drained_errno: int = 0
    accept: Accept = Accept.ANY
    # At RESUMING -> STOP; the device stays in RESUMING.
    refused_errno: int = errno.EINVAL
    # In write(), when the state runs past its size.
    too_long_errno: int = 0
    # In write(), when the header is in and is not this device's. The bytes stay, and count.
    header_errno: int = 0
    # How a blank state begins, and how many of those bytes are the checked header.
    blank: bytes = b""
    header_bytes: int = 0
    # The only bytes of a new state that follow from its seed; () is all behind the header.
    seeded: tuple[int, ...] = ()
    # Whole states of another length, taken as they are.
    other_lengths: frozenset[int] = frozenset()
    # VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, where it is not the size of the state.
    reported_bytes: int | None = None
    # STOP_COPY is left while data is unread: SET fails so, and the session is dead.
    early_leave_errno: int = 0
    # A refused target also stops the device: only a reset helps.
    refusal_stops: bool = False
    reset_blanks: bool = True
    # None: ENOTTY.
    dma_logging: DmaLogging | None = None

    @property
    def header(self) -> bytes:
        """What every state of this device begins with; b"" where nothing is checked."""
        return self.blank[: self.header_bytes]


def _mtty(ports: int) -> Profile:
    port = bytearray(_MTTY_PORT_BYTES)
    port[_MTTY_FIFO_DEPTH] = 16
    blank = MTTY_HEADER.pack(MTTY_MAGIC, 1, 0, ports, 0) + bytes(port) * ports
    return Profile(
        name="mtty",
        model=f"mtty-{ports}",
        capabilities=_ALL,
        size_bytes=len(blank),
        smallest_bytes=len(blank),
        largest_bytes=len(blank),
        precopy=Precopy.HEADER,
        accept=Accept.EXACT,
        too_long_errno=errno.ENOMEM,
        header_errno=errno.EFAULT,
        blank=blank,
        header_bytes=MTTY_HEADER.size,
        seeded=tuple(
            MTTY_HEADER.size + _MTTY_PORT_BYTES * port + _MTTY_SCRATCH for port in range(ports)
        ),
        reset_blanks=False,
        dma_logging=DmaLogging(is_stub=True),
    )


# Not a driver of the kernel: the contract with nothing to complicate it, and no check on load.
_GENERIC = Profile(
    name="generic",
    capabilities=_ALL,
    size_bytes=16 << 20,
    precopy=Precopy.DIRTY,
    drained_errno=errno.ENOMSG,
    dma_logging=DmaLogging(),
)
_MLX5 = Profile(
    name="mlx5",
    capabilities=_ALL,
    size_bytes=16 << 20,
    precopy=Precopy.DIRTY,
    drained_errno=errno.ENOMSG,
    # mlx5vf_start_page_tracker(); the numbers are the firmware's to choose, and here ours.
    dma_logging=DmaLogging(most_ranges=16, page_min=4096, page_max=2 << 20, longest_span=1 << 42),
)
_VIRTIO = Profile(
    name="virtio",
    capabilities=_ALL,
    size_bytes=256 << 10,
    largest_bytes=2**32 - 1,
    precopy=Precopy.COPIES,
    drained_errno=errno.ENOMSG,
)
_HISI = Profile(
    name="hisi",
    capabilities=Capability.STOP_COPY | Capability.PRE_COPY,
    size_bytes=_HISI_BYTES,
    smallest_bytes=_HISI_BYTES,
    largest_bytes=_HISI_BYTES,
    precopy=Precopy.HEADER,
    accept=Accept.EXACT,
    too_long_errno=errno.ENOMEM,
    header_errno=errno.EFAULT,
    blank=_HISI_MATCH + bytes(_HISI_BYTES - len(_HISI_MATCH)),
    header_bytes=len(_HISI_MATCH),
    other_lengths=frozenset({len(_HISI_MATCH)}),  # no driver in the guest: match data only
    reported_bytes=_HISI_BYTES,
)
_QAT = Profile(
    name="qat",
    capabilities=_ALL,
    size_bytes=_QAT_BYTES,
    smallest_bytes=_QAT_BYTES,
    largest_bytes=_QAT_BYTES,
    precopy=Precopy.HEADER,
    accept=Accept.EXACT,
    too_long_errno=errno.ENOMEM,
    header_errno=errno.EINVAL,
    blank=_QAT_PREAMBLE + bytes(_QAT_BYTES - len(_QAT_PREAMBLE)),
    header_bytes=len(_QAT_PREAMBLE),
    reported_bytes=_QAT_BYTES,
)
_PDS = Profile(
    name="pds",
    capabilities=Capability.STOP_COPY | Capability.P2P,
    size_bytes=_PDS_BYTES,
    largest_bytes=_PDS_BYTES,
    accept=Accept.FITS,
    too_long_errno=errno.EINVAL,
    reported_bytes=_PDS_BYTES,
    # pds_vfio_dirty_enable(), pds_vfio_dirty_sync(); the number of ranges as of mlx5.
    dma_logging=DmaLogging(most_ranges=16, in_one_range=True, ends_with_stop_copy=True),
)
_XE = Profile(
    name="xe",
    capabilities=Capability.STOP_COPY | Capability.P2P,
    size_bytes=64 << 20,
    accept=Accept.COMPLETE,
    refused_errno=errno.EIO,
    early_leave_errno=errno.EIO,
    refusal_stops=True,
)

PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (_GENERIC, _MLX5, _VIRTIO, _HISI, _QAT, _PDS, _XE)
} | {"mtty": _mtty(2), "mtty-1": _mtty(1), "mtty-2": _mtty(2)}
