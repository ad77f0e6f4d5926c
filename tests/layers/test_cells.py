"""Recurrent cells and attention: layers that hold layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.linen import ExampleCall
from tests.support.layers.laws import close
from tests.support.models import linen_variables, nnx_model, random_adapters, same
from tests.support.quick import quick_jit

# Cells and wrappers that hold layers.
CELLS = {
    "linen": [
        lambda: linen.RNN(linen.SimpleCell(3)),
        lambda: linen.RNN(linen.MGUCell(3)),
        lambda: linen.Bidirectional(linen.RNN(linen.GRUCell(3)), linen.RNN(linen.LSTMCell(3))),
        lambda: linen.RNN(linen.ConvLSTMCell(3, (2,))),
    ],
    "nnx": [
        lambda rngs: nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs)),
        lambda rngs: nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs)),
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs)), nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs))
        ),
    ],
}


@pytest.mark.rows(2)
@pytest.mark.parametrize("index", range(len(CELLS["linen"])))
def test_linen_recurrent_layers_compute_what_merged_ones_do(index):
    module: Any = CELLS["linen"][index]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)[-4 + (index < 3) :]), float)
    params = linen_variables(module, x)["params"]
    model, adapters = dora.apply_dora(
        module,
        dora.DoRAConfig(rank=2, target_modules=".*"),
        params=params,
        rng=jax.random.key(1),
        inputs=(x,),
    )
    base = quick_jit(lambda params: module.apply({"params": params}, x))
    apply = quick_jit(lambda adapters: model.apply({"params": params, "dora": adapters}, x))
    assert same(apply(adapters), base(params))
    trained = random_adapters(adapters)
    merged = quick_jit(lambda *parts: dora.merge(model, *parts))(params, trained)
    assert close(apply(trained), base(merged))


@pytest.mark.rows(1)
@pytest.mark.parametrize("index", range(len(CELLS["nnx"])))
def test_nnx_recurrent_layers_compute_what_merged_ones_do(index):
    base: Any = nnx_model(CELLS["nnx"][index])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2, target_modules=".*"), rngs=nnx.Rngs(1))
    run = nnx.jit(lambda model: model(x))
    assert same(run(adapted), run(base))
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    assert close(run(adapted), run(dora.merge(adapted)))


@pytest.mark.full
def test_linen_attention_decodes_step_by_step_what_it_computes_at_once():
    attention = functools.partial(linen.MultiHeadDotProductAttention, num_heads=2)
    whole, step = attention(), attention(decode=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    mask = linen.make_causal_mask(x[..., 0])
    variables = linen_variables(step, x)
    params, cache = variables["params"], variables["cache"]
    settings = dora.DoRAConfig(rank=2)
    adapt = functools.partial(dora.apply_dora, params=params, rng=jax.random.key(1))
    at_once, adapters = adapt(whole, settings, inputs=ExampleCall((x,), kwargs={"mask": mask}))
    by_step, _ = adapt(step, settings, inputs=ExampleCall((x[:, :1],), variables={"cache": cache}))
    trained = random_adapters(adapters)
    merged = quick_jit(lambda *parts: dora.merge(at_once, *parts))(params, trained)

    def decode(model, variables):
        @quick_jit
        def one(cache, x_t):
            return model.apply({**variables, "cache": cache}, x_t, mutable=["cache"])

        state, outputs = cache, []
        for t in range(x.shape[1]):
            y, updated = one(state, x[:, t : t + 1])
            state = updated["cache"]
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    expected = quick_jit(at_once.apply)({"params": params, "dora": trained}, x, mask=mask)
    assert close(decode(by_step, {"params": params, "dora": trained}), expected)
    assert close(decode(step, {"params": merged}), expected)


def test_nnx_attention_decodes_step_by_step_what_it_computes_at_once():
    base = nnx_model(lambda rngs: nnx.MultiHeadAttention(num_heads=2, in_features=6, rngs=rngs))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    mask = nnx.make_causal_mask(x[..., 0])
    expected = nnx.jit(lambda model, x: model(x, mask=mask, decode=False))(adapted, x)
    one = nnx.jit(lambda model, x: model(x, decode=True))
    for attention in (adapted, dora.merge(adapted)):
        attention.init_cache(x.shape)
        steps = [one(attention, x[:, t : t + 1]) for t in range(x.shape[1])]
        assert close(jnp.concatenate(steps, axis=1), expected)
