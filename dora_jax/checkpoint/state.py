"""The arrays of NNX objects, and of pytrees that hold some, by path: what checkpoints are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import flatten_tree
from dora_jax.errors import AdapterError, Path
from dora_jax.nnx.variables import nnx_values, set_nnx_values


def state_values(state: Any) -> dict[Path, Any]:
    """Returns the arrays of a pytree by path, with those of the NNX objects in it."""
    values: dict[Path, Any] = {}
    for path, node in flatten_tree(state, _is_nnx).items():
        inner = nnx_values(node) if _is_nnx(node) else {(): node}
        values |= {(*path, *tail): value for tail, value in inner.items()}
    return values if () not in values else {("value",): values[()]}


def with_state_values(state: Any, values: Mapping[Path, Any]) -> Any:
    """Returns a pytree with other arrays; NNX objects in it are changed in place."""
    leaves = []
    for path, node in flatten_tree(state, _is_nnx).items():
        if _is_nnx(node):
            n = len(path)
            set_nnx_values(node, ..., {p[n:]: v for p, v in values.items() if p[:n] == path})
            leaves.append(node)
        else:
            leaves.append(device_put_like(values[path or ("value",)], node))
    return jax.tree.unflatten(jax.tree.structure(state, _is_nnx), leaves)


def check_values(own: Mapping[Path, Any], saved: Mapping[Path, Any], what: str) -> None:
    """Raises `AdapterError` unless names, shapes and dtypes are those that were saved."""
    one, other = (
        {".".join((what, *path)): (np.shape(x), jnp.result_type(x)) for path, x in values.items()}
        for values in (own, saved)
    )
    problems = [f"{name} is not in the checkpoint" for name in one if name not in other]
    problems += [f"{name} is in the checkpoint alone" for name in other if name not in one]
    problems += [
        f"{name} is {kind[1]} {kind[0]}, and was saved as {other[name][1]} {other[name][0]}"
        for name, kind in one.items()
        if other.get(name, kind) != kind
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(
            f"the checkpoint is of another model or optimiser: {'; '.join(problems[:5])}{more}"
        )


def _is_nnx(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)
