"""Regular expressions over dotted paths, matched without backtracking.

Patterns come out of files that others wrote. Python's `re` tries one way after another, so that
`(([a-z.]+)+)+!` takes longer than anyone waits for. Here all ways are followed at once: a part of a
pattern turns the set of places where it may start into the set of places where it may end, as in
Thompson's construction (1968). The time is a polynomial of the lengths, and bounded besides.

Python's parser reads the patterns. What only makes sense with an order of trying is refused:
back-references, conditions, atomic groups and possessive quantifiers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from dora_jax.errors import ConfigError
from dora_jax.patterns.characters import Character, category_test, character_test

# The work for one name, in parts of the pattern and places in the name: some 0.1 s. A published
# pattern of 500 characters takes 2,000 on a path of 60.
_MOST_STEPS = 300_000
# Python's parser reads 100,000 characters in 0.4 s.
LONGEST = 200_000

Places = frozenset[int]
Part = Callable[["_Name", Places], Places]


class Pattern:
    r"""A regular expression, in Python's syntax.

    Args:
      pattern: the expression.
      field: that holds it, for the errors.

    Raises:
      ConfigError: it is no regular expression, or one of a kind that is not read; names the field.

    Example:
      >>> Pattern(r".*\.(query|value)", "target_modules").fullmatch("layers.0.query")
      True
    """

    def __init__(self, pattern: str, field: str) -> None:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        self._where = f"{field}: {shown!r}"
        if len(pattern) > LONGEST:
            raise ConfigError(f"{self._where} has more than {LONGEST:,} characters: name layers")
        try:
            parsed = parser.parse(pattern)
            self._part = _sequence(parsed, parsed.state.flags)
            self._plain = _plain(list(parsed), parsed.state.flags)
        except _UnreadError as error:
            raise ConfigError(
                f"{self._where} has {error}, which is not read: list names"
            ) from error
        except RecursionError as error:
            raise ConfigError(f"{self._where} is nested too deeply: list names") from error
        except (re.error, OverflowError) as error:
            raise ConfigError(f"{self._where} is not a regular expression: {error}") from error

    def ends(self, name: str, starts: Iterable[int] = (0,)) -> Places:
        """Returns where matches that begin at some places of a name may end.

        Raises:
          ConfigError: the pattern takes too long; names the field.
        """
        try:
            return self._part(_Name(name), frozenset(starts))
        except _TooLongError as error:
            raise ConfigError(
                f"{self._where} takes too long to match {name[:200]!r}: list names"
            ) from error

    def fullmatch(self, name: str) -> bool:
        """Returns whether the pattern matches a whole name; raises as `ends`."""
        return len(name) in self.ends(name)

    def matches_end(self, name: str) -> bool:
        r"""Returns whether the pattern matches a name, or what follows one of its dots.

        This is `(.*\.)?(PATTERN)$`; raises as `ends`.
        """
        if self._plain is not None:
            whole, text = self._plain
            return name == text or (not whole and name.endswith(f".{text}"))
        return len(name) in self.ends(name, (0, *(i + 1 for i, c in enumerate(name) if c == ".")))


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str, field: str) -> Pattern:
    """Returns a `Pattern`, the same for the same arguments."""
    return Pattern(pattern, field)


class _UnreadError(Exception):
    """A construct that is not read; the text names it."""


class _TooLongError(Exception):
    """A match takes too many steps."""


class _Name:
    """A name that is matched, and the steps that are left."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = _MOST_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _TooLongError


def _plain(parsed: Sequence[tuple[Any, Any]], flags: int) -> tuple[bool, str] | None:
    """Returns whether a pattern starts with `^`, and the text that is all else; None if it is not.

    Such patterns are many where every layer has a rank of its own.
    """
    whole = bool(parsed) and parsed[0] == (ops.AT, ops.AT_BEGINNING)
    rest = parsed[whole:]
    if flags & (re.IGNORECASE | re.MULTILINE) or any(op is not ops.LITERAL for op, _ in rest):
        return None
    return whole, "".join(chr(value) for _, value in rest)


def _sequence(parsed: Iterable[tuple[Any, Any]], flags: int) -> Part:
    """Returns the part for parts one after another."""
    parts: list[Part] = []
    text = ""
    for op, value in parsed:
        if op is ops.LITERAL and not flags & re.IGNORECASE:
            text += chr(value)
            continue
        if text:
            parts.append(_words([text]))
            text = ""
        parts.append(_part(op, value, flags))
    if text:
        parts.append(_words([text]))

    def match(name: _Name, places: Places) -> Places:
        for part in parts:
            if not places:
                break
            name.spend(1 + len(places))
            places = part(name, places)
        return places

    return match


def _part(op: Any, value: Any, flags: int) -> Part:
    """Returns the part for one node of Python's parser."""
    if (character := character_test(op, value, flags)) is not None:
        return _one(character)
    if op is ops.AT:
        return _at(value, flags)
    if op is ops.SUBPATTERN:
        _, added, dropped, inner = value
        return _sequence(inner, (flags | added) & ~dropped)
    if op is ops.BRANCH:
        return _branch(value[1], flags)
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        least, most, inner = value
        return _repeat(least, most, inner, flags)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        direction, inner = value
        return _look(direction, inner, flags, wanted=op is ops.ASSERT)
    if op is getattr(ops, "FAILURE", None):
        return lambda name, places: frozenset()
    kinds = {"GROUPREF": "a back-reference", "GROUPREF_EXISTS": "a condition"}
    raise _UnreadError(kinds.get(str(op), "an atomic group or a possessive quantifier"))


def _words(words: Sequence[str]) -> Part:
    """Returns the part for one of several texts."""
    known = frozenset(words)
    lengths = sorted({len(word) for word in known})

    def match(name: _Name, places: Places) -> Places:
        text = name.text
        name.spend(len(lengths) * len(places))
        return frozenset(p + n for p in places for n in lengths if text[p : p + n] in known)

    return match


def _one(character: Character) -> Part:
    """Returns the part for one character."""

    def match(name: _Name, places: Places) -> Places:
        text = name.text
        return frozenset(p + 1 for p in places if p < len(text) and character(text[p]))

    return match


def _branch(branches: Sequence[Any], flags: int) -> Part:
    """Returns the part for alternatives; those that are plain texts are looked up together."""
    words, parts = [], []
    for branch in branches:
        if not flags & re.IGNORECASE and all(op is ops.LITERAL for op, _ in branch):
            words.append("".join(chr(value) for _, value in branch))
        else:
            parts.append(_sequence(branch, flags))
    if words:
        parts.append(_words(words))

    def match(name: _Name, places: Places) -> Places:
        return frozenset().union(*(part(name, places) for part in parts))

    return match


def _repeat(least: int, most: Any, inner: Any, flags: int) -> Part:
    """Returns the part for a repetition: at least and at most so many times."""
    part = _sequence(inner, flags)
    limit = None if most is ops.MAXREPEAT else int(most)

    def match(name: _Name, places: Places) -> Places:
        for _ in range(least):
            before, places = places, part(name, places)
            if not places or places == before:  # then no further repetition changes them
                break
        reached, new = set(places), places
        count = least
        while new and (limit is None or count < limit):
            new = part(name, new).difference(reached)
            reached |= new
            count += 1
        return frozenset(reached)

    return match


def _look(direction: int, inner: Any, flags: int, *, wanted: bool) -> Part:
    """Returns the part for what must follow or precede a place, or must not."""
    part = _sequence(inner, flags)
    width = inner.getwidth()[0] if direction < 0 else 0  # the parser allows a fixed one alone

    def holds(name: _Name, place: int) -> bool:
        if direction > 0:
            return bool(part(name, frozenset((place,))))
        return place >= width and place in part(name, frozenset((place - width,)))

    def match(name: _Name, places: Places) -> Places:
        return frozenset(p for p in places if holds(name, p) == wanted)

    return match


def _at(kind: Any, flags: int) -> Part:
    """Returns the part for an anchor."""
    is_word = category_test(ops.CATEGORY_WORD, flags)
    lines = bool(flags & re.MULTILINE)

    def holds(text: str, place: int) -> bool:
        end = len(text)
        if kind in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            line = lines and kind is ops.AT_BEGINNING
            return place == 0 or (line and text[place - 1] == "\n")
        if kind is ops.AT_END_STRING:
            return place == end
        if kind is ops.AT_END:
            last = place == end - 1 or lines
            return place == end or (last and text[place] == "\n")
        before, after = place > 0 and is_word(text[place - 1]), place < end and is_word(text[place])
        return (before != after) == (kind is ops.AT_BOUNDARY)

    return lambda name, places: frozenset(p for p in places if holds(name.text, p))
