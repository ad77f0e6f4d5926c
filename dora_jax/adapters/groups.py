"""The groups of arrays in an adapter tree: labels, counts, casts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.placement import own_array
from dora_jax.adapters.trees import Tree
from dora_jax.errors import AdapterError

if TYPE_CHECKING:
    from jax.typing import DTypeLike


ADAPTER_ARRAYS = ("lora_a", "lora_b", "magnitude")
GROUPS = (*ADAPTER_ARRAYS, "saved")


def label_adapters(adapters: Any) -> Any:
    """Returns the tree with each leaf replaced by its group, one of `GROUPS`.

    The group of `lora_a`, `lora_b` and `magnitude` is that name. Any other leaf belongs to a module
    trained in full; its group is `saved`.

    Raises:
      AdapterError: the tree holds a frozen kernel or a precomputed scale.

    Example:
      >>> label_adapters({"query": {"lora_a": 0, "magnitude": 0}, "head": {"bias": 0}})
      {'head': {'bias': 'saved'}, 'query': {'lora_a': 'lora_a', 'magnitude': 'magnitude'}}
    """
    paths = [array_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(adapters)[0]]
    adapted = {path[:-1] for path in paths if path[-1] in ADAPTER_ARRAYS}
    for path in paths:
        if path[-1] == "scale" and path[:-1] in adapted:
            raise AdapterError(
                f"{'.'.join(path)} is a precomputed scale, which is computed and not trained: use "
                "the adapters that precompute_scales was given"
            )
        if path[-1] not in ADAPTER_ARRAYS and path[:-1] in adapted:
            raise AdapterError(
                f"{'.'.join(path)} is the frozen base of an adapted layer: optimise the adapters "
                "alone (wrt=DoRAParam in NNX, the adapter tree in Linen)"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: name if (name := array_names(path)[-1]) in ADAPTER_ARRAYS else "saved",
        adapters,
    )


def array_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the dictionary keys in a leaf's path, without the entry of an NNX variable."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)) or ("",)


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
      AdapterError: the dtype is not a floating one; most adapters would round to zero.

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
        return own_array(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(cast, adapters)
