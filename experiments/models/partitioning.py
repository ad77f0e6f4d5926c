"""Where the arrays of a model lie on a mesh: names of their axes, and rules that resolve the names.

A model names the axes of its parameters and of its activations: `"embed"`, `"heads"`, `"batch"`.
`RULES` says which axes of the mesh (`experiments/trainer/mesh.py`) cut each of them. The mesh is
the one of `jax.set_mesh`. Where none is set, nothing happens: a model and its programs are those
that they would be without names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import Array

    Axes = tuple[str | None, ...]

M = TypeVar("M", bound=nnx.Module)

RULES: Mapping[str, tuple[str, ...]] = {
    # Axes of parameters. A kernel is cut along its input or output of size `hidden_size` over the
    # devices that share a batch (fully sharded data parallelism), along its other axis over those
    # that share a product.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    # Axes of activations, which also have "heads", "mlp" and "vocab".
    "batch": ("data", "fsdp"),
    "length": (),
    # Positions between the layers, where each is transformed apart from the others. What is kept
    # for the backward pass is cut over the devices that share a product, too.
    "residual_length": ("tensor",),
    "hidden": (),
}
"""The axes of the mesh that cut an axis of each name, the slowest first."""


def mesh_in_use() -> AbstractMesh | None:
    """Returns the mesh of `jax.set_mesh` or of the surrounding `jax.shard_map`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def resolve(axes: Axes, mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the entries of an array on a mesh.

    An axis stays whole where the mesh has no axis of its rule, where that axis is manual
    (inside `jax.shard_map`), or where its devices do not divide it.

    Args:
        axes: A name in `RULES` for each axis, or None for one that is never cut.
        mesh: The mesh.
        shape: The array's shape.

    Example:
        >>> from jax.sharding import AbstractMesh
        >>> mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))
        >>> tuple(resolve(("batch", None, "heads"), mesh, (8, 5, 12)))
        ('fsdp', None, 'tensor')
        >>> tuple(resolve(("batch", None, "heads"), mesh, (8, 5, 6)))
        ('fsdp', None, None)
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def entry(name: str | None, size: int) -> Any:
        found = () if name is None else RULES[name]
        found = tuple(a for a in found if kinds.get(a, AxisType.Manual) != AxisType.Manual)
        parts = 1
        for axis in found:
            parts *= mesh.shape[axis]
        if not found or size % parts:
            return None
        return found if len(found) > 1 else found[0]

    return PartitionSpec(*(entry(name, size) for name, size in zip(axes, shape, strict=True)))


def constrain(x: Array, *axes: str | None) -> Array:
    """Returns an activation with the sharding that its axes' names have on the mesh in use.

    Without a mesh it returns `x` itself.

    Example:
        >>> x = jax.numpy.ones((2, 3))
        >>> constrain(x, "batch", "hidden") is x
        True
    """
    mesh = mesh_in_use()
    if mesh is None or set(mesh.axis_types) == {AxisType.Manual}:
        return x
    spec = resolve(axes, mesh, x.shape)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def explicit_axes() -> tuple[str, ...]:
    """Returns the names of the explicit axes of the mesh in use."""
    mesh = mesh_in_use()
    kinds = () if mesh is None else zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind is AxisType.Explicit)


def automatically(
    model: M, run: Callable[..., Array], *inputs: Any, out: tuple[Axes, tuple[int, ...]]
) -> Array:
    """Returns `run(model, *inputs)`, inside of which all axes of the mesh are automatic.

    So a model that only constrains its activations also runs where the types of arrays say how they
    are sharded.

    Args:
        model: The model.
        run: Computes one array.
        *inputs: Arrays, or None.
        out: The names of the axes of the result, and its shape.
    """
    mesh = mesh_in_use()
    assert mesh is not None
    graphdef, state = nnx.split(model)

    def pure(state: Any, *inputs: Any) -> tuple[Array, Any]:
        own = nnx.merge(graphdef, state, copy=True)
        return run(own, *inputs), nnx.state(own, nnx.RngState)  # counts of keys drawn

    axes, shape = out
    of_keys = jax.tree.map(lambda _: PartitionSpec(), nnx.state(model, nnx.RngState))
    run_automatic = jax.sharding.auto_axes(
        pure, axes=explicit_axes(), out_sharding=(resolve(axes, mesh, shape), of_keys)
    )
    y, keys = run_automatic(state, *inputs)
    nnx.update(model, keys)
    return y


def named(initializer: Callable[..., Array], axes: Axes) -> Callable[..., Any]:
    """Returns an initialiser whose variable carries the names of its axes, as Flax stores them.

    `nnx.get_partition_spec` and `nnx.get_named_sharding` resolve them. A parameter that is made
    while a mesh is set has its sharding from its start.
    """
    mesh = mesh_in_use()
    return _named(initializer, axes, mesh is not None and _has_all_axes(mesh))


# Cached, for the same reason as the initialisers in `layers.py`.
@functools.cache
def _named(
    initializer: Callable[..., Array], axes: Axes, eager_sharding: bool
) -> Callable[..., Any]:
    return nnx.with_partitioning(
        initializer, axes, sharding_rules=FLAX_RULES, eager_sharding=eager_sharding
    )


def _has_all_axes(mesh: AbstractMesh) -> bool:
    used = {axis for axes in RULES.values() for axis in axes}
    return used <= set(mesh.axis_names) and AxisType.Manual not in mesh.axis_types


def _as_entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes


FLAX_RULES = tuple((name, _as_entry(axes)) for name, axes in RULES.items())
"""`RULES` as Flax writes them, for its metadata `sharding_rules`."""


def platform_of(mesh: Mesh | AbstractMesh | None) -> str:
    """Returns `"cpu"`, `"gpu"` or `"tpu"`: what a program on this mesh is compiled for.

    The devices of the mesh may be of a machine that is not there.
    """
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    device = None if abstract is None else abstract.abstract_device
    if device is None:
        return jax.default_backend()
    if (platform := getattr(device, "platform", None)) is not None:
        return "gpu" if platform in ("cuda", "rocm") else str(platform)
    kind = device.device_kind  # JAX before 0.9 has no platform here
    return "tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu"
