"""Where the adapters of a Linen model lie on a mesh."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from dora_jax.adapters.trees import Tree, get_in, nest, unboxed
from dora_jax.decomposition.sharding import layer_shardings
from dora_jax.linen.model import DoRAModel
from dora_jax.ops.mesh_types import context_mesh


def shardings(model: DoRAModel, params: Tree) -> dict[str, Any]:
    """Returns where the adapters of a model lie: a tree like theirs.

    Its leaves are `NamedSharding` where a kernel has one, or has a box (`nn.Partitioned`) and there
    is a mesh (`jax.set_mesh`); elsewhere what the kernel has.

    Args:
      model: the adapted model.
      params: the base's `params` collection: arrays, or their shapes.

    Example:
      >>> import dora_jax as dora, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> params = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> shardings(model, params)["lora_a"].spec, adapters["lora_a"].sharding.spec
      (P('fsdp', None), P('fsdp', None))
    """
    found = {}
    for path in model.shapes:
        if (layer := model.layers.get(path[:-1])) is None:  # of a module trained in full
            found[path] = _own_sharding(get_in(params, path))
            continue
        kernel = get_in(params, (*path[:-1], layer.adapted.layout.kernel))
        own = layer_shardings(unboxed(kernel), layer.axes)
        if own is None:
            boxed = layer.boxed({path[-1]: unboxed(kernel)})
            found[path] = _own_sharding(boxed[path[-1]])
        else:
            found[path] = own[path[-1]]
    return nest(found)


def _own_sharding(x: Any) -> Any:
    """Returns the sharding of a parameter, or that its box says."""
    own, mesh = getattr(unboxed(x), "sharding", None), context_mesh()
    if isinstance(own, NamedSharding) or not isinstance(x, meta.Partitioned):
        return own
    mesh = mesh if x.mesh is None else x.mesh
    if mesh is None:
        return own
    spec = x.get_partition_spec()
    if isinstance(x, nn.LogicallyPartitioned):
        spec = nn.logical_to_mesh_axes(x.names, x.rules) or PartitionSpec()
    return NamedSharding(mesh, spec)
