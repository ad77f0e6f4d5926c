"""The parts of a pattern that match one character: letters, sets and classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from re import _constants as ops  # type: ignore[attr-defined]
from typing import Any

Character = Callable[[str], bool]


def character_test(op: Any, value: Any, flags: int) -> Character | None:
    """Returns the test of a node that matches one character; None for another node."""
    if op is ops.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if op is ops.LITERAL:
        return _literal(value, flags)
    if op is ops.NOT_LITERAL:
        return _negated(_literal(value, flags))
    if op is ops.IN:
        negated = bool(value) and value[0][0] is ops.NEGATE
        tests = [_member(inner, what, flags) for inner, what in value[negated:]]

        def any_of(c: str) -> bool:
            return any(test(c) for test in tests)

        return _negated(any_of) if negated else any_of
    return None


def _member(op: Any, value: Any, flags: int) -> Character:
    """Returns the test of a member of a set in brackets."""
    if op is ops.LITERAL:
        return _literal(value, flags)
    if op is ops.CATEGORY:
        return category_test(value, flags)
    low, high = value

    def within(c: str) -> bool:
        return any(low <= ord(one) <= high for one in _cases(c, flags))

    return within


def _literal(code: int, flags: int) -> Character:
    wanted = chr(code)
    return lambda c: wanted in _cases(c, flags)


def _negated(test: Character) -> Character:
    return lambda c: not test(c)


def _cases(c: str, flags: int) -> tuple[str, ...]:
    """Returns a character, and its other case if that does not matter."""
    if not flags & re.IGNORECASE:
        return (c,)
    return tuple(one for one in (c, c.lower(), c.upper()) if len(one) == 1)


def category_test(kind: Any, flags: int) -> Character:
    """Returns the test of a class such as a digit."""
    name = str(kind).removeprefix("CATEGORY_")
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.removeprefix("NOT_")]
    letter = letter.upper() if name.startswith("NOT_") else letter
    matches = re.compile(rf"\{letter}", flags & re.ASCII).match
    return lambda c: matches(c) is not None
