"""Where the adapter of an NNX model lies on a mesh."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.sharding import NamedSharding

from dora_jax.adapters.trees import nest
from dora_jax.decomposition.sharding import layer_shardings
from dora_jax.nnx.layers import kernel_and_axes
from dora_jax.nnx.metadata import ENTRIES
from dora_jax.nnx.model import checked_layers
from dora_jax.nnx.variables import DoRAParam
from dora_jax.ops.mesh_types import context_mesh


def shardings(model: nnx.Module) -> dict[str, Any]:
    """Returns where the adapter tree of a model lies: a tree like that of `get_adapters`.

    Its leaves are `NamedSharding` where a kernel has one, or has metadata and there is a mesh
    (`jax.set_mesh`); elsewhere what the arrays have.

    Raises:
      AdapterError: nothing is adapted.

    Example:
      >>> import dora_jax as dora, jax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> model.kernel.set_value(jax.device_put(model.kernel[...], NamedSharding(mesh, P("fsdp"))))
      >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> shardings(model)["lora_a"].spec, model.lora_a.sharding.spec
      (P('fsdp', None), P('fsdp', None))
    """
    layers = checked_layers(model)
    state = nnx.state(model, DoRAParam)
    variables = {tuple(map(str, path)): own for path, own in nnx.to_flat_state(state)}
    found = {path: _own_sharding(variable) for path, variable in variables.items()}
    for path, layer in layers.items():
        kernel, axes = kernel_and_axes(layer)
        for name, sharding in (layer_shardings(kernel.get_value(), axes) or {}).items():
            if (*path, name) in found:
                found[*path, name] = sharding
    return nest(found)


def _own_sharding(variable: nnx.Variable) -> Any:
    """Returns the sharding that a variable has, or that its metadata say."""
    value, given = variable.get_value(), variable.get_metadata()
    own = getattr(value, "sharding", None)
    mesh = given.get("mesh") or context_mesh()
    if isinstance(own, NamedSharding) or mesh is None or not any(map(given.get, ENTRIES)):
        return own
    return nnx.get_named_sharding(variable, mesh).get_value()
