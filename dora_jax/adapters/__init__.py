"""Adapter trees: nested dicts by module path, the same for Linen and NNX.

They are plain pytrees, so JAX's own functions map, shard and average them. This package counts,
casts, compares, combines and compresses them, and stacks several to serve them in one batch.
"""

from dora_jax.adapters.combine import add_weighted, diff, interpolate, rescale
from dora_jax.adapters.components import component_ranks, compress
from dora_jax.adapters.groups import cast_adapters, count_parameters, label_adapters
from dora_jax.adapters.serving import select_adapters, stack_adapters
from dora_jax.adapters.trees import check_shapes, flatten, tree_shapes

__all__ = [
    "add_weighted",
    "cast_adapters",
    "check_shapes",
    "component_ranks",
    "compress",
    "count_parameters",
    "diff",
    "flatten",
    "interpolate",
    "label_adapters",
    "rescale",
    "select_adapters",
    "stack_adapters",
    "tree_shapes",
]
