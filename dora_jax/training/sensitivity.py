"""How much a loss depends on each component of an adapter: AdaLoRA's scores (arXiv 2303.10512).

A tree "of factors" here is like the adapters, with `optax.MaskedNode` in place of other arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dora_jax.adapters.components import LowRank, count_stack_axes, low_rank_layers
from dora_jax.adapters.groups import array_names
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import Path

Axes = Mapping[Path, KernelAxes]


def start(adapters: Any) -> Any:
    """Returns the tree of factors of an adapter tree, with float32 zeros."""
    return _of_factors(lambda x: jnp.zeros_like(x, dtype=jnp.float32), adapters)


def smoothed(
    gradients: Any, adapters: Any, sensitivity: Any, uncertainty: Any, decays: tuple[float, float]
) -> tuple[Any, Any]:
    """Returns the sensitivity and the uncertainty of every entry after one more gradient.

    With `I = |w dL/dw|` in float32 (section 3.2 of the paper):

        sensitivity = beta_1 sensitivity + (1 - beta_1) I
        uncertainty = beta_2 uncertainty + (1 - beta_2) |I - sensitivity|

    Args:
      gradients, adapters: trees of one structure; the gradients are those at the adapters.
      sensitivity, uncertainty: trees of factors, before.
      decays: beta_1 and beta_2.
    """
    first, second = decays
    now = _of_factors(
        lambda g, w: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), gradients, adapters
    )
    sensitivity = jax.tree.map(lambda x, i: first * x + (1 - first) * i, sensitivity, now)
    uncertainty = jax.tree.map(
        lambda x, i, mean: second * x + (1 - second) * jnp.abs(i - mean),
        *(uncertainty, now, sensitivity),
    )
    return sensitivity, uncertainty


def mean_scores(sensitivity: Any, uncertainty: Any, axes: Axes | None) -> dict[Path, Any]:
    """Returns the score of every component, `(*stack, r)` float32 for each layer by path.

    It is the mean over the column of A, plus the mean over the row of B, of the sensitivity times
    the uncertainty: section 3.2 of the paper, without its term of the singular value.
    """
    products = low_rank_layers(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
    scores = {}
    for path, layer in products.items():
        stack = len(component_shape(path, layer, axes)) - 1
        of_a = jnp.mean(layer.lora_a, range(stack, np.ndim(layer.lora_a) - 1))
        scores[path] = of_a + jnp.mean(layer.lora_b, range(stack + 1, np.ndim(layer.lora_b)))
    return scores


def _of_factors(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps a function over the factors in trees of one structure, to a tree of factors."""

    def one(keys: Any, *leaves: Any) -> Any:
        of_factor = array_names(keys)[-1] in LowRank._fields
        return function(*leaves) if of_factor else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(one, tree, *others)


def component_shape(path: Path, layer: LowRank, axes: Axes | None) -> tuple[int, ...]:
    """Returns the shape of a layer's components, `(*stack, r)`."""
    return np.shape(layer.lora_b)[: count_stack_axes(path, layer, axes) + 1]
