"""JSON of untrusted peers, read strictly: whole numbers, no name twice, not nested deep."""

import json
from typing import Any

# Ours: a manifest is nested 4 deep, a message of a session 5.
MAX_DEPTH = 8
_MAX_INTEGER = (1 << 64) - 1


def loads(data: bytes) -> Any:  # noqa: ANN401  JSON: what it is, field() finds out
    """Parse JSON in UTF-8. Raises ValueError for what is none, or not as strict as this.

    Numbers are whole and within 0 … 2**64 - 1, every name stands once in its object, nothing is
    nested more than MAX_DEPTH deep, and every text can be encoded. The caller limits the length.
    """
    try:
        plain = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError as err:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from err
    _check_depth(plain, MAX_DEPTH)
    # Half a surrogate pair is no text: it could not even be printed. UnicodeEncodeError.
    json.dumps(plain, ensure_ascii=False).encode()
    return plain


def field(plain: object, name: str, kind: type) -> Any:  # noqa: ANN401  checked right here
    """Return a field of a parsed object. Raises ValueError if it is missing or no kind."""
    value = plain.get(name) if isinstance(plain, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is missing or is no {kind.__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _integer(text: str) -> int:
    # Twenty digits hold 2**64; int() of a longer text takes time that grows with its square.
    if len(text) > 20 or not 0 <= int(text) <= _MAX_INTEGER:
        raise ValueError(f"a number of {len(text)} characters is out of range")
    return int(text)


def _no_number(text: str) -> Any:  # noqa: ANN401  the signature json.loads asks for
    raise ValueError(f"{text[:20]} is no whole number")


def _check_depth(value: object, depth: int) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if depth == 0:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        for item in value:
            _check_depth(item, depth - 1)
