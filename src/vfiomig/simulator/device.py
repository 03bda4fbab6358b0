"""A simulated device: answers as the kernel does, without privileges. See url.py for its names.

    with open_simulated("sim:/tmp/device?size=64M&profile=mlx5") as device: ...

It obeys states.py, hands out real descriptors, and fails where it is told to (faults.py).
"""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from vfiomig import states
from vfiomig.channel import DataChannel, PrecopyInfo
from vfiomig.device import Device, DeviceOps
from vfiomig.errors import opening_failed
from vfiomig.fd import OwnedFd
from vfiomig.identity import Identity
from vfiomig.region import RegionOps
from vfiomig.simulator.commit import commit
from vfiomig.simulator.dma_log import DmaLog
from vfiomig.simulator.drain import PipedLoad
from vfiomig.simulator.faults import Action
from vfiomig.simulator.feeder import PIPE_BYTES, PipedSave
from vfiomig.simulator.home import Home, open_home, state_bytes_of
from vfiomig.simulator.precopy import PrecopySource
from vfiomig.simulator.session import Pacer, PlainLoad, PlainSave, Session, os_error
from vfiomig.simulator.storage import reopened
from vfiomig.simulator.updates import Segment
from vfiomig.simulator.url import Opening, parse_url
from vfiomig.uapi import Capability
from vfiomig.uapi import DeviceState as S


def open_simulated(url: str) -> Device:
    """Open, or create, the device a name stands for. Raises UsageError, DeviceBusyError ..."""
    ops = SimulatedOps.open(url)
    return Device(ops.name, ops.identity, by_protocol(ops))


def by_protocol(ops: "SimulatedOps") -> DeviceOps:
    """Return what speaks to the device: ops, or the region in front of it. Raises MigrationError.

    What is returned owns ops; when it raises, ops is closed.
    """
    if not ops.data_bytes:
        return ops
    from vfiomig.simulator.region import SimulatedRegion

    try:
        region = SimulatedRegion(ops, ops.data_bytes, ops.region_path)
    except OSError as err:
        ops.close()
        raise opening_failed(ops.name, err) from err
    return RegionOps(ops.name, region, ops)


def state_bytes(url: str) -> bytes:
    """Return the state of a device with a file, whoever has it open. Raises UsageError, OSError."""
    return state_bytes_of(parse_url(url))


class SimulatedOps:
    """DeviceOps without a kernel. One lock for all of it, as in the drivers.

    A read or write is served by a thread of the session, never under that lock. data_bytes: of
    protocol v1, the data section of its region, which is put in front of it; else 0. region_path:
    the file for that, "" where the device has none.
    """

    protocol = "v2"
    region_bytes = 0

    def __init__(self, name: str, home: Home, opening: Opening) -> None:
        """Take over home."""
        self.name, self._home, self._opening = name, home, opening
        self._parameters, self._profile = home.parameters, home.parameters.profile
        self.data_bytes = self._parameters.region
        self.region_path = (
            home.sidecar.path.removesuffix(".sim") + ".region" if home.sidecar else ""
        )
        self.identity = Identity(f"sim:{self._profile.name}", self._profile.model)
        parameters = self._parameters
        self._dma_log = DmaLog(parameters.dma_logging, opening.dma_writes, parameters.seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._session: Session | None = None
        self._precopy: PrecopySource | None = None
        self._is_reset = False
        self._is_stopped = False
        self._wants_reinit = False

    @classmethod
    def open(cls, url: str) -> Self:
        """Open, or create, the device a name stands for. Raises UsageError, DeviceBusyError ..."""
        found = parse_url(url)
        return cls(found.name, open_home(found), found.opening)

    def get_migration_flags(self) -> int:
        """VFIO_DEVICE_FEATURE_MIGRATION."""
        with self._device():
            self._meet("caps")
            return self._parameters.capabilities

    def get_device_state(self) -> S:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET."""
        with self._device():
            self._meet("get")
            return self._home.device_state

    def get_data_size(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: in a pre-copy session, what is left for STOP_COPY."""
        with self._device():
            self._meet("size")
            if self._opening.reported_errno:
                raise os_error(self._opening.reported_errno)
            if self._opening.reported_size is not None:
                return self._opening.reported_size
            if self._profile.reported_bytes is not None:
                return self._profile.reported_bytes
            if self._precopy is not None:
                return self._precopy.remaining_bytes()
            return self._home.state.size

    def set_precopy_info_v2(self) -> bool:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: there for every device with PRE_COPY."""
        with self._device():
            self._wants_reinit = bool(self._parameters.capabilities & Capability.PRE_COPY)
            return self._wants_reinit

    def set_device_state(self, state: S) -> DataChannel | None:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET: walks the whole path of the kernel."""
        with self._device():
            steps = states.path(self._parameters.capabilities, self._home.device_state, state)
            if self._is_stopped:
                raise os_error(errno.EIO)
            if steps is None:
                self._is_stopped = self._profile.refusal_stops
                raise os_error(errno.EINVAL)
            channel: Session | None = None
            for step in steps:
                channel = self._step(step)
            return channel

    def start_dma_logging(self, page_size_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_START."""
        with self._device():
            self._meet("log-start")
            return self._dma_log.start(page_size_bytes, ranges)

    def stop_dma_logging(self) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP; nothing once closed."""
        if not self._closing.is_set():
            with self._device():
                self._meet("log-stop")
                self._dma_log.stop()

    def report_dma_logging(
        self, iova: int, length_bytes: int, page_size_bytes: int, bitmap: bytearray
    ) -> None:
        """VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT."""
        with self._device():
            self._meet("log-report")
            self._dma_log.report(iova, length_bytes, page_size_bytes, bitmap)

    def reset_device(self) -> None:
        """VFIO_DEVICE_RESET: RUNNING, and the state is lost (of mtty it stays)."""
        with self._device():
            self._meet("reset")
            self._reset()

    def close(self) -> None:
        """End the session and close the device; with a file, it stays in the state it is in."""
        self._closing.set()
        with self._lock:
            if self._is_reset:
                self._reset()
            self._end_session()
            self._home.close()

    @property
    def history(self) -> list[tuple[int, S]]:
        """When the device entered which state since it was opened: CLOCK_MONOTONIC, ns.

        What it did, not what it was asked, resets and errors included; the last 1024.
        """
        return list(self._home.entered)

    def write_memory(self, iova: int, length_bytes: int) -> None:
        """Do as if the device had written there: into its DMA log, if that is on."""
        with self._device():
            self._dma_log.mark(iova, length_bytes)

    def state_digest(self) -> str:
        """Return the BLAKE2b-128 of the state."""
        with self._device():
            return self._home.state.digest()

    def read_state(self) -> bytes:
        """Return the whole state."""
        with self._device():
            return self._home.state.read()

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Hold the lock; a reset from underneath is done before and after, as drivers do."""
        with self._lock:
            if self._closing.is_set():
                raise os_error(errno.EBADF)
            if self._is_reset:
                self._reset()
            try:
                yield
            finally:
                if self._is_reset:
                    self._reset()

    def _meet(self, where: str, state: S | None = None) -> Action | None:
        """Suffer the faults that strike here. Returns what else it is to do. Raises OSError."""
        met = None
        for fault in self._opening.faults.strikes(where, state):
            if fault.action is Action.HANG:
                if self._closing.wait(fault.duration_ns / 1e9):
                    raise os_error(errno.ENODEV)
            elif fault.action is Action.RESET:
                self._reset_underneath()
            elif fault.action is Action.FAIL:
                if fault.to_error:
                    self._end_session()
                    self._home.record(S.ERROR)
                raise fault.error()
            met = fault.action
        return met

    def _step(self, target: S) -> Session | None:
        before = self._home.device_state
        self._meet("set", target)
        if before is S.RESUMING:
            self._commit()
        elif states.ends_session(before, target):
            self._leave_saving(before)
            logging = self._parameters.dma_logging
            if before is S.STOP_COPY and logging and logging.ends_with_stop_copy:
                self._dma_log.stop()
        begun = self._begin(target) if states.starts_session(before, target) else None
        if self._precopy is not None:
            self._precopy.advance(before, target)
        self._home.record(target)
        try:
            self._meet("set-after", target)
        except OSError:
            if begun is not None:
                begun.close()  # the descriptor that could not be delivered
            raise
        return begun

    def _commit(self) -> None:
        untold = self._session.settle() if self._session is not None else None
        if untold is not None:
            raise untold
        if refusal := commit(self._home.state, self._parameters):
            raise os_error(refusal)
        self._end_session()

    def _leave_saving(self, before: S) -> None:
        session, refusal = self._session, self._profile.early_leave_errno
        if before is S.STOP_COPY and refusal and session is not None and session.unread_bytes():
            session.end()
            self._is_stopped = True
            raise os_error(refusal)
        self._end_session()

    def _begin(self, target: S) -> Session:
        self._end_session()
        try:
            if target is S.RESUMING:
                self._session = self._begin_load()
            elif target is S.STOP_COPY:
                self._session = self._begin_save()
            else:
                self._session = self._begin_precopy()
        except OSError:  # the descriptor is not handed out
            if self._session is not None:
                self._session.close()
            self._end_session()
            raise
        return self._session

    def _begin_load(self) -> Session:
        self._home.state.stage()
        staging_fd = self._home.state.staging_fd
        faults = self._opening.faults.in_stream("write")
        checks = self._profile.header_bytes or self._profile.too_long_errno
        if not (faults or checks or self._opening.bandwidth):
            return PlainLoad(self.name, OwnedFd(reopened(staging_fd, os.O_WRONLY)))
        pacer = Pacer(self._opening.bandwidth, 0, PIPE_BYTES)
        size_bytes, reset = self._parameters.size, self._reset_underneath
        staging = OwnedFd(reopened(staging_fd, os.O_RDWR))
        try:
            return PipedLoad(self.name, staging, pacer, faults, self._profile, size_bytes, reset)
        except OSError:
            staging.close()
            raise

    def _begin_save(self) -> Session:
        state, size_bytes = self._home.state, self._home.state.size
        is_plain = not (self._opening.is_shaped or self._opening.faults.in_stream("read"))
        # Of a small state a descriptor that is dead at once is worth more than speed.
        if is_plain and not self._profile.header_bytes:
            data_fd = OwnedFd(reopened(state.fd, os.O_RDONLY))
            return PlainSave(self.name, data_fd, size_bytes, self._precopy_info)
        self._session = session = self._piped_save()
        session.append([Segment(state.fd, 0, size_bytes)], None)
        return session

    def _begin_precopy(self) -> Session:
        state = self._home.state
        self._session = session = self._piped_save()
        self._precopy = PrecopySource(self._parameters, state.fd, state.size, session)
        self._precopy.start()
        return session

    def _piped_save(self) -> PipedSave:
        opening = self._opening
        return PipedSave(
            self.name,
            Pacer(opening.bandwidth, opening.latency_ns, opening.chunk or PIPE_BYTES),
            opening.chunk,
            opening.faults.in_stream("read"),
            self._precopy_info,
            self._reset_underneath,
        )

    def _precopy_info(self) -> PrecopyInfo:
        with self._device():
            if self._session is None:
                raise os_error(errno.ENODEV)
            met = self._meet("info")
            if self._precopy is None or self._home.device_state is S.STOP_COPY:
                raise os_error(errno.EINVAL)
            if met is Action.GARBAGE:
                return PrecopyInfo(2**64 - 1, 2**64 - 1)
            if met is Action.REINIT:
                return self._precopy.start_over()._replace(reinit=self._wants_reinit)
            return self._precopy.info()

    def _reset_underneath(self) -> None:
        # Any thread: the reset itself waits for the lock, or for the next request.
        self._is_reset = True

    def _reset(self) -> None:
        self._is_reset = self._is_stopped = False
        self._end_session()
        self._home.state.discard_staging()
        if self._profile.reset_blanks:
            self._home.state.blank(self._profile, self._parameters.size)
        self._home.record(S.RUNNING)

    def _end_session(self) -> None:
        session, self._session = self._session, None
        precopy, self._precopy = self._precopy, None
        if session is not None:
            session.end()
        if precopy is not None:
            precopy.close()
