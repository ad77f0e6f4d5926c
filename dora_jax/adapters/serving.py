"""Adapter trees stacked, selected for each example of a batch, or switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.combine import check_weights
from dora_jax.adapters.origin import common_origins, remember
from dora_jax.adapters.placement import own_array
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
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import AdapterError, Path


def stack_adapters(trees: Sequence[Tree]) -> Any:
    """Returns adapter trees of one structure stacked to one tree.

        [{"up": {"magnitude": (out,)}}, ...]  ->  {"up": {"magnitude": (adapters, out)}}

    Raises:
      AdapterError: the trees differ in structure or shapes, or are known to be of different
        settings, such as alphas: see `rescale`.
    """
    check_weights(trees, [0.0] * len(trees))
    for tree in trees[1:]:
        check_shapes(tree, tree_shapes(trees[0]))
    known = common_origins([flatten(tree) for tree in trees])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(unboxed, trees))
    remember(flatten(stacked), known)
    return stacked


def select_adapters(stacked: Tree, index: Any) -> Any:
    """Returns the adapters of each example from stacked adapters.

        {"up": {"magnitude": (adapters, out)}}  ->  {"up": {"magnitude": (*index.shape, out)}}

    An index out of range gives NaN, not another user's adapter. Negative indices are out of range.

    Raises:
      AdapterError: the index does not hold integers.
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


def disable(adapters: Tree, bases: Mapping[Path, FrozenBase]) -> Any:
    """Returns the adapter tree with which adapted layers compute the same as their frozen kernels.

        {"up": {"lora_a": A, "lora_b": B, "magnitude": m}}
        -> {"up": {"lora_a": A, "lora_b": 0, "magnitude": ||W0||}}

    Its arrays are copies, those of modules trained in full too.

    Args:
      adapters: an adapter tree, with precomputed scales or without.
      bases: the record of each layer's frozen kernel, by module path.
    """
    disabled: Any = unboxed(adapters)
    for path, base in bases.items():
        layer = get_in(disabled, path, "the adapters")
        start: dict[str, Any] = {"lora_b": 0, "scale": 1, "magnitude": base.norm}
        if base.init_a is not None:
            # Such a layer adds the change of the product: it is zero at the initial factors.
            start |= {"lora_a": base.init_a, "lora_b": base.init_b}
        new = {
            name: jnp.broadcast_to(start[name], np.shape(x)).astype(x.dtype)
            for name, x in layer.items()
            if name in start
        }
        disabled = set_in(disabled, path, {**layer, **new})
    return boxed_like(jax.tree.map(own_array, disabled), adapters)
