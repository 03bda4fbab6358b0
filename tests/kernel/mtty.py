"""The kernel's sample device mtty, by hand: its state as bytes, and the registers of its UARTs.

Source: samples/vfio-mdev/mtty.c of Linux 6.12. Only single bytes of BAR0 and BAR1 are touched:
behind any other access to its BARs the sample driver reads and writes memory that is not its own.
"""

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vfiomig import ioctl, sysfs, uapi
from vfiomig.backends import kernel
from vfiomig.device import Device
from vfiomig.uapi import DeviceState

# struct mtty_data: magic, major, minor, number of ports, flags; then struct serial_port of each.
HEADER = struct.Struct("<QIIII")
MAGIC = 0x7E9D09898C3E2C4E
PORT_BYTES = 36
PORTS = {"mtty-1": 1, "mtty-2": 2}

# Registers of a 16550A (include/uapi/linux/serial_reg.h), and where they are in serial_port.
RX_TX, LCR, MCR, LSR, SCRATCH = 0, 3, 4, 5, 7
_LSR_DATA_READY = 1
_FIFO_AT, _HEAD_AT, _COUNT_AT, _DEPTH_AT, _FIFO_DEPTH = 8, 24, 26, 33, 16

_VFIO_DEVICE_GET_REGION_INFO = uapi.VFIO_DEVICE_GET_INFO + 1
# vfio_region_info: argsz, flags, index, cap_offset, size, offset.
_REGION_INFO = struct.Struct("=IIIIQQ")


@dataclass(frozen=True)
class Port:
    """What is compared of one port. fifo: bytes received and not yet read, 15 at most."""

    scratch: int = 0
    lcr: int = 0
    mcr: int = 0
    fifo: bytes = b""

    def encode(self) -> bytes:
        """Return its struct serial_port."""
        raw = bytearray(PORT_BYTES)
        raw[LCR], raw[MCR], raw[SCRATCH] = self.lcr, self.mcr, self.scratch
        raw[_FIFO_AT : _FIFO_AT + len(self.fifo)] = self.fifo
        raw[_HEAD_AT] = raw[_COUNT_AT] = len(self.fifo)
        raw[_DEPTH_AT] = _FIFO_DEPTH
        return bytes(raw)


def state_bytes(ports: Sequence[Port]) -> bytes:
    """Return the state of a device with such ports, as its data_fd gives and takes it."""
    return HEADER.pack(MAGIC, 1, 0, len(ports), 0) + b"".join(port.encode() for port in ports)


# What the devices hold when a test begins. LCR: 8N1 and 7E1; MCR: DTR and RTS, and these in a loop.
SOURCE = (Port(0x51, 0x03, 0x03, b"ping"), Port(0x52, 0x1A, 0x13, b"pong"))
DESTINATION = (Port(0xD1, fifo=b"old"), Port(0xD2))


class Registers:
    """The UART registers of an open device. Borrows the device_fd."""

    def __init__(self, device_fd: int, ports: int) -> None:
        self._fd, self._ports = device_fd, ports
        self._offsets = [self._region_offset(bar) for bar in range(ports)]

    def _region_offset(self, index: int) -> int:
        arg = bytearray(_REGION_INFO.size)
        _REGION_INFO.pack_into(arg, 0, len(arg), 0, index, 0, 0, 0)
        fcntl.ioctl(self._fd, _VFIO_DEVICE_GET_REGION_INFO, arg)
        *_, size, offset = _REGION_INFO.unpack(arg)
        assert size == 8, f"BAR{index} has {size} bytes"
        return int(offset)

    def read(self, port: int, register: int) -> int:
        """Read one register; reading RX_TX takes a byte out of the FIFO."""
        return os.pread(self._fd, 1, self._offsets[port] + register)[0]

    def write(self, port: int, register: int, value: int) -> None:
        """Write one register."""
        assert os.pwrite(self._fd, bytes([value]), self._offsets[port] + register) == 1

    def drain(self, port: int) -> bytes:
        """Take out of the FIFO what is in it."""
        taken = bytearray()
        while self.read(port, LSR) & _LSR_DATA_READY:
            taken.append(self.read(port, RX_TX))
        return bytes(taken)

    def ports(self) -> list[Port]:
        """Return what every port holds; the FIFOs are empty afterwards."""
        return [
            Port(
                self.read(port, SCRATCH),
                self.read(port, LCR),
                self.read(port, MCR),
                self.drain(port),
            )
            for port in range(self._ports)
        ]

    @property
    def scratch(self) -> list[int]:
        """The scratch registers, which nothing but a write or a load changes."""
        return [self.read(port, SCRATCH) for port in range(self._ports)]


@dataclass(frozen=True)
class OpenMtty:
    """A device that is open. device_fd stays the device's."""

    device: Device
    device_fd: int
    registers: Registers

    def install(self, ports: Sequence[Port]) -> None:
        """Put the device into RUNNING with these registers, by the bare ioctls."""
        if ioctl.get_device_state(self.device_fd) is not DeviceState.RUNNING:
            ioctl.reset_device(self.device_fd)
        data_fd = ioctl.set_device_state(self.device_fd, DeviceState.RESUMING)
        state = state_bytes(ports)
        assert os.write(data_fd, state) == len(state)
        os.close(data_fd)
        assert ioctl.set_device_state(self.device_fd, DeviceState.RUNNING) == -1


@dataclass(frozen=True)
class Mtty:
    """A device of the lab. kind: its mdev type."""

    uuid: str
    kind: str

    @property
    def size(self) -> int:
        """Bytes of its whole state."""
        return HEADER.size + PORT_BYTES * PORTS[self.kind]

    @property
    def group(self) -> str:
        """The number of its IOMMU group."""
        return sysfs.find(self.uuid).iommu_group

    @contextmanager
    def opened(self) -> Iterator[OpenMtty]:
        """Open it through vfiomig. Nobody else can, meanwhile."""
        host = sysfs.find(self.uuid)
        ops = kernel.open_ops(host)
        device_fd = ops.fileno()
        with Device(host.name, kernel.identity_of(host), ops) as device:
            yield OpenMtty(device, device_fd, Registers(device_fd, PORTS[self.kind]))

    def state(self) -> DeviceState:
        """Open it, and return the state it is in."""
        with self.opened() as mtty:
            return mtty.device.state()

    def ports(self) -> list[Port]:
        """Open it, and return what its ports hold; the FIFOs are empty afterwards."""
        with self.opened() as mtty:
            return mtty.registers.ports()

    def is_untouched(self, ports: Sequence[Port]) -> bool:
        """Whether it is RUNNING, and its ports hold these."""
        return (self.state(), self.ports()) == (DeviceState.RUNNING, list(ports))
