"""What a data_fd of a live device does, and does not: the facts that the copy loop is built on."""

import errno
import fcntl
import os
import select
from functools import partial

import pytest

from contract.driving import outcome, read_to_end, write_all
from kernel.mtty import HEADER, SOURCE, Mtty, OpenMtty, state_bytes
from vfiomig import DeviceStateError, OutOfSyncError, StaleChannelError, ioctl
from vfiomig.backends import borrow
from vfiomig.channel import DataChannel
from vfiomig.fd import OwnedFd
from vfiomig.uapi import DeviceState as S


def begun(mtty: OpenMtty, state: S) -> DataChannel:
    channel = mtty.device.set_state(state)
    assert channel is not None
    return channel


def test_it_is_an_anonymous_file_that_does_not_survive_exec(source: Mtty) -> None:
    with source.opened() as mtty:
        for state in (S.STOP_COPY, S.RESUMING):
            data_fd = begun(mtty, state).fileno()
            assert os.readlink(f"/proc/self/fd/{data_fd}") == "anon_inode:mtty_mig"
            assert fcntl.fcntl(data_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_it_gives_the_whole_state_and_then_nothing_for_ever(source: Mtty) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, S.STOP_COPY)
        assert read_to_end(channel) == state_bytes(SOURCE)
        assert [os.read(channel.fileno(), 100) for _ in range(3)] == [b""] * 3


def test_it_cannot_be_spliced_nor_sent(source: Mtty) -> None:
    read_fd, write_fd = os.pipe()
    with OwnedFd(read_fd), OwnedFd(write_fd), source.opened() as mtty:
        data_fd = begun(mtty, S.STOP_COPY).fileno()
        assert outcome(lambda: os.splice(data_fd, write_fd, 4096)) == errno.EINVAL
        assert outcome(lambda: os.sendfile(write_fd, data_fd, None, 4096)) == errno.EINVAL
        # Neither took a byte.
        assert len(os.read(data_fd, 4096)) == source.size
        data_fd = begun(mtty, S.RESUMING).fileno()
        os.write(write_fd, b"x")
        assert outcome(lambda: os.splice(read_fd, data_fd, 1)) == errno.EINVAL


def test_it_cannot_be_waited_for(source: Mtty) -> None:
    with source.opened() as mtty, select.epoll() as epoll:
        for state in (S.STOP_COPY, S.RESUMING):
            data_fd = begun(mtty, state).fileno()
            assert outcome(partial(epoll.register, data_fd)) == errno.EPERM


def test_it_has_no_positions(source: Mtty) -> None:
    with source.opened() as mtty:
        data_fd = begun(mtty, S.STOP_COPY).fileno()
        assert outcome(lambda: os.lseek(data_fd, 0, os.SEEK_SET)) == errno.ESPIPE
        assert outcome(lambda: os.pread(data_fd, 1, 0)) == errno.ESPIPE


def test_stop_copy_asked_for_twice_gives_one_session(source: Mtty) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, S.STOP_COPY)
        assert ioctl.set_device_state(mtty.device_fd, S.STOP_COPY) == -1
        assert mtty.device.set_state(S.STOP_COPY) is None
        assert read_to_end(channel) == state_bytes(SOURCE)


def test_precopy_gives_its_header_and_stop_copy_the_rest_of_one_stream(source: Mtty) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, S.PRE_COPY)
        assert channel.precopy_info().initial_bytes == HEADER.size
        header = read_to_end(channel)
        assert channel.precopy_info().initial_bytes == 0
        assert mtty.device.set_state(S.STOP_COPY) is channel
        rest = read_to_end(channel)
    assert (len(header), len(rest)) == (24, 72)
    assert header + rest == state_bytes(SOURCE)


@pytest.mark.parametrize("state", [S.PRE_COPY, S.PRE_COPY_P2P])
def test_precopy_info_is_there_until_stop_copy(source: Mtty, state: S) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, state)
        channel.precopy_info()
        mtty.device.set_state(S.STOP_COPY)
        assert outcome(channel.precopy_info) == errno.EINVAL


def test_precopy_info_is_no_request_to_a_loading_session(source: Mtty) -> None:
    with source.opened() as mtty:
        assert outcome(begun(mtty, S.RESUMING).precopy_info) == errno.ENOTTY


@pytest.mark.parametrize("state", [S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY, S.RESUMING])
def test_a_reset_ends_the_session_under_it(source: Mtty, state: S) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, state)
        with OwnedFd(os.dup(channel.fileno())) as kept:
            mtty.device.reset()
            with pytest.raises(StaleChannelError):
                channel.fileno()
            if state is S.RESUMING:
                assert outcome(lambda: os.write(kept.fileno(), b"x")) == errno.ENODEV
            else:
                assert outcome(lambda: os.read(kept.fileno(), 1)) == errno.ENODEV
        assert mtty.registers.ports() == list(SOURCE)


def test_the_last_close_of_the_device_ends_the_session_under_it(source: Mtty) -> None:
    with source.opened() as mtty:
        kept = OwnedFd(os.dup(begun(mtty, S.STOP_COPY).fileno()))
    with kept:
        assert outcome(lambda: os.read(kept.fileno(), 1)) == errno.ENODEV


def test_a_session_that_follows_a_reset_by_somebody_else_is_refused(source: Mtty) -> None:
    with source.opened() as mtty, borrow(f"fd:{mtty.device_fd}") as other:
        begun(mtty, S.STOP_COPY)
        other.reset()
        with pytest.raises(OutOfSyncError) as caught:
            mtty.device.set_state(S.STOP_COPY)
        assert (caught.value.errno, caught.value.code) == (errno.EBADF, 6)
        assert mtty.device.recover(S.RUNNING) is S.RUNNING
        assert mtty.device.state() is S.RUNNING


def test_a_state_that_is_too_short_is_not_committed(source: Mtty) -> None:
    with source.opened() as mtty:
        channel = begun(mtty, S.RESUMING)
        write_all(channel, state_bytes(SOURCE)[:-1])
        with pytest.raises(DeviceStateError) as caught:
            mtty.device.set_state(S.STOP)
        assert (caught.value.errno, caught.value.code) == (errno.EINVAL, 6)
        assert (caught.value.wanted, caught.value.actual) == (S.STOP, S.RESUMING)
        assert mtty.device.recover(S.RUNNING) is S.RUNNING


def test_more_than_a_state_is_refused_by_the_write(source: Mtty) -> None:
    with source.opened() as mtty:
        data_fd = begun(mtty, S.RESUMING).fileno()
        assert outcome(lambda: os.write(data_fd, bytes(source.size + 1))) == errno.ENOMEM
