"""Checks of the values that the fields of `DoRAConfig` take; each error names the field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from dora_jax.errors import ConfigError
from dora_jax.patterns import LONGEST, compiled

ALL_LINEAR = "all-linear"


def module_patterns(field: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    """Normalises a selection: a regular expression stays a string, names become a tuple."""
    if isinstance(value, str):
        if value != ALL_LINEAR:
            check_regex(field, value)
        return value
    names = entries(field, value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{field} must hold non-empty strings, got {name!r}")
    return tuple(name.replace("/", ".") for name in names)


def entries(field: str, value: Any) -> tuple[Any, ...]:
    """Returns the entries of a list; a string or a dict is none."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{field} must be a list, got {value!r}")
    return tuple(value)


def pattern_dict(field: str, value: Any) -> dict[str, Any]:
    """Returns a dict whose keys are patterns."""
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ConfigError(f"{field} must be a dict with patterns for keys, got {value!r:.200}")
    if sum(map(len, value)) > LONGEST:
        raise ConfigError(f"{field}: the keys have more than {LONGEST:,} characters in all")
    return dict(value)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; an integer that no float holds is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_positive(field: str, value: Any) -> None:
    """Raises `ConfigError` unless a value is a finite number above 0."""
    if not (is_number(value) and value > 0):
        raise ConfigError(f"{field} must be a finite number above 0, got {value!r}")


def is_index(value: Any) -> bool:
    """Returns whether a value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_rank(field: str, rank: Any) -> None:
    """Raises `ConfigError` unless a rank is an integer of at least 0."""
    if not is_index(rank):
        raise ConfigError(f"{field} must be an integer of at least 0, got {rank!r}")


def check_regex(field: str, pattern: str) -> None:
    """Raises `ConfigError` unless a pattern is a regular expression that is read."""
    compiled(pattern, field)


def float_dtype_name(dtype: Any) -> str:
    """Returns the name of a floating dtype."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise ConfigError(f"adapter_dtype is not a dtype: {dtype!r}") from error
    if not jnp.issubdtype(jnp.dtype(name), jnp.floating):
        raise ConfigError(f"adapter_dtype must be a floating dtype, got {name}")
    return name
