"""Whether what arrived is what was sent: a wrong answer is never faster."""

from vfiomig.bench.cases import Case
from vfiomig.bench.messages import Opened, Received, Sent
from vfiomig.errors import MigrationError


class WrongBytesError(MigrationError):
    """Other bytes arrived than were sent: there is nothing to measure."""

    code = 7


def check(case: Case, device: Opened, sent: Sent, received: Received | None) -> None:
    """Raise WrongBytesError unless all that is known of one transfer agrees.

    A device whose state changes from read to read says nothing of what a tool should have copied.
    """
    told = [(f"{device.name} has", device.device_bytes, device.digest)] if device.digest else []
    if sent.device_bytes is not None:
        told.append(("the sender read", sent.device_bytes, sent.digest))
    if received is not None:
        told.append(("there arrived", received.device_bytes, received.digest))
    for index, (who, length, digest) in enumerate(told):
        for other_who, other_length, other_digest in told[index + 1 :]:
            what = f"{case.label} into {case.sink}: {who}"
            if length != other_length:
                raise WrongBytesError(f"{what} {length} bytes, {other_who} {other_length}")
            if digest and other_digest and digest != other_digest:
                raise WrongBytesError(f"{what} xxh3:{digest}, {other_who} xxh3:{other_digest}")
