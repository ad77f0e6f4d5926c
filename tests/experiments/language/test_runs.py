"""The optimiser of a run is AdamW at the run's learning rate, in one program for all rates."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import dora_jax as dora
from experiments.language.runs import Recipe, optimizer_of


@pytest.mark.rows(1)
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_updates_are_those_of_adamw_at_the_rate_of_each_step(decay):
    options = {"warmup": 2, "decay": decay, "weight_decay": 0.1, "magnitude_lr_ratio": 3.0}
    recipe = Recipe(rank=2, alpha=4.0, steps=6, batch_size=1, max_length=8, **options)
    model = dora.apply_dora(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1)
    )
    optimizer, rate = optimizer_of(model, recipe, 0.01), 0.01

    def rate_of(step):
        if step < 2:
            return rate * step / 2
        left = (step - 2) / 4
        return rate * (1 - left if decay == "linear" else (1 + np.cos(np.pi * left)) / 2)

    @nnx.jit
    def step(model, optimizer, scale):
        grads = jax.tree.map(lambda x: scale * (x + 1), nnx.state(model, dora.DoRAParam))
        optimizer.update(model, grads)

    def values():
        state = nnx.state(model, dora.DoRAParam)
        return {k: np.asarray(v[...], float) for k, v in nnx.to_flat_state(state)}

    expected = values()
    moments = {name: (0.0, 0.0) for name in expected}
    for number, scale in enumerate((1e-3, 1e-2, 2e-3, 1e-3, 5e-3)):  # too small to be clipped
        step(model, optimizer, scale)
        for name, x in expected.items():
            grad = scale * (x + 1)
            m, v = moments[name]
            moments[name] = m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            unbiased = m / (1 - 0.9 ** (number + 1)), v / (1 - 0.999 ** (number + 1))
            change = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + 0.1 * x
            ratio = 3.0 if name[-1] == "magnitude" else 1.0
            expected[name] = x - ratio * rate_of(number) * change
    found = values()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-7)
    assert isinstance(optimizer.tx, optax.GradientTransformation)


def test_runs_of_all_rates_have_one_program():
    recipe = Recipe(rank=2, alpha=4.0, steps=6, warmup=2, batch_size=1, max_length=8)
    model = dora.apply_dora(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1)
    )
    one, other = (nnx.split(optimizer_of(model, recipe, rate))[0] for rate in (0.1, 0.2))
    assert one == other and hash(one) == hash(other)
