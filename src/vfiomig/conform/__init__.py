"""Whether a driver keeps the migration contract: rules that are run against a real device.

A group of rules is a file. docs/conformance.md lists them all.
"""

from vfiomig.conform.result import ArcTime, Conformance, RuleResult, Verdict
from vfiomig.conform.run import conform

__all__ = ["ArcTime", "Conformance", "RuleResult", "Verdict", "conform"]
