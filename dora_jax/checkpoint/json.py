"""Values as JSON, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from dora_jax.errors import AdapterError


def encode_json(value: Any, name: str = "metadata") -> Any:
    """Returns a value as JSON types, with bytes as `{"bytes": base64}`.

    Raises:
      AdapterError: a value would not come back as it is, apart from tuples; names it.

    Example:
      >>> decode_json(encode_json({"position": b"12"}))
      {'position': b'12'}
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [encode_json(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: encode_json(v, f"{name}[{k!r}]") for k, v in value.items()}
    raise AdapterError(
        f"{name} holds a {type(value).__name__}, which JSON cannot hold: use dicts with strings as "
        "keys, lists, numbers, strings and bytes; pass arrays in the state"
    )


def decode_json(value: Any) -> Any:
    """Returns the value that `encode_json` was given, with lists in place of tuples."""
    if isinstance(value, list):
        return [decode_json(v) for v in value]
    if isinstance(value, dict):
        if list(value) == ["bytes"] and isinstance(value["bytes"], str):
            return base64.b64decode(value["bytes"])
        return {k: decode_json(v) for k, v in value.items()}
    return value
