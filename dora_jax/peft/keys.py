"""The keys of the tensors in a PEFT file."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

Kind = Literal["linear", "conv", "embedding"]
PREFIX = "base_model.model."

KEYS: dict[Kind, dict[str, str]] = {
    "linear": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    "conv": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    "embedding": {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"},
}

for _keys in KEYS.values():
    _keys["magnitude"] = "lora_magnitude_vector"

_MAGNITUDE = "lora_magnitude_vector"

_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    f"{_MAGNITUDE}.weight",  # as the parameter is called in PEFT; files have it without
    _MAGNITUDE,
)


def by_module(
    tensors: Mapping[str, Array],
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Returns the adapters' tensors by module and part, and those of modules saved whole."""
    layers: dict[str, dict[str, Array]] = collections.defaultdict(dict)
    extra = {}
    for key, x in tensors.items():
        module, found, part = key.removeprefix(PREFIX).partition(".lora_")
        if found:
            layers[module][part.removesuffix(".weight")] = x
        else:
            extra[module] = x
    return dict(layers), extra
