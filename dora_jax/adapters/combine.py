"""Several adapter trees made one, or compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.groups import label_adapters
from dora_jax.adapters.trees import Tree, check_shapes, flatten, get_in, set_in, tree_shapes
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, Path, layer_name


def interpolate(trees: Sequence[Tree], weights: Sequence[float]) -> Any:
    """Returns the weighted mean of adapter trees, array by array: of checkpoints of one run.

    The product of mean factors is not the mean of the products: adapters trained apart are combined
    with `add_weighted`.

    Args:
      trees: adapter trees of one structure.
      weights: one for each tree, of sum 1. Magnitudes are norms, not changes of norms: under
        another sum they would be scaled.

    Raises:
      AdapterError: the trees differ in structure or shapes, are hoisted (a mean of scales is not
        the scale of the mean), or the weights do not sum to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> one, other = ({"query": {"magnitude": jnp.array([m])}} for m in (1.0, 3.0))
      >>> interpolate([one, other], [0.5, 0.5])
      {'query': {'magnitude': Array([2.], dtype=float32)}}
    """
    check_weights(trees, weights)
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise AdapterError(f"the weights must sum to 1, these sum to {sum(weights):g}")
    for tree in trees[1:]:
        check_shapes(tree, tree_shapes(trees[0]))
    label_adapters(trees[0])
    return jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *trees
    )


def add_weighted(
    trees: Sequence[Tree],
    weights: Sequence[float],
    config: DoRAConfig,
    stack_axes: Mapping[str, int] | None = None,
) -> tuple[Any, DoRAConfig]:
    """Returns one adapter that adds the weighted changes of several, and its configuration.

    Exact in the direction: `A` are joined along the rank and `w B` likewise, so that `A' B'` is
    `sum_i w_i A_i B_i`, of k times the rank. Magnitudes are their weighted mean. (PEFT's weighted
    sum leaves the magnitudes out, peft#3761.)

    Args:
      trees: adapter trees of one structure, trained from the same base.
      weights: one for each tree, of sum 1 (see `interpolate`).
      config: the configuration that all of them have.
      stack_axes: how many stack axes a layer has, by dotted path, where shapes do not tell it (a
        stack as long as the rank).

    Returns:
      The tree and the configuration with which the base is adapted to take it.

    Raises:
      AdapterError: structures or shapes differ, the ranks are not those of `config`, or the weights
        do not sum to 1.
    """
    if config.changes_product:
        raise AdapterError(
            f"adapters that started with init={config.init!r} act by what they changed, which does "
            "not join along the rank: merge each instead"
        )
    mean, k = interpolate(trees, weights), len(trees)
    joined: Any = mean
    for path in [path for path in flatten(mean) if path[-1] == "lora_a"]:
        layers = [get_in(tree, path[:-1], "the adapters") for tree in trees]
        if (rank := np.shape(layers[0]["lora_a"])[-1]) != config.layer_settings(path[:-1]).rank:
            raise AdapterError(
                f"{layer_name(path[:-1])}: the adapters have rank {rank}, the configuration "
                f"{config.layer_settings(path[:-1]).rank}; its scaling would not be theirs"
            )
        scaled = [w * layer["lora_b"] for w, layer in zip(weights, layers, strict=True)]
        stack = (stack_axes or {}).get(".".join(path[:-1]))
        if stack is None:
            stack = _count_stack_axes(layers[0], path[:-1])
        pair = {
            "lora_a": jnp.concatenate([layer["lora_a"] for layer in layers], axis=-1),
            "lora_b": jnp.concatenate(scaled, axis=stack),
        }
        joined = set_in(joined, path[:-1], {**get_in(joined, path[:-1]), **pair})
    alpha = math.sqrt(k) if config.use_rslora else k  # so that the scaling stays as it is
    wider = dataclasses.replace(
        config,
        rank=k * config.rank,
        alpha=alpha * config.alpha,
        rank_pattern={p: k * r for p, r in config.rank_pattern.items()},
        alpha_pattern={p: alpha * a for p, a in config.alpha_pattern.items()},
    )
    return joined, wider


def diff(one: Tree, other: Tree) -> dict[str, float]:
    """Returns `||x - y|| / max(||x||, ||y||)` for every array of two trees, by dotted path.

    Raises:
      AdapterError: the trees differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> diff({"query": {"magnitude": jnp.ones(3)}}, {"query": {"magnitude": jnp.ones(3)}})
      {'query.magnitude': 0.0}
    """
    check_shapes(other, tree_shapes(one))
    others = flatten(other)
    differences = {}
    for path, x in flatten(one).items():
        x, y = (np.asarray(v, np.float64) for v in (x, others[path]))
        largest = max(np.linalg.norm(x), np.linalg.norm(y))
        differences[".".join(path)] = float(np.linalg.norm(x - y) / largest) if largest else 0.0
    return differences


def check_weights(trees: Sequence[Tree], weights: Sequence[float]) -> None:
    if not trees or len(trees) != len(weights):
        raise AdapterError(
            f"need at least one adapter tree and a weight for each, got {len(trees)} trees and "
            f"{len(weights)} weights"
        )


def _count_stack_axes(layer: Tree, path: Path) -> int:
    """Returns how many stack axes lead `lora_a (*stack, *in, r)` and `lora_b (*stack, r, *out)`."""
    a, b = (np.shape(layer[name]) for name in ("lora_a", "lora_b"))
    fits = [n for n in range(min(len(a), len(b)) - 1) if (*a[:n], a[-1]) == b[: n + 1]]
    if len(fits) != 1:
        raise AdapterError(
            f"{layer_name(path)}: the shapes {a} of lora_a and {b} of lora_b do not tell how many "
            "axes are stack; pass stack_axes"
        )
    return fits[0]
