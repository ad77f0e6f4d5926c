"""Checks of the values that the fields of `DoRAConfig` take; each error names the field."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.errors import ConfigError, Path
from dora_jax.patterns import LONGEST, compiled

ALL_LINEAR = "all-linear"
T = TypeVar("T")

# The words of Hugging Face PEFT's LoraConfig that are other ones here, and what to write instead.
_WORDS_OF_PEFT = {
    "r": "rank for r",
    "lora_alpha": "alpha for lora_alpha",
    "lora_dropout": "dropout for lora_dropout",
    "use_dora": "decompose for use_dora, which is True without it",
    "init_lora_weights": "init for init_lora_weights",
    "bias": "modules_to_save for bias, which trains modules whole",
    "layer_replication": "a model of that depth for layer_replication",
} | {
    name: f"nothing for {name}"
    for name in (
        *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
        *("fan_in_fan_out", "auto_mapping", "peft_version"),
    )
}


def with_words_of_peft(config_class: type[T]) -> type[T]:
    """Makes a configuration class answer PEFT's words with its own."""
    made: Any = config_class
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        if answer := answer_to(fields):
            raise ConfigError(answer)
        init(self, *args, **fields)

    made.__init__ = checked
    return config_class


def answer_to(fields: Iterable[str]) -> str:
    """Returns what to write in place of PEFT's words among the names of fields; "" without any."""
    words = [_WORDS_OF_PEFT[name] for name in fields if name in _WORDS_OF_PEFT]
    if not words:
        return ""
    return f"these are words of PEFT's. Write {'; '.join(words)}. dora_jax.peft reads PEFT folders"


def python_value(field: str, value: Any) -> Any:
    """Returns numbers, strings and lists of Python's for those of NumPy and JAX, inside too."""
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(f"{field} is traced: make the configuration outside of jax.jit")
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {python_value(field, k): python_value(field, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        inner = [python_value(field, v) for v in value]
        return inner if isinstance(value, list) else tuple(inner)
    return value


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
    return tuple(python_value(field, entry) for entry in value)


def name_or_names(field: str, value: Any) -> str | tuple[str, ...] | None:
    """Returns a name or several, dotted; None for none."""
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else entries(field, value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{field} must be a name such as 'layers', or several, got {value!r}")
    dotted = tuple(name.replace("/", ".") for name in names)
    return dotted[0] if len(dotted) == 1 else dotted


def ends_in(name: str, suffix: str) -> bool:
    """Returns whether a dotted name is another one, or ends in it; slashes count as dots."""
    name = name.replace("/", ".")
    return name == suffix or name.endswith("." + suffix)


def numbered_place(path: Path, names: Iterable[str] | None) -> tuple[Path, int] | None:
    """Returns the first number in a path, of those that follow one of the names, and its place."""
    for i, part in enumerate(path):
        if match := re.fullmatch(r"(?:(.*)_)?(\d{1,18})", part):
            before = path[:i] + ((match[1],) if match[1] else ())
            if names is None or any(ends_in(".".join(before), name) for name in names):
                return before, int(match[2])
    return None


def pattern_matches(pattern: str, name: str) -> bool:
    """Returns whether a key of `rank_pattern` or `alpha_pattern` matches a dotted path."""
    return compiled(pattern, "rank_pattern or alpha_pattern").matches_end(name)


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


def is_integer(value: Any) -> bool:
    """Returns whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_index(value: Any) -> bool:
    """Returns whether a value is an integer of at least 0."""
    return is_integer(value) and value >= 0


def check_rank(field: str, rank: Any) -> None:
    """Raises `ConfigError` unless a rank is an integer of at least 0."""
    if not is_index(rank):
        raise ConfigError(f"{field} must be an integer of at least 0, got {rank!r}")


def check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless a value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{field} must be one of {allowed}, got {value!r}")


def check_boolean(field: str, value: Any) -> None:
    """Raises `ConfigError` unless a value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field} must be True or False, got {value!r}")


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
