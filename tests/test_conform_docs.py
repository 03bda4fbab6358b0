"""docs/conformance.md has every rule, in the words of the rule."""

from itertools import groupby
from pathlib import Path

from vfiomig.conform.catalog import all_rules
from vfiomig.conform.rule import GROUPS, RULES, Rule

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"


def row(rule: Rule) -> str:
    needs = ", ".join(need.name for need in rule.needs)
    cells = [f"`{rule.id}`", rule.text, rule.source, needs, rule.losing]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables() -> str:
    """The part of the page that follows from the rules."""
    rules = sorted(RULES.values(), key=lambda rule: GROUPS.index(rule.group))
    parts = []
    for group, members in groupby(rules, key=lambda rule: rule.group):
        head = f"### {group}\n\n| rule | text | source | needs | destructive, because |\n"
        parts.append(head + "|---|---|---|---|---|\n" + "\n".join(map(row, members)))
    return "\n\n".join(parts) + "\n"


def test_the_page_has_every_rule_in_its_own_words() -> None:
    assert tables() in PAGE.read_text()


def test_every_rule_has_a_name_a_sentence_and_a_source() -> None:
    assert len(all_rules()) == len(RULES)
    for rule in all_rules():
        assert rule.id == rule.id.lower().replace("_", "-").replace(" ", "-")
        assert rule.id not in GROUPS
        assert rule.text.endswith(".")
        assert rule.text[0].isupper() or rule.text.split()[0].islower(), rule.text
        assert rule.source
