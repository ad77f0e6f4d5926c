"""What Flax is told of where the arrays of an adapted layer lie on a mesh: as their kernel."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.sharding import layer_entries

V = TypeVar("V", bound=nnx.Variable)
# Flax's names, the newest first, for what cuts each axis of a variable.
ENTRIES = ("out_sharding", "sharding_names", "sharding")
# What else of a kernel's metadata says how these entries are read.
_KEPT = ("mesh", "sharding_rules")


def layer_metadata(kernel: nnx.Variable, axes: KernelAxes) -> dict[str, dict[str, Any]]:
    """Returns the metadata of the variables of an adapted layer, by name, from its kernel's.

    So `nnx.get_partition_spec` and all that asks it, such as a trainer, cuts an adapter as it cuts
    the kernel. Entries for a kernel without its stack axes, as `nnx.vmap` leaves them without a
    `partition_name`, are read so.

    Args:
      kernel: the variable of the frozen kernel.
      axes: of the kernel as it is stored.
    """
    given = kernel.get_metadata()
    key = next((key for key in ENTRIES if given.get(key)), None)
    if key is None:
        return {}
    kept = {name: given[name] for name in _KEPT if given.get(name) is not None}
    own = given[key]
    entries = tuple(own.spec if isinstance(own, NamedSharding) else own)
    if axes.stack and len(entries) == axes.ndim - len(axes.stack):
        rest = iter(entries)
        entries = tuple(None if i in axes.stack else next(rest) for i in range(axes.ndim))
    found: dict[str, Any] = dict(layer_entries(axes, entries))
    if isinstance(own, NamedSharding):
        found = {name: NamedSharding(own.mesh, PartitionSpec(*e)) for name, e in found.items()}
    return {name: {key: of_array, **kept} for name, of_array in found.items()}


def variable_like(kind: type[V], value: Any, kernel: nnx.Variable, metadata: Any) -> V:
    """Returns a variable next to a kernel, with an entry of `layer_metadata`.

    Inside a program, where the array has no place yet, Flax cuts it as it cuts the kernel.
    """
    eager = bool(kernel.get_metadata().get("eager_sharding", True))
    if not metadata:
        return kind(value, eager_sharding=eager)
    mesh_known = "mesh" in metadata or not jax.sharding.get_abstract_mesh().empty
    if eager and mesh_known and isinstance(value, jax.core.Tracer):
        return kind(value, eager_sharding=eager, **metadata)
    variable = kind(value, eager_sharding=eager)
    variable.set_metadata(**metadata)
    return variable
