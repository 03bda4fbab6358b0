"""Manifests, from nobody who is to be trusted: what is refused, and what is kept as it is."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stream_oracle as oracle
from vfiomig._fastcopy import StreamReader
from vfiomig.errors import StreamError
from vfiomig.fd import OwnedFd
from vfiomig.framing import manifest
from vfiomig.framing.manifest import DeviceEntry, Manifest
from vfiomig.identity import Identity
from vfiomig.incoming import open_incoming

Filled = Callable[[bytes], OwnedFd]
SOUND = json.dumps(oracle.manifest())


def read(filled: Filled, text: bytes) -> Manifest:
    with filled(oracle.write([], text)) as file:
        incoming = open_incoming(StreamReader(file.fileno(), 4096), 1 << 40)
        incoming.transfer(-1)
        assert incoming.manifest is not None
        return incoming.manifest


def edited(**changes: Any) -> bytes:  # noqa: ANN401
    return json.dumps({**oracle.manifest(), **changes}).encode()


def device(**changes: Any) -> bytes:  # noqa: ANN401
    return edited(devices=[{**oracle.manifest()["devices"][0], **changes}])


def without(name: str) -> bytes:
    plain = oracle.manifest()
    for place in (plain, plain["devices"][0], plain["devices"][0]["identity"]):
        place.pop(name, None)
    return json.dumps(plain).encode()


def tiny(devices: int) -> bytes:
    plain = oracle.manifest(devices)
    return json.dumps(plain, separators=(",", ":")).encode()


def nested(depth: int) -> bytes:
    """Return a sound manifest with a field that brings its nesting to depth."""
    return edited(later=json.loads("[" * (depth - 1) + "1" + "]" * (depth - 1)))


HOSTILE = {
    "nothing": b"\0",
    "no JSON": b"{",
    "a second value": SOUND.encode() + b"{}",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
    "lists 30000 deep": b"[" * 30_000 + b"]" * 30_000,
    "objects 10000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "one level too deep": nested(9),
    "an integer of 60000 digits": SOUND[:-1].encode() + b',"n":' + b"9" * 60_000 + b"}",
    "2**64": edited(n=2**64),
    "a negative number": edited(n=-1),
    "a fraction": edited(n=0.5),
    "a whole fraction": SOUND[:-1].encode() + b',"n":1.0}',
    "an exponent": SOUND[:-1].encode() + b',"n":1e3}',
    "NaN": edited(n=float("nan")),
    "infinity": edited(n=float("inf")),
    "minus infinity": edited(n=float("-inf")),
    "a name twice": SOUND[:-1].encode() + b',"tool":"other"}',
    "an unknown name twice": SOUND[:-1].encode() + b',"x":{"a":1,"a":1}}',
    "a name twice, once escaped": SOUND[:-1].encode() + rb',"\u0074ool":"other"}',
    "invalid UTF-8": SOUND.encode().replace(b"oracle", b"\xff\xfe"),
    "UTF-8 of a surrogate": SOUND.encode().replace(b"oracle", b"\xed\xa0\x80"),
    "half a surrogate pair": SOUND.encode().replace(b"oracle", rb"\ud800"),
    "half a surrogate pair as a name": SOUND[:-1].encode() + rb',"\udfff":1}',
    "a byte order mark": b"\xef\xbb\xbf" + SOUND.encode(),
    "UTF-16": SOUND.encode("utf-16"),
    "no devices": edited(devices=[]),
    "257 devices": tiny(257),
    "300 devices": tiny(300),
    "devices that are no list": edited(devices={"0": {}}),
    "a device that is no object": edited(devices=["x"]),
    "a device that is null": edited(devices=[None]),
    "no time": without("created"),
    "a time that is a number": edited(created=0),
    "no tool": without("tool"),
    "no devices at all": without("devices"),
    "no name": without("name"),
    "a name that is a list": device(name=["x"]),
    "no protocol": without("protocol"),
    "protocol v1": device(protocol="v1"),
    "no capabilities": without("capabilities"),
    "capabilities as text": device(capabilities="STOP_COPY"),
    "capabilities that are numbers": device(capabilities=[1]),
    "capabilities that are null": device(capabilities=[None]),
    "a length that is text": device(stop_copy_length="1"),
    "a length that is true": device(stop_copy_length=True),
    "no identity": without("identity"),
    "an identity that is null": device(identity=None),
    "no driver": without("driver"),
    "no subsystem": without("subsystem_device_id"),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_is_wrong_is_refused(filled: Filled, text: bytes) -> None:
    with pytest.raises(StreamError) as failure:
        read(filled, text)
    assert failure.value.code == 7
    assert len(str(failure.value)) < 500
    with pytest.raises(oracle.Refused):
        oracle.read(oracle.write([], text))


SOUND_ONES = {
    "as deep as it may be": nested(8),
    "names of a later version": device(later={"a": [True, None, 2**64 - 1, "x"]}),
    "256 devices": tiny(256),
    "the largest length": device(stop_copy_length=2**64 - 1),
    "spaces": json.dumps(oracle.manifest(), indent=4).encode(),
}


@pytest.mark.parametrize("text", SOUND_ONES.values(), ids=SOUND_ONES.keys())
def test_a_manifest_that_is_right_is_read(filled: Filled, text: bytes) -> None:
    described = oracle.read(oracle.write([], text)).manifest
    found = read(filled, text)
    assert [entry.name for entry in found.devices] == [d["name"] for d in described["devices"]]


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "a\0b", "‮", "\r\n", "x" * 5000])
def test_control_characters_are_kept_as_data(filled: Filled, name: str) -> None:
    found = read(filled, device(name=name))
    assert found.devices[0].name == name


def test_more_than_64_kib_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(StreamError, match="a manifest of 65537 bytes"):
        manifest.decode(b" " * 65_537, 128)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
manifests = st.builds(
    Manifest,
    texts,
    texts,
    st.lists(
        st.builds(
            DeviceEntry,
            texts,
            st.builds(Identity, texts, texts, texts, texts, texts, texts),
            st.lists(st.sampled_from(["STOP_COPY", "P2P", "PRE_COPY"])).map(tuple),
            st.none() | st.integers(0, 2**64 - 1),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
)


@given(manifests)
def test_what_is_encoded_is_decoded(described: Manifest) -> None:
    assert manifest.decode(described.encode(), 0) == described


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["created", "tool", "devices", "x"]), json_values))
def test_any_json_is_decoded_or_refused(plain: dict[str, Any]) -> None:
    with contextlib.suppress(StreamError):
        manifest.decode(json.dumps(plain).encode(), 0)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StreamError):
        manifest.decode(data, 0)


@pytest.mark.parametrize(("field", "value"), [("driver", "x"), ("model", "y"), ("device_id", "1")])
def test_identities_differ_by_field(field: str, value: str) -> None:
    one = Identity("mlx5", "m", "15b3", "101e")
    assert one.differences(Identity(**dict.fromkeys(Identity.__slots__, ""))) == [
        "driver",
        "model",
        "vendor_id",
        "device_id",
    ]
    other = Identity(**{**{name: getattr(one, name) for name in Identity.__slots__}, field: value})
    assert one.differences(other) == [field]
    assert one.differences(one) == []
