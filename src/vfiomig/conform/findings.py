"""What a rule says of a device: what it saw, what deviates, what is worth knowing."""

import errno
from collections.abc import Iterable

from vfiomig.conform.streams import Log


class SkipRule(Exception):
    """The rule cannot be asked of this device; the text says why."""


class Findings:
    """What one rule has found so far."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the rule before."""
        self.log = Log()
        self._seen: list[str] = []
        self.deviations: list[str] = []
        self.notes: list[str] = []

    @property
    def seen(self) -> str:
        """All that was seen, what is wrong first."""
        return "; ".join([*self.deviations, *self.notes, *self._seen])

    def saw(self, text: str) -> None:
        """Say what the device answered."""
        self._seen.append(text)

    def note(self, text: str) -> None:
        """Say something legal that a user of the device should know."""
        self.notes.append(text)

    def deviates(self, text: str) -> None:
        """Say what breaks the rule; the rule goes on."""
        self.deviations.append(text)

    def expect(self, kept: bool, text: str) -> bool:  # noqa: FBT001  expect(this, or_say_that)
        """Say text as a deviation unless kept. Returns kept."""
        if not kept:
            self.deviates(text)
        return kept

    def expect_error(self, found: int, wanted: Iterable[int], what: str) -> bool:
        """Expect a request to fail with one of wanted; 0 is success."""
        names = " or ".join(map(errno_name, wanted))
        kept = found in wanted
        if kept:
            self.saw(f"{what}: {errno_name(found)}")
        else:
            self.deviates(f"{what}: {errno_name(found)}, not {names}")
        return kept


def errno_name(number: int) -> str:
    """Return "EIO" for its number, "success" for 0."""
    if number == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # VFIO's word; Python's is ENOTSUP
    return errno.errorcode.get(number, f"errno {number}") if number else "success"
