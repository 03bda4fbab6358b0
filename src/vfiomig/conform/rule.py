"""What a rule is, and the list of all of them."""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from vfiomig.backends import is_borrowed
from vfiomig.conform.subject import Subject
from vfiomig.uapi import Capability

Check = Callable[[Subject], None]

# In the order they are run in, those that are not destructive before those that are.
GROUPS = (
    "features",
    "paths",
    "save",
    "pre-copy",
    "data-fd",
    "dma-logging",
    "refusals",
    "load",
    "reset",
    "owners",
)


class Need(Enum):
    """What a rule needs; the value is why it is skipped without."""

    P2P = "the device has no P2P"
    PRE_COPY = "the device has no PRE_COPY"
    KERNEL = "a simulated device has no ioctls, and its data_fd is a file or a pipe"
    NAME = "the device was not opened by its name"
    DMA_LOGGING = "the device has no DMA logging (or its kernel has not)"

    def is_met(self, subject: Subject) -> bool:
        """Whether the device has it. Raises OSError."""
        match self:
            case Need.P2P:
                return bool(subject.capabilities & Capability.P2P)
            case Need.PRE_COPY:
                return bool(subject.capabilities & Capability.PRE_COPY)
            case Need.KERNEL:
                return subject.device_fd != -1
            case Need.NAME:
                name = subject.device.opened_as
                return bool(name) and not is_borrowed(name)
            case Need.DMA_LOGGING:
                return subject.has_dma_logging


class Rule(NamedTuple):
    """One rule. text: in a sentence. source: header and symbol, file of the kernel, or measured.

    losing: why it may lose the device's state, or "". Then it is run only where that is allowed.
    """

    id: str
    group: str
    text: str
    source: str
    needs: tuple[Need, ...]
    losing: str
    check: Check

    @property
    def destructive(self) -> bool:
        """Whether it may lose the device's state, or leave it to a reset."""
        return bool(self.losing)


# Every rule, by its id, in the order in which they were entered; catalog.py enters them all.
RULES: dict[str, Rule] = {}


def rule(
    name: str, *, group: str, text: str, source: str, needs: Iterable[Need] = (), losing: str = ""
) -> Callable[[Check], Check]:
    """Enter a function into the list of rules, with the fields of Rule."""

    def enter(check: Check) -> Check:
        assert name not in RULES
        assert group in GROUPS
        RULES[name] = Rule(name, group, text, source, tuple(needs), losing, check)
        return check

    return enter
