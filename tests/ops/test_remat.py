"""The gradient under rematerialisation: what is computed twice, and what is saved by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from dora_jax.ops import cheap_ways_alone
from tests.support import reference
from tests.support.models import inputs, linen_variables, random_adapters

WIDTH, HIDDEN = 8, 16
CONFIG = dora.DoRAConfig(rank=2)
X = inputs(5, WIDTH)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(x)))


class LinenModel(nn.Module):
    policy: object = None
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, policy=self.policy) if self.remat else LinenBlock
        for i in range(2):
            x = block(name=f"block_{i}")(x)
        return x


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])

    def __call__(self, x, policy=None, remat=True):
        run = nnx.remat(lambda block, x: block(x), policy=policy) if remat else NNXBlock.__call__
        for block in self.blocks:
            x = run(block, x)
        return x


def linen_loss(config, policy=None, remat=True):
    module = LinenModel(policy, remat)
    params = linen_variables(module, X)["params"]
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(2), inputs=(X,)
    )

    def loss(adapters):
        return jnp.sum(model.apply({"params": params, "dora": adapters}, X) ** 2)

    return loss, random_adapters(adapters)


def nnx_loss(config, policy=None, remat=True):
    model = dora.apply_dora(NNXModel(nnx.Rngs(1)), config, rngs=nnx.Rngs(2))
    graphdef, state = nnx.split(model)

    def loss(adapters):
        model = nnx.merge(graphdef, state, copy=True)
        dora.set_adapters(model, adapters)
        return jnp.sum(model(X, policy, remat) ** 2)

    return loss, random_adapters(dora.get_adapters(model))


FRONT_ENDS = pytest.mark.parametrize("make", [linen_loss, nnx_loss])


def products_with_kernels(make, *args) -> int:
    """Returns how many products of a whole batch with a frozen kernel a gradient makes."""
    loss, adapters = make(*args)
    with cheap_ways_alone():  # the exact ways form a small kernel whole
        text = jax.jit(jax.grad(loss)).lower(adapters).as_text()
    shapes = {f"tensor<5x{a}xf32>, tensor<{a}x{b}xf32>" for a, b in [(8, 16), (16, 8)]}
    lines = [line for line in text.splitlines() if "dot_general" in line]
    return sum(any(shape in line for shape in shapes) for line in lines)


@pytest.mark.rows(1)
@FRONT_ENDS
def test_the_policy_saves_the_product_that_lora_never_computes_again(make):
    lora = products_with_kernels(make, dora.DoRAConfig(rank=2, decompose=False))
    full = products_with_kernels(make, CONFIG)
    saved = products_with_kernels(make, CONFIG, dora.save_scaled("down"))
    assert full == lora + 2  # the last projection of each block
    assert saved == lora
    assert products_with_kernels(make, CONFIG, dora.save_scaled("own")) == full


@pytest.mark.rows(1)
@FRONT_ENDS
@pytest.mark.parametrize("layers", [(), ("down",), ("blocks.down", "block_0.down")])
def test_the_gradient_does_not_depend_on_the_policy(make, layers):
    loss, adapters = make(CONFIG, dora.save_scaled(*layers))
    plain, _ = make(CONFIG, None, False)
    found, expected = (jax.jit(jax.grad(f))(adapters) for f in (loss, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert reference.relative_error(one, other) <= 1e-5


@FRONT_ENDS
def test_what_is_saved_has_the_size_of_the_output(make):
    loss, adapters = make(CONFIG, dora.save_scaled("down"))
    bare, _ = make(CONFIG)
    count = functools.partial(_saved_outputs, adapters)
    assert count(loss) - count(bare) == 2 * 5 * WIDTH


def _saved_outputs(adapters, loss) -> int:
    """Returns the number of saved numbers that grow with the batch."""
    residuals = jax.eval_shape(lambda a: jax.vjp(loss, a)[1], adapters)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals) if leaf.shape[:1] == (5,))
