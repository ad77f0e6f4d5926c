"""Adaptive rank against a uniform one, where the layers of a teacher changed by different ranks.

    python -m tests.training.test_adaptive_rank_teacher 0 1 2

prints the errors of these seeds.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dora_jax as dora
from tests.support.models import adapted_chain, chain_params

WIDTHS = (32,) * 5
CHANGED = {"layer_1": 6, "layer_2": 2}  # and the other two by nothing
BUDGET, STEPS, BATCH = 8, 600, 64


def base_and_teacher():
    rng = np.random.default_rng(7)
    base = chain_params(WIDTHS)
    teacher = dict(base)
    for name, rank in CHANGED.items():
        width = WIDTHS[0]
        change = rng.normal(size=(width, rank)) @ rng.normal(size=(rank, width))
        kernel = base[name]["kernel"] + 1.2 * change / np.sqrt(width * rank)
        teacher[name] = {**base[name], "kernel": jnp.float32(kernel)}
    return base, teacher


def trained(rank, tx, seed):
    """Returns the model, its configuration, trained adapters and their error on inputs not seen."""
    base, teacher = base_and_teacher()
    config = dora.DoRAConfig(rank=rank, alpha=2.0 * rank)
    model = adapted_chain("linen", config, WIDTHS, params=base)

    def error(adapters, x):
        return jnp.mean(jnp.square(model.apply(base, adapters, x) - model.base(teacher, x)))

    def step(carry, key):
        adapters, state = carry
        gradients = jax.grad(error)(adapters, jax.random.normal(key, (BATCH, WIDTHS[0])))
        updates, state = tx.update(gradients, state, adapters)
        return (optax.apply_updates(adapters, updates), state), None

    @jax.jit
    def train(adapters, key):
        keys = jax.random.split(key, STEPS)
        adapters, _ = jax.lax.scan(step, (adapters, tx.init(adapters)), keys)[0]
        return adapters, error(adapters, jax.random.normal(jax.random.key(100), (2000, WIDTHS[0])))

    adapters, test_error = train(model.adapters, jax.random.key(seed))
    return model, config, adapters, float(test_error)


@functools.cache
def both(seed=0):
    tx = dora.dora_optimizer(optax.cosine_decay_schedule(5e-3, STEPS))
    adaptive = dora.training.adaptive_rank(tx, BUDGET, begin=STEPS // 6, end=3 * STEPS // 4)
    return trained(BUDGET // 4, tx, seed), trained(BUDGET, adaptive, seed)


@pytest.mark.full
def test_layers_that_changed_more_get_more_of_the_budget_and_the_error_falls():
    (*_, uniform), (_, _, adapters, adaptive) = both()
    ranks = dora.adapters.component_ranks(adapters)
    assert sum(ranks.values()) == BUDGET
    assert all((ranks[name] > 0) == (name in CHANGED) for name in ranks)
    assert adaptive <= 0.8 * uniform


@pytest.mark.full
def test_trained_adapters_compressed_merge_to_the_same_kernels():
    _, (model, config, adapters, _) = both()
    smaller, own = dora.adapters.compress(adapters, config)
    ranks = dora.adapters.component_ranks(adapters)
    assert {k: own.layer_settings((k,)).rank for k in ranks} == ranks
    small = adapted_chain("linen", own, WIDTHS, params=model.params)
    before, after = model.merge(model.params, adapters), small.merge(small.params, smaller)
    for name in ranks:
        np.testing.assert_allclose(
            after[name]["kernel"], before[name]["kernel"], rtol=1e-5, atol=1e-5
        )


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        (*_, uniform), (_, _, adapters, adaptive) = both(seed)
        ranks = list(dora.adapters.component_ranks(adapters).values())
        print(f"seed {seed}: {uniform:.5f} {adaptive:.5f} {adaptive / uniform:.2f} {ranks}")
