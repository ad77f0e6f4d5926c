"""Training steps: the library's step is the one written by hand, whole or in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.cases import bert
from experiments.benchmarks.steps import METHODS, make_program
from tests.experiments.tiny_models import BERT, filled, tiny_mlp


def tiny_bert():
    shape = dataclasses.replace(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    case = bert(texts=2, length=8, rank=2, shape=shape)
    return dataclasses.replace(case, build=lambda: filled(case.build))


CASES = {"mlp": functools.partial(tiny_mlp, depth=2), "bert": tiny_bert}


@functools.cache
def after_a_step(case, method, **options):
    """The trained arrays after a step, and the loss; all methods start from the same numbers.

    The adapter is not at its start, so that no gradient is zero.
    """
    case, library = CASES[case](), method.split("-")[0]
    model = case.build()
    program = make_program(METHODS[method], model, case.adapter, case.loss, **options)
    start = make_program(METHODS[library], model, case.adapter, case.loss).trainable
    rng = np.random.default_rng(3)
    leaves = [
        np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32) for x in jax.tree.leaves(start)
    ]
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.opt_state)
    trainable = jax.tree.unflatten(jax.tree.structure(program.trainable), leaves)
    after, _, loss = jax.jit(program.step)(trainable, program.frozen, opt_state, case.batch)
    return jax.tree.leaves(after), loss


def assert_same_step(one, other, atol):
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5)
    for array, expected in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(array, expected, atol=atol)


@pytest.mark.rows(1)
@pytest.mark.parametrize(
    ("case", "method", "by_hand"),
    [
        ("mlp", "lora", "lora-by-hand"),
        ("mlp", "dora", "dora-materialized"),
        pytest.param("bert", "dora", "dora-materialized", marks=pytest.mark.full),
    ],
)
def test_a_step_of_the_library_is_the_step_written_by_hand(case, method, by_hand):
    assert_same_step(after_a_step(case, method), after_a_step(case, by_hand), atol=2e-6)


@pytest.mark.rows(1)
@pytest.mark.parametrize("method", ["dora", "dora-hoisted"])
def test_microbatches_take_the_step_of_the_whole_batch(method):
    parts = after_a_step("mlp", method, microbatches=4)
    assert_same_step(parts, after_a_step("mlp", "dora"), atol=1e-6)


def test_every_method_trains_only_what_it_says():
    case = tiny_mlp()
    width, depth, rank = case.shape.width, case.shape.depth, case.adapter.rank
    lora = depth * 2 * rank * width
    wanted = {
        "full": depth * (width + 1) * width,
        "lora": lora,
        "lora-by-hand": lora,
        "dora": lora + depth * width,
        "dora-materialized": lora + depth * width,
    }
    model = case.abstract()
    for name, count in wanted.items():
        program = make_program(METHODS[name], model, case.adapter, case.loss)
        assert program.trainable_parameters == count, name
