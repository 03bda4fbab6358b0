"""Whether one device's state fits into another: every field that differs, and what is not known."""

from dataclasses import replace

import pytest

from vfiomig.fit import ALLOWED_FIELDS, Misfit, doubt, incompatible, misfits
from vfiomig.framing.manifest import DeviceEntry
from vfiomig.identity import Identity
from vfiomig.uapi import Capability

VF = Identity("mlx5_vfio_pci", "", "15b3", "101e", "15b3", "0058")
ALL = ("STOP_COPY", "P2P", "PRE_COPY")
SOURCE = DeviceEntry("0000:3b:00.2", VF, ALL, 1 << 20)
DESTINATION = replace(SOURCE, name="0000:86:00.3", stop_copy_length=None)


def test_two_of_a_kind_fit_whatever_their_names_and_sizes() -> None:
    assert misfits(SOURCE, DESTINATION) == ()
    assert doubt(SOURCE, DESTINATION) == ""


@pytest.mark.parametrize("field", Identity.__slots__)
def test_each_field_of_an_identity_counts_unless_it_is_allowed(field: str) -> None:
    other = replace(DESTINATION, identity=replace(VF, **{field: "other"}))
    found = misfits(SOURCE, other)
    assert found == (Misfit(field, getattr(VF, field), "other"),)
    assert misfits(SOURCE, other, allow=frozenset({field})) == ()
    assert misfits(SOURCE, other, allow=ALLOWED_FIELDS - {field}) == found


def test_all_that_differs_is_found_at_once_in_the_order_of_the_fields() -> None:
    other = DeviceEntry("b", Identity("xe-vfio-pci", "", "8086", "e20b"), ("STOP_COPY",))
    fields = [misfit.field for misfit in misfits(SOURCE, other)]
    assert fields == [
        "driver",
        "vendor_id",
        "device_id",
        "subsystem_vendor_id",
        "subsystem_device_id",
        "capabilities",
    ]


def test_another_protocol_cannot_be_allowed() -> None:
    found = misfits(SOURCE, replace(DESTINATION, protocol="v3"), allow=ALLOWED_FIELDS)
    assert found == (Misfit("protocol", "v2", "v3"),)
    assert incompatible([("a", "b", found)]).hint == ""


@pytest.mark.parametrize(
    ("needs", "has", "found"),
    [
        (Capability(0), ALL, ()),
        (Capability(0), ("STOP_COPY", "P2P"), (("STOP_COPY, P2P, PRE_COPY", "STOP_COPY, P2P"),)),
        (Capability.STOP_COPY, ("STOP_COPY",), ()),
        (Capability.P2P, ("STOP_COPY", "PRE_COPY"), (("P2P", "STOP_COPY, PRE_COPY"),)),
        (Capability.P2P, (), ()),  # nobody asked it: see doubt()
    ],
)
def test_the_destination_needs_what_is_asked_or_what_the_source_has(
    needs: Capability, has: tuple[str, ...], found: tuple[tuple[str, str], ...]
) -> None:
    other = replace(DESTINATION, capabilities=has)
    expected = tuple(Misfit("capabilities", *values) for values in found)
    assert misfits(SOURCE, other, needs=needs) == expected
    assert misfits(SOURCE, other, needs=needs, allow=frozenset({"capabilities"})) == ()


def test_a_destination_may_have_more_than_the_source() -> None:
    assert misfits(replace(SOURCE, capabilities=("STOP_COPY",)), DESTINATION) == ()


def test_what_is_not_told_is_a_doubt_and_no_misfit() -> None:
    silent = DeviceEntry("fd:9", Identity(""), ALL)
    assert misfits(SOURCE, silent) == misfits(silent, SOURCE) == ()
    sentence = "fd:9: the driver is not known: whether they fit is unchecked"
    assert doubt(SOURCE, silent) == doubt(silent, SOURCE) == sentence
    mute = replace(DESTINATION, capabilities=())
    assert "0000:86:00.3: the capabilities are not known" in doubt(SOURCE, mute)
    assert "fd:9 and fd:8: the driver" in doubt(silent, replace(silent, name="fd:8"))


def test_the_error_lists_every_pair_and_field_and_what_to_type() -> None:
    other = replace(DESTINATION, identity=replace(VF, driver="x", device_id="1017"))
    weak = replace(DESTINATION, name="vf2", capabilities=("STOP_COPY",))
    pairs = [("vf0", "there", misfits(SOURCE, other)), ("vf1", "well", ())]
    err = incompatible([*pairs, ("vf2", "weak", misfits(SOURCE, weak))])
    assert (err.code, err.device) == (12, "there, weak")
    assert str(err) == (
        "there does not fit vf0: its driver is 'x', not 'mlx5_vfio_pci', its device_id is '1017',"
        " not '101e'; weak does not fit vf2: it has STOP_COPY, and needs STOP_COPY, P2P, PRE_COPY"
    )
    assert err.hint == "if you know that it fits: --allow-mismatch driver,device_id,capabilities"
    assert err.fields == (
        ("driver", "mlx5_vfio_pci", "x"),
        ("device_id", "101e", "1017"),
        ("capabilities", "STOP_COPY, P2P, PRE_COPY", "STOP_COPY"),
    )
