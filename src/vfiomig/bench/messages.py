"""What the bench asks of its workers, and what they answer. Descriptors travel with a message."""

from dataclasses import dataclass

from vfiomig.bench.cases import Case
from vfiomig.bench.measure import Usage


@dataclass(frozen=True, slots=True)
class Open:
    """Open a device, and keep it by this key; answered by Opened. A receiver keeps one only."""

    key: int
    name: str


@dataclass(frozen=True, slots=True)
class Opened:
    """What the device says. digest: of its state, "" when two reads of it differ."""

    name: str
    device_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send the device of a key, into the descriptor that comes along; answered by Sent.

    words: a baseline's argv, else vfiomig saves. path: the file behind the descriptor. figures,
    names_its_file: see Baseline.
    """

    key: int
    case: Case
    path: str = ""
    words: tuple[str, ...] = ()
    figures: bool = False
    names_its_file: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent. device_bytes, digest, buffer_bytes: None and "" where nobody said."""

    usage: Usage
    device_bytes: int | None
    stream_bytes: int
    digest: str = ""
    buffer_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive from the descriptor that comes along; answered by Ready, and then Received.

    words: a C program's argv; raw: bytes without framing; else a stream of ours. hashing: also say
    the digest of what arrived where checking costs extra.
    """

    words: tuple[str, ...] = ()
    raw: bool = False
    hashing: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """The receiver is about to read."""


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived. digest: "" where it was not looked at."""

    usage: Usage
    device_bytes: int
    digest: str = ""
