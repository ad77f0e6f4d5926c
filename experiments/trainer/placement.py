"""Models, optimisers and batches on the devices of a mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from experiments.trainer.settings import SettingsError

ROWS = P(("data", "fsdp"))
"""How a batch is cut: each copy of the model, and each cut of it, has rows of its own."""


def place(model: nnx.Module, optimizer: nnx.Optimizer, mesh: Mesh) -> None:
    """Moves the arrays of a model and of its optimiser onto a mesh, in place.

    What the model says of its arrays (NNX metadata) is done. Other kernels are cut along their
    largest axes. Adapters and their moments lie as their kernels do, small arrays on all devices.
    """
    _put(model, mesh, cut=lambda variable: not isinstance(variable, dora.DoRAParam))
    if not (isinstance(optimizer.wrt, type) and issubclass(optimizer.wrt, dora.DoRAParam)):
        return _put(optimizer, mesh, cut=lambda _: True)
    places = dora.shardings(model)
    adapters = jax.tree.map(_on_devices, dora.get_adapters(model), places)
    dora.set_adapters(model, adapters)
    state = nnx.state(optimizer)
    nnx.update(optimizer, jax.tree.map(_on_devices, state, dora.optimizer_shardings(state, places)))


def _put(node: Any, mesh: Mesh, cut: Callable[[nnx.Variable], bool]) -> None:
    for _, variable in nnx.iter_graph(node):
        if not isinstance(variable, nnx.Variable):
            continue
        named = nnx.get_partition_spec(variable).get_value()
        cuts = cut(variable)

        def put(x: Any, named: P = named, cuts: bool = cuts) -> Any:
            spec = named or (largest_axes(x.shape, mesh.shape) if cuts else P())
            return _on_devices(x, NamedSharding(mesh, spec))

        # One array as a rule; a masked part of an optimiser's state has none.
        variable.set_value(jax.tree.map(put, variable.get_value()))


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
