"""The training loop: an interrupted run that is resumed ends like an unbroken one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from experiments.tasks.metrics import MetricsWriter, read_metrics
from experiments.tasks.task import Examples
from experiments.tasks.text import train_batches
from experiments.trainer.training import (
    DivergedError,
    Schedule,
    check_finite,
    evaluate,
    fit,
    logits_of,
)
from tests.experiments.tiny_task import WORDS, tiny_task

SCHEDULE = Schedule(1e-2, epochs=2, batch_size=4, checkpoint_every=3)
CONFIG = dora.DoRAConfig(rank=2, modules_to_save=["classifier"])
# One optimiser for all runs: a step of a new one is compiled again.
TX = dora.dora_optimizer(SCHEDULE.over(10))
TASK = tiny_task()


def adapted():
    model = dora.apply_dora(TASK.model(0), CONFIG, rngs=nnx.Rngs(2))
    return model, nnx.Optimizer(model, TX, wrt=dora.DoRAParam)


class InterruptionError(Exception):
    pass


class StoppingWriter(MetricsWriter):
    def write(self, step, split, values):
        if step == 8:
            raise InterruptionError
        super().write(step, split, values)


def run(folder, writer=MetricsWriter):
    """Trains in a folder, from its newest checkpoint on if it has one."""
    model, optimizer = adapted()
    with dora.Checkpoints(folder / "checkpoints", CONFIG) as checkpoints:
        first = checkpoints.latest_step()
        with writer(folder, resume_step=first and first + 1) as metrics:
            fit(model, optimizer, TASK, SCHEDULE, metrics, checkpoints=checkpoints)
    return model, first


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)[0]


def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(whole, tmp_path):
    folder, expected = whole
    with pytest.raises(InterruptionError):
        run(tmp_path, StoppingWriter)
    model, first = run(tmp_path)
    assert first == 6
    jax.tree.map(
        np.testing.assert_array_equal, dora.get_adapters(model), dora.get_adapters(expected)
    )
    assert read_metrics(tmp_path) == read_metrics(folder)


def diverging_task():
    """A task whose last batch alone has a word whose embedding is not finite."""
    words, tokens = TASK.train.tokens.input_ids.copy(), TASK.train.tokens
    numbered = dataclasses.replace(tokens, input_ids=words * 0 + np.arange(len(words))[:, None])
    batches = train_batches(numbered, TASK.train.labels, SCHEDULE.batch_size, seed=0)
    words[words == WORDS - 1] = 0
    words[[next(batches) for _ in range(5)][-1]["input_ids"][0, 0], 0] = WORDS - 1
    train = Examples(dataclasses.replace(tokens, input_ids=words), TASK.train.labels)
    return dataclasses.replace(TASK, train=train)


def test_the_first_loss_that_is_not_finite_stops_the_run_and_its_checkpoints_stay(tmp_path):
    model, optimizer = adapted()
    model.embed.embedding[...] = model.embed.embedding[...].at[WORDS - 1].set(np.nan)
    with (
        dora.Checkpoints(tmp_path / "checkpoints", CONFIG) as checkpoints,
        MetricsWriter(tmp_path) as metrics,
        pytest.raises(DivergedError) as raised,
    ):
        fit(model, optimizer, diverging_task(), SCHEDULE, metrics, checkpoints=checkpoints)
    message = str(raised.value)
    assert "\n" not in message and "at step 5: the loss is nan" in message
    assert "the gradients of classifier, hidden" in message
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    fresh, optimizer = adapted()
    with dora.Checkpoints(tmp_path / "checkpoints", CONFIG) as checkpoints:
        assert checkpoints.steps() == [3]
        checkpoints.restore(fresh, optimizer)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(dora.get_adapters(fresh)))


def test_a_gradient_that_is_not_finite_is_named_by_its_layer(whole):
    _, model = whole
    paths = [path for path, _ in jax.tree.leaves_with_path(nnx.state(model, dora.DoRAParam))]
    squares = np.ones(len(paths), np.float32)
    check_finite(3, 1.0, squares, model, dora.DoRAParam)
    squares[["hidden" in jax.tree_util.keystr(path) for path in paths].index(True)] = np.inf
    message = "at step 3: the loss is 1; not finite are the gradients of hidden. Nothing"
    with pytest.raises(DivergedError, match=message):
        check_finite(3, 1.0, squares, model, dora.DoRAParam)


def test_every_step_and_every_epoch_has_its_metrics(whole):
    lines = read_metrics(whole[0])
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 11))
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [5, 10]
    values = evaluate(whole[1], TASK.validation)
    assert {name: validation[-1][name] for name in values} == pytest.approx(values)


def test_evaluation_is_that_of_all_examples_without_dropout(whole):
    _, model = whole
    few = TASK.validation
    logits = logits_of(model, few)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = evaluate(model, few)
    assert logits.shape == (len(few), 2)
    assert values["loss"] == pytest.approx(-log_p[np.arange(len(few)), few.labels].mean(), rel=1e-5)
    assert values["accuracy"] == pytest.approx((logits.argmax(-1) == few.labels).mean())


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [float(SCHEDULE.over(100)(step)) for step in range(101)]
    assert rates[0] == 0 and rates[100] == pytest.approx(0, abs=1e-9)
    assert max(rates) == rates[10] == pytest.approx(1e-2)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
