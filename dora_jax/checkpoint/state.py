"""The state of a training run by path: any pytree of arrays and NNX objects.

An `nnx.Optimizer` or `nnx.Rngs` may stand anywhere in the tree. Its arrays are read through its
variables, and set in place, so that other references to it see the restored values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import flatten
from dora_jax.errors import Path
from dora_jax.nnx.variables import nnx_values, set_nnx_values

# A state that is one array has no path of its own.
_SINGLE = ("value",)


def state_values(state: Any) -> dict[Path, Any]:
    """Returns the arrays of a state by path, those of its NNX objects among them.

    Example:
      >>> import jax.numpy as jnp
      >>> sorted(state_values({"rngs": nnx.Rngs(dropout=0), "loss": jnp.ones(2)}))
      [('loss',), ('rngs', 'dropout', 'count'), ('rngs', 'dropout', 'key')]
    """
    values: dict[Path, Any] = {}
    for path, node in flatten(state, _is_nnx).items():
        inner = nnx_values(node) if _is_nnx(node) else {(): node}
        values |= {(*path, *tail): value for tail, value in inner.items()}
    return values if () not in values else {_SINGLE: values[()]}


def with_state_values(state: Any, values: Mapping[Path, Any]) -> Any:
    """Returns a state with other arrays, placed as those in their place.

    NNX objects in it are changed in place.
    """
    leaves = []
    for path, node in flatten(state, _is_nnx).items():
        if _is_nnx(node):
            n = len(path)
            set_nnx_values(node, ..., {p[n:]: v for p, v in values.items() if p[:n] == path})
            leaves.append(node)
        else:
            leaves.append(device_put_like(values[path or _SINGLE], node))
    return jax.tree.unflatten(jax.tree.structure(state, _is_nnx), leaves)


def _is_nnx(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)
