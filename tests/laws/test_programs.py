"""How many programs adapted layers take, and how often one kind of layer is traced."""

from __future__ import annotations

import re

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from tests.support.models import inputs, linen_variables

X = inputs(5, 24)
CONFIG = dora.DoRAConfig(rank=4)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Chain(nnx.Module):
    """Equal layers, with a `tanh` between them."""

    def __init__(self, depth, rngs):
        self.layers = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def adapted(depth, config=CONFIG):
    return dora.apply_dora(Chain(depth, nnx.Rngs(0)), config, rngs=nnx.Rngs(1), inputs=(X,))


def programs_of(call):
    """Returns how many programs a call compiles."""
    compiled = []

    def listen(event, duration, **_):
        if event == _COMPILED:
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


@pytest.mark.parametrize("call", [lambda model: model(X), lambda model: scales(model)])
def test_a_first_call_outside_of_jit_compiles_few_programs(call):
    model = adapted(2)
    Chain(2, nnx.Rngs(0))(X)  # those of the plain layers
    assert 0 < programs_of(lambda: call(model)) <= 3


def scales(model):
    return [layer.scale[...] for layer in dora.precompute_scales(model).layers]


@pytest.mark.parametrize("switches", [{}, {"norm_gradient": "detached"}, {"decompose": False}])
def test_equal_layers_are_traced_once(switches):
    config = dora.DoRAConfig(rank=4, **switches)
    graph, adapters, rest = nnx.split(adapted(5, config), dora.DoRAParam, ...)

    def loss(adapters):
        return jnp.sum(nnx.merge(graph, adapters, rest, copy=True)(X))

    assert kinds(loss, adapters) == 1
    # Forward and backward; the first layer has another backward pass, without a gradient of X.
    assert kinds(jax.grad(loss), adapters) == 4


def test_layers_of_two_kinds_are_traced_apart():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(24, name="down")(nn.Dense(32, name="up")(x))

    params = linen_variables(Two(), X)["params"]
    model, adapters = dora.apply_dora(
        Two(), CONFIG, params=params, rng=jax.random.key(0), inputs=(X,)
    )
    call = lambda adapters: model.apply({"params": params, "dora": adapters}, X)  # noqa: E731
    assert kinds(call, adapters) == 2


def kinds(function, *args):
    """Returns how many functions a program has for what follows a plain layer's output."""
    text = jax.jit(function).lower(*args).as_text()
    return len(re.findall(r"func\.func private @_of_kind\w*", text))
