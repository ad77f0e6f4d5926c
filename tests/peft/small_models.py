"""Small NNX models with adapters as training leaves them, and edits of their PEFT folders.

Their base is abstract, and NumPy draws their adapters: nothing is compiled.
"""

from __future__ import annotations

import json

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.adapters.trees import flatten
from dora_jax.names import NameMap

UP = "base_model.model.up."


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)


class Stack(nnx.Module):
    """Three layers in a stack, as a scan has them."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return MLP(rngs)

        self.layers = layers(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)


class Unstacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([MLP(rngs) for _ in range(3)])
        self.head = nnx.Linear(4, 3, rngs=rngs)


class Twice(nnx.Module):
    """Two modules, of which one's name ends in the other's."""

    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.inner = MLP(rngs)


STACKED = NameMap(
    {f"layers.{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down", "head")} | {"head": "head"}
)


def plain(make=MLP):
    """Returns a model with shapes for arrays."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def adapted(make=MLP, model=None, **fields):
    """Returns a model with an adapter that is not where it started.

    Args:
      make: makes the model from `nnx.Rngs`.
      model: the model itself, in place of `make`.
      **fields: of the configuration.
    """
    config = dora.DoRAConfig(**{"rank": 2, "target_modules": ["up", "down"], **fields})
    model = plain(make) if model is None else model
    model = dora.apply_dora(model, config, rngs=nnx.Rngs(1))
    own, random = dora.get_adapters(model), np.random.default_rng(0)
    values = {
        path: random.uniform(0.1, 0.3, x.shape).astype(x.dtype) for path, x in flatten(own).items()
    }
    return dora.model.with_adapter_arrays(model, own, values)


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other
    )


def index(tree, i):
    """Returns one slice of every array of a tree."""
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def fields_of(folder):
    """Returns the fields of a folder's adapter_config.json."""
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder, **fields):
    """Changes fields of a folder's adapter_config.json."""
    (folder / "adapter_config.json").write_text(json.dumps({**fields_of(folder), **fields}))


def edit_tensors(folder, change):
    """Changes a folder's tensors in place, and drops the digest, which PEFT does not write."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop_digest(folder):
    edit_tensors(folder, lambda tensors: None)
