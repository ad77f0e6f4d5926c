"""The training loop: an interrupted run that is resumed ends like an unbroken one."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.interrupts import InterruptError, raised
from experiments.tasks.metrics import read_metrics
from experiments.tasks.task import Examples
from experiments.tasks.text import train_batches
from experiments.trainer.classification import evaluate
from experiments.trainer.finite import DivergedError, check_finite
from experiments.trainer.loop import fit
from experiments.trainer.settings import TrainerSettings
from experiments.trainer.signals import SIGNALS, InterruptedStepError
from tests.experiments.tiny_task import WORDS
from tests.experiments.trainer.fits import (
    CONFIG,
    SCHEDULE,
    TASK,
    CallingBatches,
    adapted,
    run,
    training,
)


class InterruptionError(Exception):
    pass


def raise_it():
    raise InterruptionError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)[0]


def check_equal(folder, model, whole):
    """Checks that a run has the bits and the metrics of the unbroken one."""
    jax.tree.map(
        np.testing.assert_array_equal, dora.get_adapters(model), dora.get_adapters(whole[1])
    )
    assert read_metrics(folder) == read_metrics(whole[0])


def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(whole, tmp_path):
    with pytest.raises(InterruptionError):
        run(tmp_path, batches=CallingBatches(8, raise_it))
    model, fitted = run(tmp_path)
    assert fitted.resumed_from_step == 6
    check_equal(tmp_path, model, whole)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 5), (signal.SIGTERM, 7)])
def test_a_signal_saves_the_step_that_is_running(number, step, whole, tmp_path):
    """Step 5 is evaluated too."""
    before = [signal.getsignal(each) for each in SIGNALS]
    batches = CallingBatches(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(InterruptedStepError, match=f"at step {step}, which is saved") as found:
        run(tmp_path, batches=batches)
    assert (found.value.number, found.value.saved_step) == (number, step)
    assert before == [signal.getsignal(each) for each in SIGNALS]
    model, fitted = run(tmp_path)
    assert fitted.resumed_from_step == step
    check_equal(tmp_path, model, whole)


def test_a_run_that_is_not_saved_leaves_signals_to_others(tmp_path):
    """Nothing could be saved, so that nothing is gained by waiting."""
    batches = CallingBatches(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptError) as found, raised():
        run(tmp_path, config=None, best=None, batches=batches)
    assert found.type is InterruptError and not (tmp_path / "checkpoints").exists()


def diverging_task():
    """A task whose last batch alone has a word whose embedding is not finite."""
    words, tokens = TASK.train.tokens.input_ids.copy(), TASK.train.tokens
    numbered = dataclasses.replace(tokens, input_ids=words * 0 + np.arange(len(words))[:, None])
    batches = train_batches(numbered, TASK.train.labels, SCHEDULE.batch_size, seed=0)
    words[words == WORDS - 1] = 0
    words[[next(batches) for _ in range(5)][-1]["input_ids"][0, 0], 0] = WORDS - 1
    train = Examples(dataclasses.replace(tokens, input_ids=words), TASK.train.labels)
    return dataclasses.replace(TASK, train=train)


def check_saved(folder, steps):
    """Checks which steps of a run were saved, and that they are finite."""
    fresh, optimizer = adapted()
    with dora.Checkpoints(folder / "checkpoints", CONFIG) as checkpoints:
        assert checkpoints.steps() == steps
        checkpoints.restore(fresh, optimizer)
    arrays = jax.tree.leaves((dora.get_adapters(fresh), nnx.state(optimizer)))
    assert all(np.isfinite(x).all() for x in arrays)


@pytest.mark.parametrize("asked", [False, True], ids=["alone", "with a signal"])
def test_the_first_loss_that_is_not_finite_stops_the_run_and_its_checkpoints_stay(tmp_path, asked):
    model, optimizer = adapted()
    model.embed.embedding[...] = model.embed.embedding[...].at[WORDS - 1].set(np.nan)
    diverging = training(model, optimizer, diverging_task())
    if asked:  # while the step runs whose loss is not finite: it is not saved either
        batches = CallingBatches(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        batches._batches = diverging.batches
        diverging = dataclasses.replace(diverging, batches=batches)
    with pytest.raises(DivergedError) as found:
        fit(diverging, tmp_path)
    message = str(found.value)
    assert "\n" not in message and "at step 5: the loss is nan" in message
    assert "the gradients of classifier, hidden" in message
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "best").exists()
    check_saved(tmp_path, [3])


def test_an_evaluation_that_is_not_finite_is_neither_saved_nor_the_best(tmp_path):
    model, optimizer = adapted()
    values = iter([0.5, np.nan])
    figures = {"evaluate": lambda _: {"loss": next(values)}, "evaluate_every": 2}
    with pytest.raises(DivergedError, match="at step 4: the validation loss is nan"):
        fit(training(model, optimizer, checkpoint_every=4, **figures), tmp_path)
    assert [m["loss"] for m in read_metrics(tmp_path) if m["split"] == "validation"] == [0.5]
    assert not list((tmp_path / "checkpoints").iterdir())
    best = dora.checkpoint.read_adapters(tmp_path / "best").adapters
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(best))


def test_the_best_adapters_are_those_of_the_lowest_figure_in_all_attempts(tmp_path):
    """The second attempt has figures that are lower than its first, but not than the best."""
    losses, seen = {2: 0.7, 4: 0.2, 6: 0.6, 8: 0.4, 10: 0.3}, {}

    def figures(attempt):
        steps = iter(attempt)

        def evaluated(model):
            step = next(steps)
            seen[step] = jax.tree.map(np.array, dora.get_adapters(model))
            return {"loss": losses[step]}

        return {"evaluate": evaluated, "evaluate_every": 2, "checkpoint_every": 5}

    with pytest.raises(InterruptionError):
        run(tmp_path, batches=CallingBatches(7, raise_it), **figures([2, 4, 6]))
    run(tmp_path, **figures([6, 8, 10]))
    kept = dora.checkpoint.read_adapters(tmp_path / "best").adapters
    jax.tree.map(np.testing.assert_array_equal, kept, seen[4])


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
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 11))
    assert all(line.keys() == {"step", "split", "loss", "accuracy"} for line in train)
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [5, 10]
    values = evaluate(whole[1], TASK.validation)
    assert {name: validation[-1][name] for name in values} == pytest.approx(values)


def test_a_run_that_is_neither_saved_nor_evaluated_has_the_same_steps(whole, tmp_path):
    model, fitted = run(tmp_path, config=None, best=None, evaluate=None)
    assert fitted.seconds_per_step > 0
    jax.tree.map(
        np.testing.assert_array_equal, dora.get_adapters(model), dora.get_adapters(whole[1])
    )
    lines = [line for line in read_metrics(whole[0]) if line["split"] == "train"]
    assert read_metrics(tmp_path) == lines


@pytest.mark.full
def test_a_trace_of_some_steps_is_written(tmp_path):
    settings = TrainerSettings(profile=tmp_path / "profile")
    run(tmp_path, settings)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
