"""Adapter trees: nested dicts by module path, the same for Linen and NNX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dora_jax.config import AdapterError, Path
from dora_jax.optim import GROUPS, label_adapters


def count_parameters(adapters: Any) -> dict[str, int]:
    """Returns the number of trainable parameters in each group of an adapter tree, and in all.

    Example:
      >>> import jax.numpy as jnp
      >>> count_parameters({"query": {"lora_a": jnp.ones((4, 2)), "magnitude": jnp.ones(3)}})
      {'lora_a': 8, 'lora_b': 0, 'magnitude': 3, 'saved': 0, 'total': 11}
    """
    counts = dict.fromkeys(GROUPS, 0)
    labels = jax.tree.leaves(label_adapters(adapters))
    for leaf, label in zip(jax.tree.leaves(adapters), labels, strict=True):
        counts[label] += math.prod(np.shape(leaf))
    return {**counts, "total": sum(counts.values())}


def flatten(adapters: Mapping[str, Any]) -> dict[Path, Any]:
    """Returns the arrays of an adapter tree by path.

    Example:
      >>> flatten({"query": {"magnitude": 1.0}})
      {('query', 'magnitude'): 1.0}
    """
    leaves = jax.tree_util.tree_flatten_with_path(dict(adapters))[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def tree_shapes(adapters: Mapping[str, Any]) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every array of an adapter tree by path."""
    return {path: np.shape(leaf) for path, leaf in flatten(adapters).items()}


def check_shapes(adapters: Mapping[str, Any], wanted: Mapping[Path, tuple[int, ...]]) -> None:
    """Raises `AdapterError` if arrays are missing, unknown or of another shape; names each."""
    given = tree_shapes(adapters)
    problems = [f"missing {'.'.join(p)}" for p in wanted if p not in given]
    problems += [f"unknown {'.'.join(p)}" for p in given if p not in wanted]
    problems += [
        f"{'.'.join(p)} has shape {given[p]}, the model needs {shape}"
        for p, shape in wanted.items()
        if p in given and given[p] != shape
    ]
    if problems:
        raise AdapterError("the adapters are of another model: " + "; ".join(problems))
