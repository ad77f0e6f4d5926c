"""A sharded model with its optimiser, saved and restored on some devices of this process.

`python -m tests.checkpoint.sharded FOLDER save 4` saves it from four devices and prints its values;
`... FOLDER restore 2 1` restores it on two devices, then on one.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora

CONFIG = dora.DoRAConfig(rank=4)


def run(action, folder, devices):
    """Saves or restores on the first devices; returns all values by path."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))
    base = nnx.Linear(16, 8, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    base = _sharded(base, mesh)
    model = _sharded(dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1)), mesh)
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
    optimizer = _sharded(optimizer, mesh)
    placed = _shardings(model, optimizer)
    assert len(model.lora_a[...].sharding.device_set) == devices
    with dora.Checkpoints(f"{folder}/run", CONFIG) as checkpoints:
        if action == "save":
            _fill(model, dora.DoRAParam)
            _fill(optimizer)
            checkpoints.save(1, model, optimizer)
            dora.save(f"{folder}/adapter", model, CONFIG)
            return _values(model, optimizer)
        checkpoints.restore(model, optimizer)
    assert _shardings(model, optimizer) == placed
    loaded = dora.load(f"{folder}/adapter", base)
    assert len(loaded.lora_a[...].sharding.device_set) == devices
    np.testing.assert_array_equal(loaded.lora_a[...], model.lora_a[...])
    values = _values(model, optimizer)
    _step(model, optimizer)  # training resumes on these devices
    return values


def _sharded(node, mesh):
    def place(x):
        divides = x.ndim and x.shape[0] % mesh.size == 0
        return jax.device_put(x, NamedSharding(mesh, P("model") if divides else P()))

    nnx.update(node, jax.tree.map(place, nnx.state(node)))
    return node


def _fill(node, only=...):
    """Gives arrays values that no initialisation makes, where they are."""
    rng = np.random.default_rng(0)

    def fill(x):
        return jax.device_put((100 * rng.uniform(size=x.shape)).astype(x.dtype), x.sharding)

    nnx.update(node, jax.tree.map(fill, nnx.state(node, only)))


@nnx.jit
def _step(model, optimizer):
    def loss_fn(model):
        return (model(np.ones((2, 16), np.float32)) ** 2).mean()

    optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, dora.DoRAParam))(model))


def _shardings(*nodes):
    return [x.sharding for node in nodes for x in jax.tree.leaves(nnx.state(node))]


def _values(*nodes):
    trees = [nnx.to_pure_dict(nnx.state(node)) for node in nodes]
    leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
    return {jax.tree_util.keystr(k): np.asarray(x).tolist() for k, x in leaves}


if __name__ == "__main__":
    path, what, *numbers = sys.argv[1:]
    for number in numbers:
        print(run(what, path, int(number)))
