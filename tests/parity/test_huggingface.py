"""Transformers reads what is written here: merged decoders, with the same logits."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import dora_jax as dora
from experiments.models.huggingface import load_llama, save_llama

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llama"


def trained(model):
    """The model with adapters as if trained, merged."""
    model = dora.apply_dora(model, dora.DoRAConfig(rank=2, alpha=4.0), rngs=nnx.Rngs(1))
    leaves, structure = jax.tree.flatten(dora.get_adapters(model))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    dora.set_adapters(model, jax.tree.unflatten(structure, moved))
    return dora.merge(model)


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_transformers_reads_a_merged_decoder_and_computes_the_same(tmp_path, name):
    tokens = load_file(FIXTURES / name / "activations.safetensors")["input_ids"]
    merged = trained(load_llama(FIXTURES / name, scan_layers=True))
    save_llama(merged, tmp_path, source=FIXTURES / name, max_file_bytes=30_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # no missing, unexpected or mismatched tensors
    with torch.no_grad():
        expected = theirs.double()(torch.tensor(tokens)).logits.numpy()
    error = np.abs(nnx.jit(lambda model, x: model(x))(merged, tokens) - expected).max()
    assert error < 2e-6 * np.abs(expected).max()
