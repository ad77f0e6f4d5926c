"""Adapter trees: nested dicts by module path, the same for Linen and NNX."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

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
