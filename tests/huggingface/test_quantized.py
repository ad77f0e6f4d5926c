"""Kernels quantised while they are loaded are those that are quantised afterwards."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from dora_jax.decomposition import QuantizedKernel
from dora_jax.huggingface import CheckpointError, load_checkpoint, save_checkpoint
from dora_jax.names import NameMap
from tests.support.checkpoints import NAMES, abstract, tensors, write
from tests.support.models import same

HOW = dora.Quantization("nf4", block=2, double=True)


@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
def test_quantised_while_loading_is_quantised_after(tmp_path, stacked):
    folder = write(tmp_path / "in", tensors())
    whole = dora.quantize(load_checkpoint(folder, abstract(stacked), NAMES), HOW)
    found = load_checkpoint(folder, dora.quantize(abstract(stacked), HOW), NAMES)
    assert isinstance(found.head.kernel.get_value(), QuantizedKernel)
    assert same(nnx.state(found), nnx.state(whole))
    with pytest.raises(CheckpointError, match=r"is quantised, and a folder holds floats"):
        save_checkpoint(tmp_path / "out", found, NAMES)


def test_a_linen_tree_is_quantised_while_it_is_loaded(tmp_path):
    module, x = nn.Sequential([nn.Dense(3)]), jnp.ones((1, 4))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    names = NameMap({"layers_{i}": "net.{i}"})
    rng = np.random.default_rng(0)
    stored = {"net.0.weight": rng.normal(size=(3, 4)), "net.0.bias": rng.normal(size=3)}
    folder = write(tmp_path, {name: x.astype(np.float32) for name, x in stored.items()})

    def quantized(params):
        return dora.quantize(module, "int8", params=params, inputs=(x,))

    found = load_checkpoint(folder, quantized(params), names)
    assert same(found, quantized(load_checkpoint(folder, params, names)))


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    stored = tensors()
    stored["lm_head.weight"][0, 0] = np.inf
    model = dora.quantize(abstract(), HOW)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: NaN or infinity"):
        load_checkpoint(write(tmp_path, stored), model, NAMES)


def test_loading_holds_the_codes_and_two_layers(tmp_path):
    """Of a stack of layers, whose parameter is as large as the model."""
    width, layers = 256, 12
    rng = np.random.default_rng(0)
    stored = {
        f"h.{i}.up.weight": rng.normal(size=(width, width)).astype(np.float32)
        for i in range(layers)
    }
    names = NameMap({"layers.{i}": "h.{i}.up"})

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(width, width, use_bias=False, rngs=rngs))
            self.layers = make(rngs.split(layers))

    model = dora.quantize(nnx.eval_shape(lambda: Stack(nnx.Rngs(0))), "int8")
    folder = write(tmp_path, stored)
    load_checkpoint(folder, model, names)  # what is made once
    tracemalloc.start()
    load_checkpoint(folder, model, names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = 4 * width**2
    assert peak <= layers * layer / 4 * 1.05 + 2 * layer + 2**16  # and what Python itself holds
