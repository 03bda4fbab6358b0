"""Addresses of a session: what is taken, how it is printed, and what is refused with a hint."""

import pytest

from vfiomig import UsageError
from vfiomig.live.address import Address, parse_address

GOOD = {
    "tcp:host:1": Address("tcp", "host", 1),
    "tcp:10.0.0.2:4444": Address("tcp", "10.0.0.2", 4444),
    "tcp:[::1]:4444": Address("tcp", "::1", 4444),
    "tcp:[fe80::1%eth0]:4444": Address("tcp", "fe80::1%eth0", 4444),
    "tcp:127.0.0.1:0": Address("tcp", "127.0.0.1", 0),
    "unix:/run/x.sock": Address("unix", path="/run/x.sock"),
    "unix:x:y": Address("unix", path="x:y"),
    "vsock:2:4444": Address("vsock", "2", 4444),
    "fd:3": Address("fd", fd=3),
    "-": Address("stdio"),
}


@pytest.mark.parametrize("text", GOOD)
def test_an_address_is_taken_apart_and_printed_the_same(text: str) -> None:
    assert parse_address(text) == GOOD[text]
    assert str(parse_address(text)) == text


def test_without_a_host_it_is_this_one() -> None:
    assert str(parse_address("tcp::4444")) == "tcp:127.0.0.1:4444"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:4444",
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp:host:70000",
        "tcp:host:x",
        "tcp:host:-1",
        "tcp:::1:4444",
        "tcp:[::1:4444",
        "http://host",
        "unix:",
        "unix:a\0b",
        "unix:" + "x" * 108,
        "vsock:host:1",
        "vsock:2",
        "vsock:4294967296:1",
        "fd:",
        "fd:-1",
        "fd:x",
        "--",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert caught.value.hint or "at most 107 bytes" in str(caught.value)


def test_only_descriptors_are_open_already() -> None:
    assert [text for text in GOOD if parse_address(text).is_open] == ["fd:3", "-"]
