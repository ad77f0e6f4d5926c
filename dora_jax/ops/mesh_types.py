"""The mesh in the type of an array, as explicit sharding and `jax.shard_map` put it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType


def explicit_mesh(*trees: Any) -> AbstractMesh | None:
    """Returns the mesh in the types of arrays if some of its axes are explicit, else None."""
    for x in jax.tree.leaves(trees):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            if AxisType.Explicit in mesh.axis_types:
                return mesh
    return None


def context_mesh() -> Any:
    """Returns the mesh that `jax.set_mesh` has set; None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    try:
        devices = jax.sharding.get_mesh()
    except ValueError:  # inside a program, where devices are not known
        return None if mesh.empty else mesh
    return next((m for m in (devices, mesh) if not m.empty), None)


def varying_axes(x: jax.Array) -> dict[str, int]:
    """Returns the sizes of the mesh axes along which an array differs, inside `jax.shard_map`.

    They are known with `check_vma=True`, the default of `shard_map`.
    """
    aval: Any = jax.typeof(x)
    # Newer releases have a record of its own for manual axes.
    names = aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return {name: size for name, size in aval.sharding.mesh.shape.items() if name in names}


def automatically(function: Callable[..., Any], out: Any, *operands: Any) -> Any:
    """Returns `function(*operands)`, inside of which explicit axes of the mesh are automatic.

    There, types say nothing of those axes: XLA divides each operation among the devices, as it does
    for a mesh of automatic axes, and no product needs to be told the sharding of its result. So our
    primitives work, and exact ways too. No data moves at the borders. Derivatives and `vmap` go
    through. Without explicit axes in the types of the operands it is a plain call.

    Args:
      function: of arrays, or trees of them. It closes over no array of an explicit type.
      out: the `NamedSharding` of the result, or a tree of them.
      *operands: arrays, or trees of them.

    Example:
      >>> import jax.numpy as jnp
      >>> automatically(jnp.sin, None, jnp.zeros(2))
      Array([0., 0.], dtype=float32)
    """
    mesh = explicit_mesh(*operands)
    if mesh is None:
        return function(*operands)
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = tuple(name for name, kind in axes if kind is AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=names, out_sharding=out)(*operands)
