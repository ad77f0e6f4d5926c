"""A step in microbatches is the step of the whole batch; norms are computed once."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import dora_jax as dora
from experiments.trainer.settings import SettingsError
from experiments.trainer.step import WEIGHT, TrainStep

# The steps add the gradient itself, so that what they change is the gradient.
TX = optax.sgd(1.0)
CONFIG = dora.DoRAConfig(rank=2)
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.standard_normal((12, 5), np.float32),
    "y": RNG.standard_normal((12, 3), np.float32),
    "weight": RNG.integers(1, 5, 12).astype(np.float32),
}


def loss(model, batch):
    """A weighted mean, so that microbatches count differently."""
    each = jnp.mean((model(batch["x"]) - batch["y"]) ** 2, axis=-1)
    average = jnp.average(each, weights=batch["weight"])
    return average, {"error": jnp.sqrt(average) ** 2, WEIGHT: jnp.sum(batch["weight"])}


def adapted(config=CONFIG, dropout=0.0):
    @nnx.jit
    def make():
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(5, 3, rngs=rngs), nnx.Dropout(dropout, rngs=rngs))
        model = dora.apply_dora(model, config, rngs=rngs)
        for _, variable in nnx.iter_graph(model):  # where the factors matter to the norm
            if isinstance(variable, dora.DoRAParam):
                variable[...] += 0.3 * rngs.normal(variable.shape)
        return model

    model = make()
    model.train()
    return model, nnx.Optimizer(model, TX, wrt=dora.DoRAParam)


def stepped(microbatches):
    """What a step changes, by path, and what it reports."""
    model, optimizer = adapted()
    before = jax.tree.map(np.array, dora.get_adapters(model))
    step = TrainStep(model, optimizer, loss, microbatches=microbatches)
    outcome = step(BATCH)
    step.write_back()
    return jax.tree.map(lambda a, b: np.asarray(b) - a, before, dora.get_adapters(model)), outcome


def test_microbatches_give_the_gradient_loss_and_metrics_of_the_whole_batch():
    expected, whole = stepped(1)
    gradient, outcome = stepped(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outcome, whole)
    assert set(outcome.metrics) == {"error"}


def primitives(jaxpr, outside=True):
    """Counts the reciprocal square roots and square roots of a program, in and outside of loops."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("sqrt", "rsqrt"):
            found[outside] += 1
        for inner in jaxprs_in_params(equation.params):
            found += primitives(inner, outside and equation.primitive.name != "scan")
    return found


def test_norms_are_computed_outside_of_the_loop_over_microbatches():
    model, optimizer = adapted()
    step = TrainStep(model, optimizer, loss, microbatches=4)
    jaxpr = jax.make_jaxpr(step._run)(step._state, step._frozen, BATCH).jaxpr
    counts = primitives(jaxpr)
    assert counts[True] >= 1 and counts[False] == 1  # the metric alone


def test_every_microbatch_has_random_numbers_of_its_own():
    model, optimizer = adapted(dropout=0.5)
    step = TrainStep(model, optimizer, loss, microbatches=4)
    before = int(model.layers[1].rngs.count[...])
    step(BATCH)
    step.write_back()
    assert int(model.layers[1].rngs.count[...]) == before + 4


def test_microbatches_that_do_not_divide_the_batch_are_refused():
    model, optimizer = adapted()
    with pytest.raises(SettingsError, match="5 microbatches do not divide a batch of 12 rows"):
        TrainStep(model, optimizer, loss, microbatches=5)(BATCH)


def test_models_of_equal_structure_share_a_program():
    first, second = (TrainStep(*adapted(), loss) for _ in range(2))
    assert first._run is second._run
    assert first._run is not TrainStep(*adapted(), loss, microbatches=2)._run
