"""Adapter trees combined into one, or compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.components import LowRank, count_stack_axes
from dora_jax.adapters.groups import label_adapters
from dora_jax.adapters.origin import check_origin, common_origins, origin, remember
from dora_jax.adapters.trees import (
    Tree,
    boxed_like,
    check_shapes,
    flatten,
    get_in,
    set_in,
    tree_shapes,
    unboxed,
)
from dora_jax.config import OUTPUT_FIELDS, DoRAConfig, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.processes import spans_processes
from dora_jax.selection import is_in_saved_module


def interpolate(trees: Sequence[Tree], weights: Sequence[float]) -> Any:
    """Returns the weighted mean of adapter trees, array by array.

        [{"up": {"lora_a": A0}}, {"up": {"lora_a": A1}}]  ->  {"up": {"lora_a": w0 A0 + w1 A1}}

    Use it for checkpoints of one run. For adapters of different runs use `add_weighted`, because
    the product of mean factors is not the mean of the products.

    Args:
      trees: adapter trees of one structure.
      weights: one for each tree; their sum is 1. Another sum would scale the magnitudes, which are
        norms and not changes of norms.

    Raises:
      AdapterError: the trees differ in structure or shapes, or are known to be of other settings,
        such as alphas (see `rescale`); the weights do not sum to 1, or the trees hold precomputed
        scales (a mean of scales is not the scale of the mean).

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
    known = common_origins([flatten(tree) for tree in trees])
    mean = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)),
        *map(unboxed, trees),
    )
    remember(flatten(mean), known)
    return boxed_like(mean, trees[0])


def add_weighted(
    trees: Sequence[Tree],
    weights: Sequence[float],
    config: DoRAConfig,
    axes: Mapping[Path, KernelAxes] | None = None,
) -> tuple[Any, DoRAConfig]:
    """Returns one adapter that adds the weighted changes of several, and its configuration.

        k trees of    {"up": {"lora_a": (in, r),     "lora_b": (r, out),     "magnitude": (out,)}}
        -> one tree   {"up": {"lora_a": (in, k * r), "lora_b": (k * r, out), "magnitude": (out,)}}

    The low-rank product is exactly `sum_i w_i A_i B_i`: the `A_i` are concatenated along the rank,
    and so are the `w_i B_i`. The magnitude is the weighted mean. (PEFT's weighted sum leaves the
    magnitudes out, peft#3761.)

    Args:
      trees: adapter trees of one structure, trained from the same base.
      weights: one for each tree; their sum is 1 (see `interpolate`).
      config: the configuration of all the trees.
      axes: of the kernels, by module path: `dora_jax.model.layer_axes(model)`, or
        `dora_jax.checkpoint.read_adapters(path).axes`. Needed only where the shapes of the factors
        do not show which axes are stacked.

    Returns:
      The tree, and the configuration with which to adapt a base for it.

    Raises:
      AdapterError: structures or shapes differ, the ranks are not those of `config`, the weights do
        not sum to 1, or the shapes of a layer that is not in `axes` do not show its stack axes.
    """
    if config.changes_product:
        raise AdapterError(
            f"adapters initialised with init={config.init_name!r} cannot be added, because only "
            "the change from their initial values counts: merge each instead"
        )
    boxes, trees = trees[:1], [unboxed(tree) for tree in trees]
    joined: Any = interpolate(trees, weights)
    for path in [path[:-1] for path in flatten(joined) if path[-1] == "lora_a"]:
        layers = [get_in(tree, path, "the adapters") for tree in trees]
        rank, own = np.shape(layers[0]["lora_a"])[-1], config.layer_settings(path).rank
        if rank != own:
            raise AdapterError(
                f"{layer_name(path)}: the adapters have rank {rank}, the configuration {own}; pass "
                "the configuration that they were trained with"
            )
        wanted = origin(config.layer_settings(path), changes_product=False)
        check_origin(flatten(trees[0]), {path: wanted})
        first = LowRank(layers[0]["lora_a"], layers[0]["lora_b"])
        stack = count_stack_axes(path, first, axes)
        pair = _join_factors(layers, weights, stack)
        joined = set_in(joined, path, {**get_in(joined, path), **pair})
    return boxed_like(joined, *boxes), _with_rank_times(config, len(trees))


def rescale(adapters: Tree, config: DoRAConfig, to: DoRAConfig) -> Any:
    """Returns adapters for a model of another alpha, in which they compute what they did before.

    `lora_b` is multiplied by `s / s'`, the scalings (`alpha / rank`) of the two.

    Args:
      adapters: an adapter tree.
      config: the configuration that it was trained with.
      to: the configuration of the model.

    Raises:
      AdapterError: the configurations differ in more than the scaling, or the product `A B` did not
        start at zero; names the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"up": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}}
      >>> wide, narrow = (DoRAConfig(rank=2, alpha=alpha, decompose=False) for alpha in (8, 2))
      >>> float(rescale(tree, wide, narrow)["up"]["lora_b"][0, 0])
      4.0
    """
    rescaled: Any = unboxed(adapters)
    for path, x in flatten(adapters).items():
        if path[-1] != "lora_b" or is_in_saved_module(config, path):
            continue
        layer, own, other = path[:-1], *(c.layer_settings(path[:-1]) for c in (config, to))
        for field in OUTPUT_FIELDS:
            if field != "scaling" and getattr(own, field) != getattr(other, field):
                raise AdapterError(
                    f"{layer_name(layer)}: the adapters have {field} {getattr(own, field)}, the "
                    f"model has {getattr(other, field)}: adapt it with their configuration"
                )
        if own.scaling != other.scaling and (config.changes_product or to.changes_product):
            raise AdapterError(
                f"{layer_name(layer)}: only the change of its product counts (init), which has no "
                "other scaling: adapt the model with the configuration of the adapters"
            )
        rescaled = set_in(rescaled, path, x * (own.scaling / other.scaling))
    return boxed_like(rescaled, adapters)


def _join_factors(
    layers: Sequence[Tree], weights: Sequence[float], stack: int
) -> dict[str, jax.Array]:
    """Returns the factors of several adapters of a layer, concatenated along the rank."""
    scaled = [w * layer["lora_b"] for w, layer in zip(weights, layers, strict=True)]
    return {
        "lora_a": jnp.concatenate([layer["lora_a"] for layer in layers], axis=-1),
        "lora_b": jnp.concatenate(scaled, axis=stack),
    }


def _with_rank_times(config: DoRAConfig, k: int) -> DoRAConfig:
    """Returns a configuration of k times the rank, with the same scaling."""
    alpha = math.sqrt(k) if config.use_rslora else k
    many = dataclasses.replace(
        config,
        rank=k * config.rank,
        alpha=alpha * config.alpha,
        rank_pattern={p: k * r for p, r in config.rank_pattern.items()},
        alpha_pattern={p: alpha * a for p, a in config.alpha_pattern.items()},
    )
    return TrainedConfig.of(many)


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
        apart, *lengths = _lengths(x, others[path])
        differences[".".join(path)] = apart / max(lengths) if max(lengths) else 0.0
    return differences


def _lengths(one: Any, other: Any) -> list[float]:
    """Returns `||x - y||`, `||x||` and `||y||`, in float64 where one process has both."""
    if spans_processes(one) or spans_processes(other):
        return list(map(float, _lengths_on_devices(one, other)))
    x, y = (np.asarray(v, np.float64) for v in (one, other))
    return [float(np.linalg.norm(v)) for v in (x - y, x, y)]


@jax.jit
def _lengths_on_devices(one: jax.Array, other: jax.Array) -> list[jax.Array]:
    x, y = (v.astype(jnp.float32) for v in (one, other))
    return [jnp.sqrt(jnp.sum(jnp.square(v))) for v in (x - y, x, y)]


def check_weights(trees: Sequence[Tree], weights: Sequence[float]) -> None:
    """Raises `AdapterError` unless there is at least one tree, and a weight for each."""
    if not trees or len(trees) != len(weights):
        raise AdapterError(
            f"need at least one adapter tree and a weight for each, got {len(trees)} trees and "
            f"{len(weights)} weights"
        )
