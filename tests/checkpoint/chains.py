"""Chains with adapters far from their start, to save and to load into their bases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from tests.checkpoint.runs import nnx_chain
from tests.support.models import LinenChain, chain_params, inputs, random_adapters

# All layers of one shape, so that one compiled program starts them all.
WIDTHS = (16, 16, 16)
CONFIGS = {
    "dora": dora.DoRAConfig(rank=3),
    "lora": dora.DoRAConfig(rank=3, decompose=False),
    "magnitude": dora.DoRAConfig(rank=0),
    "pissa": dora.DoRAConfig(rank=3, init="pissa"),
    "patterns": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, use_rslora=True),
    "saved": dora.DoRAConfig(rank=3, modules_to_save=["layer_1"]),
    "saved alone": dora.DoRAConfig(target_modules=(), modules_to_save=["layer_1"]),
    "bfloat16": dora.DoRAConfig(rank=3, adapter_dtype="bfloat16"),
}
moved = random_adapters
run_nnx = nnx.jit(lambda model, x: model(x))


def nnx_base(seed=0, dtype=jnp.float32):
    return nnx_chain(WIDTHS, chain_params(WIDTHS, dtype, seed))


def trained_nnx(config):
    return nnx.clone(_trained_nnx(config))


@functools.cache
def _trained_nnx(config):
    model = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(5))
    dora.set_adapters(model, moved(dora.get_adapters(model)))
    return model


@functools.cache
def trained_linen(config):
    module, params = LinenChain(WIDTHS), chain_params(WIDTHS)
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(5), inputs=(inputs(1, WIDTHS[0]),)
    )
    return module, params, model, moved(adapters)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype


def on_host(tree):
    return jax.tree.map(np.asarray, tree)
