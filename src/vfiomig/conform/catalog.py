"""All rules: to import this room is to enter them into the list."""

from collections.abc import Sequence

from vfiomig.conform import (
    descriptors,
    dma_logging,
    dma_reports,
    features,
    loading,
    owners,
    paths,
    precopy,
    refusals,
    resets,
    saving,
)
from vfiomig.conform.rule import GROUPS, RULES, Rule
from vfiomig.errors import UsageError

# Imported for what they enter.
_FILES = (
    features,
    paths,
    saving,
    precopy,
    descriptors,
    dma_logging,
    dma_reports,
    refusals,
    loading,
    resets,
    owners,
)


def all_rules() -> tuple[Rule, ...]:
    """Return the rules in the order they are run in."""
    order = list(RULES)

    def place(rule: Rule) -> tuple[bool, int, int]:
        return rule.destructive, GROUPS.index(rule.group), order.index(rule.id)

    return tuple(sorted(RULES.values(), key=place))


def select(only: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules that only names, by id or group; all without one. Raises UsageError."""
    for name in only:
        if name not in GROUPS and name not in RULES:
            near = [known for known in (*GROUPS, *RULES) if known.startswith(name[:4])]
            hint = f"perhaps {', '.join(near[:3])}?" if near else "vfiomig conform --list"
            raise UsageError(f"no rule and no group {name!r}", hint=hint)
    wanted = set(only)
    return tuple(rule for rule in all_rules() if not wanted or {rule.id, rule.group} & wanted)
