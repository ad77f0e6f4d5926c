"""Where the state of an optimiser lies on a mesh: each moment as its parameter."""

from __future__ import annotations

from typing import Any

import jax
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec


def optimizer_shardings(state: Any, shardings: Any) -> Any:
    """Returns the shardings of an optimiser's state, for `jax.jit(tx.init, out_shardings=...)`.

    A part of the state that has an entry for every parameter has their shardings. All else, such as
    a count of steps, is on every device.

    Args:
      state: of an optax optimiser: arrays, or their shapes as `jax.eval_shape(tx.init, adapters)`
        returns them.
      shardings: of the adapters, from `dora.shardings`.

    Returns:
      A tree like the state.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> places = {"up": {"lora_a": NamedSharding(mesh, PartitionSpec("fsdp"))}}
      >>> adapters = {"up": {"lora_a": jnp.ones((4, 2))}}
      >>> tx = dora.dora_optimizer(1e-3)
      >>> places = optimizer_shardings(jax.eval_shape(tx.init, adapters), places)
      >>> {s.spec for s in jax.tree.leaves(places)} == {PartitionSpec("fsdp"), PartitionSpec()}
      True
    """
    known = {_names(path): own for path, own in jax.tree_util.tree_flatten_with_path(shardings)[0]}
    meshes = (own.mesh for own in known.values() if isinstance(own, NamedSharding))
    mesh = next(meshes, None)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], _: Any) -> Any:
        names = _names(path)
        tails = (names[i:] for i in range(len(names)))
        return next((known[tail] for tail in tails if tail in known), whole)

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=meta.is_axis_metadata)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the keys of a path, without that of an NNX variable's value."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return tuple(key for key in keys if key != "value")
