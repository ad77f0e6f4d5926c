"""Models, optimisers and batches on the devices of a mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from experiments.trainer.settings import SettingsError

M = TypeVar("M", bound=nnx.Module)

ROWS = P(("data", "fsdp"))
"""How a batch is cut: each copy of the model, and each cut of it, has rows of its own."""


def place(model: nnx.Module, optimizer: nnx.Optimizer, mesh: Mesh) -> None:
    """Moves the arrays of a model and of its optimiser onto a mesh, in place.

    An array that lies on the mesh stays. What the model says of its arrays (NNX metadata) is done;
    other matrices are cut along their largest axes. Adapters lie as their kernels do
    (`dora.shardings`), and moments as what they are of. All else is on all devices.
    """
    variables = [(p, v) for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    for _, variable in variables:
        if not isinstance(variable, dora.DoRAParam):
            _put(variable, _sharding_of(variable, mesh))
    adapted = isinstance(optimizer.wrt, type) and issubclass(optimizer.wrt, dora.DoRAParam)
    found = jax.tree_util.tree_leaves_with_path(dora.shardings(model)) if adapted else []
    of_adapters = {tuple(key.key for key in path): sharding for path, sharding in found}
    for path, variable in variables:
        own = of_adapters.get(tuple(map(str, path)))
        if isinstance(variable, dora.DoRAParam):
            if not isinstance(own, NamedSharding):  # of a module that is trained in full
                own = _sharding_of(variable, mesh)
            _put(variable, own)
    of_trained = jax.tree.map(lambda x: x.sharding, nnx.state(model, optimizer.wrt))
    state = nnx.state(optimizer)
    nnx.update(
        optimizer, jax.tree.map(_on_devices, state, dora.optimizer_shardings(state, of_trained))
    )


def _put(variable: nnx.Variable, sharding: NamedSharding) -> None:
    def put(x: Any) -> jax.Array:
        own = getattr(x, "sharding", None)
        stays = isinstance(own, NamedSharding) and own.mesh == sharding.mesh
        return x if stays else _on_devices(x, sharding)

    variable.set_value(jax.tree.map(put, variable.get_value()))


def _sharding_of(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """Returns where a variable lies that is no adapter."""
    shape = jnp.shape(variable.get_value())
    named = nnx.get_partition_spec(variable).get_value()
    if not named:
        spec = largest_axes(shape, mesh.shape) if isinstance(variable, nnx.Param) else P()
        return NamedSharding(mesh, spec)
    entries = []
    for size, entry in zip(shape, named, strict=False):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        entries.append(None if size % math.prod(mesh.shape[a] for a in axes) else entry)
    return NamedSharding(mesh, P(*entries))


def _on_devices(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array on devices, some of them perhaps of other processes, which have it too."""
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _on_devices(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))


def largest_axes(shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """Returns how a matrix is cut: by `fsdp` along its largest axis, by `tensor` along the next.

    An axis that the devices do not divide is passed over. Vectors are not cut.

    Example:
        >>> tuple(largest_axes((4096, 11008), {"data": 1, "fsdp": 8, "tensor": 2}))
        ('tensor', 'fsdp')
    """
    entries: list[str | None] = [None] * len(shape)
    for name in ("fsdp", "tensor") if len(shape) > 1 else ():
        free = [i for i, n in enumerate(shape) if entries[i] is None and n % sizes[name] == 0]
        if free and sizes[name] > 1:
            entries[max(free, key=lambda i: shape[i])] = name
    return P(*entries)


def on_this_process(model: M) -> M:
    """Returns a copy of a model whose parameters this process holds whole, also others' parts.

    All processes call it. With one process it is the model itself.
    """
    if jax.process_count() == 1:
        return model
    parts: Any = nnx.split(model, nnx.Param, ...)
    graphdef, params, rest = parts
    whole = multihost_utils.process_allgather(params, tiled=True)
    return nnx.merge(graphdef, whole, rest, copy=True)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns a batch on a mesh, made from the rows that this process has of it (`own_rows`)."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def own_rows(mesh: Mesh | None, rows: int) -> slice:
    """Returns which rows of a batch this process reads: those of its own devices.

    Raises:
        SettingsError: The devices do not divide the rows, or this process's are not consecutive.
    """
    if mesh is None:
        return slice(0, rows)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise SettingsError(
            f"a batch of {rows} rows cannot be cut for {parts} devices (data x fsdp): "
            "choose a multiple"
        )
    found = NamedSharding(mesh, ROWS).addressable_devices_indices_map((rows,)).values()
    own = sorted({part[0].indices(rows)[:2] for part in found if part is not None})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(own)):
        raise SettingsError(f"the rows of process {jax.process_index()} are not consecutive: {own}")
    return slice(own[0][0], own[-1][1])
