"""Training on a mesh of virtual devices, compared with one device.

`python -m tests.laws.sharded MODEL MESH AXES` prints, as JSON, how far gradients and losses are
from those of one device, and which adapters or moments lie whole where their kernel is cut. MODEL
is a name of `MODELS`, MESH as for `parse_mesh`, AXES is `auto` or `explicit`.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from dora_jax.adapters.trees import flatten
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig
from experiments.trainer.mesh import make_mesh, parse_mesh
from tests.support import reference
from tests.support.models import nnx_model
from tests.support.sharded_models import (
    BATCH,
    ROWS,
    TOKENS,
    WIDTH,
    LinenTransformer,
    NNXTransformer,
    kernel_spec,
)

RANK = 4
CONFIG = dora.DoRAConfig(rank=RANK)
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
)
# What cuts the kernels of LLaMA, by their layer.
ROW_WISE = dict.fromkeys(("o_proj", "down_proj", "embed_tokens"), P("tensor", "fsdp"))
COLUMN_WISE = P("fsdp", "tensor")


class Run(NamedTuple):
    """A model on one device or a mesh, with its adapters and kernels by path."""

    apply: Any  # (adapters, rest, x) -> y
    rest: Any  # all arrays that are not trained
    adapters: Any
    kernels: dict[Any, tuple[Any, Any]]  # by layer: the kernel, and its axes
    places: Any  # where the adapters lie


def nnx_run(make, spec, mesh):
    """Runs an NNX model; `spec(path, ndim)` says what cuts each of its parameters."""
    base = nnx_model(make)
    nnx.update(base, drawn(nnx.state(base, nnx.Param)))
    if mesh is not None:
        base = placed(base, spec, mesh)
    model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))
    graphdef, _, rest = nnx.split(model, dora.DoRAParam, ...)
    structure = nnx.state(model, dora.DoRAParam)

    def apply(adapters, rest, x):
        state = jax.tree.map(lambda leaf: leaf, structure)
        nnx.replace_by_pure_dict(state, as_state(adapters))
        return nnx.merge(graphdef, state, rest, copy=True)(x)

    def as_state(tree):
        if not isinstance(tree, dict):
            return tree
        return {int(k) if k.isdigit() else k: as_state(v) for k, v in tree.items()}

    kernels = {
        path: (layer.module.kernel[...], layer.axes)
        for path, layer in dora.model.model_layers(model).items()
    }
    return Run(apply, rest, dora.get_adapters(model), kernels, dora.shardings(model))


def drawn(shapes):
    """Returns parameters with which each layer keeps the size of what it is given."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + rng.normal(size=leaf.shape) / np.sqrt(WIDTH), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def placed(base, spec, mesh):
    def place(path, leaf):
        keys = [getattr(key, "key", getattr(key, "name", "")) for key in path]
        own = spec([key for key in keys if key != "value"], leaf.ndim)
        return jax.device_put(leaf, NamedSharding(mesh, own))

    state = nnx.state(base, nnx.Param)
    nnx.update(base, jax.tree_util.tree_map_with_path(place, state))
    return base


def linen_run(module, x, mesh):
    shapes = jax.eval_shape(LinenTransformer().init, jax.random.key(0), jnp.zeros(x.shape))
    params = drawn(shapes["params"])
    if mesh is not None:
        params = jax.tree_util.tree_map_with_path(boxed_on(mesh), params)
    model, adapters = dora.apply_dora(
        module, CONFIG, params=params, rng=jax.random.key(1), inputs=(x,)
    )

    def apply(adapters, rest, x):
        params, base = rest
        return model.apply({"params": params, "dora": adapters, "dora_base": base}, x)

    kernels = {p: (layer.kernel(params), layer.axes) for p, layer in model.layers.items()}
    rest = (params, model.base_collection)
    return Run(apply, rest, adapters, kernels, dora.shardings(model, params))


def boxed_on(mesh):
    def place(path, leaf):
        own = kernel_spec([key.key for key in path], leaf.ndim)
        return linen.Partitioned(jax.device_put(leaf, NamedSharding(mesh, own)), tuple(own))

    return place


def llama_spec(path, ndim):
    own = next((ROW_WISE[name] for name in map(str, path) if name in ROW_WISE), COLUMN_WISE)
    own = own if str(path[-1]) in ("kernel", "embedding") else P()
    return P(*[None] * (ndim - len(own)), *own) if len(own) else own


def llama_run(scanned):
    def make(rngs):
        return Llama(LLAMA, scan_layers=scanned, rngs=rngs)

    return lambda mesh, x: nnx_run(make, llama_spec, mesh)


def transformer_run(scanned):
    def run(mesh, x):
        explicit = mesh is not None and AxisType.Explicit in mesh.axis_types

        def make(rngs):
            return NNXTransformer(rngs, scanned=scanned, explicit=explicit)

        return nnx_run(make, kernel_spec, mesh)

    return run


def linen_transformer_run(mesh, x):
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    return linen_run(LinenTransformer(explicit), x, mesh)


MODELS = {
    "llama": llama_run(scanned=False),
    "llama scanned": llama_run(scanned=True),
    "nnx": transformer_run(scanned=False),
    "nnx scanned": transformer_run(scanned=True),
    "linen scanned": linen_transformer_run,
}


def train(run, x, steps):
    """Returns the gradients of the first step, the losses, and adapters and moments at the end."""
    tx = dora.dora_optimizer(1e-4)
    adapters, losses, first = run.adapters, [], None
    state = tx.init(adapters)
    moved = lying_whole(run, adapters, state)

    @jax.jit
    def step(adapters, rest, state, x):
        def loss(adapters):
            return jnp.mean(jnp.square(run.apply(adapters, rest, x)))

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value, gradients

    for _ in range(steps):
        adapters, state, value, gradients = step(adapters, run.rest, state, x)
        first = gradients if first is None else first
        losses.append(float(value))
    return first, losses, moved + lying_whole(run, adapters, state)


def lying_whole(run, adapters, state):
    """Returns the paths of adapters and moments whose shards are not as small as the kernel's."""
    wanted = {}
    for path, (kernel, axes) in run.kernels.items():
        part = kernel.sharding.shard_shape(kernel.shape)
        for name, shape in axes.shapes(part, RANK).items():
            wanted[*path, name] = shape
    arrays = flatten(adapters) | {("state", *p): x for p, x in flatten(state).items()}
    found = []
    for path, x in arrays.items():
        tails = [path[i:] for i in range(len(path)) if path[i:] in wanted]
        if tails and x.sharding.shard_shape(x.shape) != wanted[tails[0]]:
            found.append(".".join(path))
    return found


def compare(name, sizes, axis_type, steps=5):
    """Returns how far training on a mesh is from training on one device."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)
    if name.startswith("llama"):
        x = jnp.asarray(rng.integers(0, LLAMA.vocab_size, size=(BATCH, TOKENS)))
    one = MODELS[name](None, x)
    moved = jax.tree.map(
        lambda a, start: np.asarray(start) + 0.05 * rng.normal(size=a.shape).astype(a.dtype),
        one.adapters,
        one.adapters,
    )
    one = one._replace(adapters=jax.tree.map(jnp.asarray, moved))
    expected, losses, _ = train(one, x, steps)
    mesh = make_mesh(parse_mesh(sizes), axis_type=axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(ROWS)))
        many = MODELS[name](mesh, x)
        born_whole = lying_whole(many, many.adapters, {})
        fresh = jax.tree.leaves(many.adapters)
        adapters = jax.device_put(jax.tree.leaves(moved), [x.sharding for x in fresh])
        structure = jax.tree.structure(many.adapters)
        many = many._replace(adapters=jax.tree.unflatten(structure, adapters))
        gradients, found, whole = train(many, x, steps)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    return {
        "gradients": max(reference.relative_error(a, b) for a, b in pairs),
        "losses": max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True)),
        "whole": born_whole + whole,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    model, mesh, axes = sys.argv[1:]
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axes]
    print(json.dumps(compare(model, mesh, kind)))
