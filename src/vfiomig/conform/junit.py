"""A check as JUnit XML, the form that build servers read."""

from vfiomig.conform.result import Conformance, RuleResult, Verdict

_NS_PER_S = 1_000_000_000


def junit_xml(found: Conformance) -> bytes:
    """Return the document: a test suite, in which each rule is a test case of its group."""
    from xml.etree import ElementTree

    element = ElementTree.SubElement
    totals = {
        "name": "vfiomig conform",
        "tests": str(len(found.results)),
        "failures": str(found.how_many(Verdict.FAIL)),
        "skipped": str(found.how_many(Verdict.SKIP)),
        "errors": "0",
        "time": _seconds(found.duration_ns),
    }
    root = ElementTree.Element("testsuites")
    suite = element(root, "testsuite", totals)
    properties = element(suite, "properties")
    for name, value in _properties(found).items():
        element(properties, "property", {"name": name, "value": _legal(value)})
    for result in found.results:
        tag, attributes, text = _outcome(result)
        case = element(suite, "testcase", _case(result))
        element(case, tag, attributes).text = text
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _properties(found: Conformance) -> dict[str, str]:
    values = {
        "device": found.device,
        "driver": found.driver,
        "capabilities": ", ".join(found.capabilities),
        "destructive": "yes" if found.destructive else "no",
    }
    for arc in found.arcs:
        way = f"{arc.before.name} -> {arc.wanted.name}" + " by reset" * (arc.by == "reset")
        values[f"median of {way}, ns"] = str(arc.median_ns)
    return values | ({"lost": found.lost} if found.lost else {})


def _case(result: RuleResult) -> dict[str, str]:
    time_s = _seconds(result.duration_ns)
    return {"classname": f"conform.{result.group}", "name": result.id, "time": time_s}


def _outcome(result: RuleResult) -> tuple[str, dict[str, str], str | None]:
    """Return the element that says what became of a rule: tag, attributes, text."""
    message, words = {"message": _legal(result.seen)}, _legal(_words(result))
    if result.verdict is Verdict.FAIL:
        return "failure", message, words
    if result.verdict is Verdict.SKIP:
        return "skipped", message, None
    return "system-out", {}, f"{result.verdict}: {words}"


def _words(result: RuleResult) -> str:
    lines = [result.text, f"source: {result.source}", f"seen: {result.seen}"]
    if result.did:
        lines.append("did: " + ", ".join(result.did))
    if result.aftermath:
        lines.append(f"afterwards: {result.aftermath}")
    return "\n".join(lines)


def _seconds(duration_ns: int) -> str:
    return f"{duration_ns / _NS_PER_S:.6f}"


def _legal(text: str) -> str:
    """Return text with what XML cannot hold escaped: a name may have any character in it."""
    kept = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(kept)
