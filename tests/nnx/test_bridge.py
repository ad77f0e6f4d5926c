"""Adapted models across `flax.nnx.bridge`, in both directions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.nnx.bridge import variables as bridge_variables

import dora_jax as dora
from tests.support.models import LinenChain, NNXChain, inputs, linen_variables

CONFIG = dora.DoRAConfig(rank=2)
WIDTHS = (6, 8, 4)
X = inputs(5, WIDTHS[0])


@functools.partial(jax.jit, static_argnums=0)
def apply(module: linen.Module, variables) -> Any:
    return module.apply(variables, X)


class WithHead(linen.Module):
    """A Linen model around an adapted NNX model."""

    inner: linen.Module

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(self.inner(x))


def test_adapted_nnx_model_inside_a_linen_one():
    def plain():
        return NNXChain(WIDTHS, rngs=nnx.Rngs(0))

    adapted = nnx.bridge.ToLinen(lambda rngs: dora.apply_dora(plain(), CONFIG, rngs=rngs))
    module = WithHead(adapted)
    variables = jax.jit(module.init)(jax.random.key(0), X)  # the norms belong to these kernels
    assert set(variables) == {"params", "dora", "dora_base"}
    reference = WithHead(nnx.bridge.ToLinen(lambda rngs: plain()))
    expected = apply(reference, {"params": variables["params"]})
    np.testing.assert_array_equal(apply(module, variables), expected)

    def loss(adapters):
        return jnp.mean(apply(module, {**variables, "dora": adapters}) ** 2)

    adapters = variables["dora"]
    tx = dora.dora_optimizer(1e-2)

    @jax.jit
    def step(adapters):
        before, gradient = jax.value_and_grad(loss)(adapters)
        updates, _ = tx.update(gradient, tx.init(adapters), adapters)
        return before, loss(optax.apply_updates(adapters, updates))

    before, after = step(adapters)
    assert after < before


@pytest.mark.full
def test_adapted_linen_model_inside_an_nnx_one():
    chain = LinenChain(WIDTHS)
    params = linen_variables(chain, X)["params"]
    adapted, adapters = dora.apply_dora(
        chain, CONFIG, params=params, rng=jax.random.key(1), inputs=(X,)
    )
    model = nnx.bridge.ToNNX(adapted)  # holds the variables as attributes
    attributes = bridge_variables.linen_vars_to_nnx_attrs({"params": params, "dora": adapters})
    for name, value in attributes.items():
        setattr(model, name, nnx.data(value))
    np.testing.assert_array_equal(model(X), apply(chain, {"params": params}))

    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
    wrt = nnx.DiffState(0, dora.DoRAParam)
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    step = nnx.jit(nnx.value_and_grad(lambda model: jnp.mean(model(X) ** 2), argnums=wrt))
    first, grads = step(model)
    optimizer.update(model, grads)
    last, _ = step(model)
    assert last < first
    after = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    trained = dora.get_adapters(model)
    merged = dora.merge(adapted, params, trained)
    np.testing.assert_allclose(apply(chain, {"params": merged}), model(X), atol=1e-6)
