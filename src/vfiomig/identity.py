"""What kind of device it is: what a stream says of its own, and what must match to load it."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """What a stream says of its device, and what a device must match to load it.

    driver: kernel driver, or "sim:PROFILE". model: mdev type or "". The ids are PCI's, as hex
    digits without 0x, "" elsewhere.
    """

    driver: str
    model: str = ""
    vendor_id: str = ""
    device_id: str = ""
    subsystem_vendor_id: str = ""
    subsystem_device_id: str = ""

    def differences(self, other: "Identity") -> list[str]:
        """Return the names of the fields that are not the same."""
        mine, theirs = asdict(self), asdict(other)
        return [field for field in mine if mine[field] != theirs[field]]
