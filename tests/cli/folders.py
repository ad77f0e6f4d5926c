"""Adapter folders and base folders for the tests of the command."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.adapters.trees import flatten
from dora_jax.decomposition import FrozenBase
from dora_jax.nnx.variables import nnx_values, set_nnx_values
from tests.support.checkpoints import filled
from tests.support.models import NNXChain

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA_BASE = FIXTURES / "llama" / "llama3"
PEFT_FOLDER = FIXTURES / "peft"
PEFT = sorted(path.name for path in PEFT_FOLDER.iterdir())
CONFIG = dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2})


def chain(rngs):
    return NNXChain((24, 40, 17), rngs=rngs)


def trained(config, make=chain):
    """Returns a model with an adapter as training leaves it.

    `apply_dora` adapts its shapes alone, and NumPy computes the arrays: nothing is compiled.

    Args:
      config: of the adapter.
      make: makes the model from `nnx.Rngs`.
    """
    base, random = filled(make), np.random.default_rng(1)
    model = dora.model.adapt_abstract(base, config, dora.model.Plain())
    set_nnx_values(model, nnx.Param, nnx_values(base, nnx.Param))
    records = {}
    for path, layer in dora.model.model_layers(model).items():
        kernel = np.asarray(getattr(layer.module, layer.layout.kernel)[...])
        (inputs,) = layer.axes.inputs
        norm, row = np.linalg.norm(kernel, axis=inputs), kernel.take(0, axis=inputs)
        records[path] = FrozenBase(jnp.asarray(norm), jnp.asarray(row))
    own, values = dora.get_adapters(model), {}
    for path, x in flatten(own).items():
        values[path] = 0.3 * random.normal(size=x.shape).astype(x.dtype)
        if path[-1] == "magnitude":
            values[path] = np.asarray(records[path[:-1]].norm) * (1 + np.tanh(values[path]))
    model = dora.model.with_base_records(model, records)
    return dora.model.with_adapter_arrays(model, own, values)


def llama_base():
    """Returns the tensors of the base in `LLAMA_BASE`."""
    files = LLAMA_BASE.glob("model-*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def peft_base(name, folder):
    """Writes the base of one of PEFT's fixtures as a Hugging Face folder; returns its tensors."""
    reference = load_file(PEFT_FOLDER / name / "reference.safetensors")
    tensors = {k[5:]: x for k, x in reference.items() if k.startswith("base.")}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ids = {"position_ids": np.arange(7)}  # a buffer of integers, as older checkpoints have them
    save_file({**tensors, **ids}, folder / "model.safetensors")
    return {**tensors, **ids}


def write_peft(folder, base, ranks, rng):
    """Writes an adapter of some modules of a base as PEFT would."""
    tensors = {}
    for module, rank in ranks.items():
        out, inner = base[f"{module}.weight"].shape
        norm = np.linalg.norm(base[f"{module}.weight"].astype(np.float64), axis=1)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": rng.normal(size=(rank, inner)),
            f"base_model.model.{module}.lora_B.weight": 0.01 * rng.normal(size=(out, rank)),
            f"base_model.model.{module}.lora_magnitude_vector": norm * rng.uniform(0.8, 1.2, out),
        }
    config = {
        "peft_type": "LORA",
        "use_dora": True,
        "r": max(ranks.values()),
        "lora_alpha": 8,
        "target_modules": list(ranks),
        "rank_pattern": {f"^{k}": r for k, r in ranks.items() if r != max(ranks.values())},
        "alpha_pattern": {},
        "use_rslora": False,
        "fan_in_fan_out": False,
    }
    folder.mkdir()
    save_file(
        {k: x.astype(np.float32) for k, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
