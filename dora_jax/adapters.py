"""Adapter trees: nested dicts by module path, the same for Linen and NNX."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.config import AdapterError, DoRAConfig, Path, layer_name
from dora_jax.optim import GROUPS, label_adapters
from dora_jax.trees import Tree, get_in, set_in

if TYPE_CHECKING:
    from jax.typing import DTypeLike


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


def cast_adapters(adapters: Tree, dtype: DTypeLike) -> Any:
    """Returns the tree with every floating array cast to a dtype.

    A magnitude is best kept in float32 while it is trained: see `DoRAConfig.adapter_dtype`.

    Raises:
      AdapterError: the dtype is not a floating one, in which most adapters would be zero.

    Example:
      >>> import jax.numpy as jnp
      >>> cast_adapters({"query": {"magnitude": jnp.ones(3)}}, jnp.bfloat16)["query"][
      ...     "magnitude"
      ... ].dtype
      dtype(bfloat16)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise AdapterError(f"adapters are cast to a floating dtype, got {jnp.dtype(dtype).name}")

    def cast(x: Any) -> Any:
        return jnp.asarray(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(cast, adapters)


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
    _check_weights(trees, weights)
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
        if (rank := np.shape(layers[0]["lora_a"])[-1]) != config.spec(path[:-1]).rank:
            raise AdapterError(
                f"{layer_name(path[:-1])}: the adapters have rank {rank}, the configuration "
                f"{config.spec(path[:-1]).rank}; its scaling would not be theirs"
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


def stack_adapters(trees: Sequence[Tree]) -> Any:
    """Returns adapter trees of one structure as one, its leaves `(adapters, ...)`.

    Raises:
      AdapterError: the trees differ in structure or shapes.
    """
    _check_weights(trees, [0.0] * len(trees))
    for tree in trees[1:]:
        check_shapes(tree, tree_shapes(trees[0]))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def select_adapters(stacked: Tree, index: Any) -> Any:
    """Returns the adapters of each example: leaves `(adapters, ...)` become `(*index, ...)`.

    An index out of range, a negative one too, gives NaN, not another adapter.

    Raises:
      AdapterError: the index is not of integers.
    """
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise AdapterError(f"adapters are selected by integers, got an index of {index.dtype}")

    def select(leaf: Any) -> Any:
        number = np.shape(leaf)[0]
        return jnp.take(leaf, jnp.where(index < 0, number, index), axis=0, mode="fill")

    return jax.tree.map(select, stacked)


def check_index(index: Any, inputs: Sequence[Any]) -> None:
    """Raises `AdapterError` unless there is one index for each example of a batch."""
    shape = np.shape(index)
    for x in inputs:
        if len(shape) != 1 or np.shape(x)[:1] != shape:
            raise AdapterError(
                f"every example needs the index of its adapter: the index has shape {shape}, an "
                f"input has shape {np.shape(x)}, batch first"
            )


def disable(adapters: Tree, bases: Mapping[Path, Tree]) -> Any:
    """Returns the tree with which adapted layers compute what their frozen kernels do.

    Args:
      adapters: an adapter tree, hoisted or not.
      bases: what each layer keeps of its kernel, by module path.
    """
    disabled: Any = adapters
    for path, base in bases.items():
        layer = get_in(disabled, path, "the adapters")
        start = {"lora_b": 0, "scale": 0, "magnitude": base["norm"]}
        if "start_a" in base:
            start |= {"lora_a": base["start_a"], "lora_b": base["start_b"]}
        new = {
            name: jnp.broadcast_to(start[name], np.shape(x)).astype(x.dtype)
            for name, x in layer.items()
            if name in start
        }
        disabled = set_in(disabled, path, {**layer, **new})
    return disabled


def warn_of_rounding(lost: Mapping[Path, Any], stacklevel: int = 3) -> None:
    """Warns of what merging cost: the share of each layer's change that its dtype rounds away."""
    shares = {p: float(s) for p, s in lost.items() if not isinstance(s, jax.core.Tracer)}
    rounded = {path: share for path, share in shares.items() if share > 1e-3}
    if rounded:
        worst = max(rounded, key=lambda path: rounded[path])
        warnings.warn(
            f"merging rounds to the kernels' dtype: {len(rounded)} of {len(shares)} layers lose "
            f"some of their change, {layer_name(worst)} the most ({rounded[worst]:.1%}). Where "
            "that is too much, keep the adapters, or merge into float32 kernels",
            stacklevel=stacklevel,
        )


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


def _check_weights(trees: Sequence[Tree], weights: Sequence[float]) -> None:
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
