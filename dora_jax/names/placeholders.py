"""Dotted names with placeholders, such as `layers.{i}.mlp`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ANY_PATH = "{*}"
"""A placeholder for one or more parts of a name."""
_PLACEHOLDER = re.compile(r"\{(\w+|\*)\}")


def join(*parts: str) -> str:
    """Joins the parts that are not empty with dots."""
    return ".".join(part for part in parts if part)


def placeholders(name: str) -> list[str]:
    """Returns the placeholders of a name, in order.

    Example:
      >>> placeholders("layers.{i}.experts.{e}.up")
      ['i', 'e']
    """
    return _PLACEHOLDER.findall(name)


def fill(name: str, values: Mapping[str, Any]) -> str:
    """Returns a name with values in place of its placeholders; those without a value stay.

    Example:
      >>> fill("layers.{i}.experts.{e}.up", {"i": 3})
      'layers.3.experts.{e}.up'
    """
    return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), name)


def pattern(name: str, *, optional: bool) -> re.Pattern[str]:
    """Returns a regular expression that matches a name with a dot at its end.

    Args:
      name: a name with placeholders.
      optional: whether a placeholder that is a whole part of the name may be absent.
    """
    parts = []
    for part in name.split("."):
        if part == ANY_PATH:
            parts.append(r"(?P<rest>.+)\.")
            continue
        number = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(part)) + r"\."
        whole = optional and re.fullmatch(r"\{\w+\}", part)
        parts.append(f"(?:{number})?" if whole else number)
    return re.compile("".join(parts))


def match_values(match: re.Match[str]) -> dict[str, str]:
    """Returns the values that a match of `pattern` found, by placeholder."""
    found = {name: value for name, value in match.groupdict().items() if value is not None}
    return {"*" if name == "rest" else name: value for name, value in found.items()}
