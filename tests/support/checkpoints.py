"""A small model, and checkpoint folders for it as Hugging Face lays them out."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dora_jax.huggingface import CheckpointError, load_checkpoint
from dora_jax.names import NameMap

LAYERS, WIDTH, VOCAB = 3, 8, 10
NAMES = NameMap(
    {
        "embed": "wte",
        "layers.{i}.up": "h.{i}.up",
        "layers.{i}.norm": "h.{i}.norm",
        "head": "lm_head",
    }
)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, stacked=False):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        if stacked:
            self.layers = nnx.vmap(Layer)(rngs.split(LAYERS))
        else:
            self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 2, use_bias=False, rngs=rngs)


@functools.cache
def _abstract(stacked, param_dtype):
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0), stacked))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), state))
    return model


def abstract(stacked=False, param_dtype=jnp.float32):
    """Returns the model with shapes for arrays."""
    return nnx.clone(_abstract(stacked, param_dtype))


def filled(make, seed=0):
    """Returns an NNX model with random parameters, drawn by NumPy: JAX would compile every draw.

    Args:
      make: makes the model from `nnx.Rngs`.
      seed: of the draws.
    """
    model, rng = nnx.eval_shape(lambda: make(nnx.Rngs(0))), np.random.default_rng(seed)
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    for _, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape), variable.dtype))
    nnx.update(model, state)
    return model


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (VOCAB, WIDTH), "lm_head.weight": (2, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"h.{i}.up.weight": (WIDTH, WIDTH), f"h.{i}.up.bias": (WIDTH,)}
        shapes |= {f"h.{i}.norm.weight": (WIDTH,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, stored, files=1):
    """Writes tensors into as many files, as Hugging Face names them."""
    folder.mkdir(exist_ok=True)
    if files == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {key: stored[key] for key in list(stored)[i::files]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def saved(folder):
    """Returns all tensors of a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def flat(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def expected(stored, stacked):
    """Returns what each parameter of the model must be, by the definition of torch's layers."""
    found = {"embed.embedding": stored["wte.weight"], "head.kernel": stored["lm_head.weight"].T}
    layers = [
        {
            "up.kernel": stored[f"h.{i}.up.weight"].T,
            "up.bias": stored[f"h.{i}.up.bias"],
            "norm.scale": stored[f"h.{i}.norm.weight"],
        }
        for i in range(LAYERS)
    ]
    if stacked:
        return found | {
            f"layers.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]
        }
    return found | {f"layers.{i}.{n}": v for i in range(LAYERS) for n, v in layers[i].items()}


def problems_of(folder, model=None, **kwargs):
    """Returns the problems that reading a folder raises, by the tensor or file they name."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, model or abstract(), NAMES, **kwargs)
    return dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])
