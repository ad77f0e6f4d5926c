"""A GLUE task for sweeps: rows of all lengths are computed and scored as if each were alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from experiments.tasks.glue.splits import GlueSplits
from experiments.tasks.glue.sweep_task import EVAL_ROWS, EncoderSettings, GlueSweepTask
from experiments.tasks.glue.tables import TASKS
from experiments.tasks.sarcasm import DatasetError
from tests.experiments.tasks.glue_files import rows_of_words, write_encoder


def make(folder, key="rte", *, mismatched=None, **settings):
    scores = key == "stsb"
    splits = GlueSplits(
        rows_of_words(40, seed=0, scores=scores),
        rows_of_words(EVAL_ROWS + 6, seed=1, scores=scores),
        rows_of_words(5, seed=2, scores=scores),
        mismatched,
    )
    settings = {"max_length": 12, "name": "tiny", **settings}
    return GlueSweepTask(TASKS[key], splits, EncoderSettings(folder=folder, **settings)), splits


def outputs_of(task, model, batches):
    predict = nnx.jit(task.predict)
    return np.concatenate([np.asarray(predict(model, batch)) for batch in batches])


@pytest.mark.parametrize("kind", ["bert", pytest.param("roberta", marks=pytest.mark.full)])
def test_outputs_in_batches_are_those_of_each_row_alone(tmp_path, kind):
    """Alone: without padding, with what the tokenizer itself says of a pair's segments."""
    folder = write_encoder(tmp_path / "encoder", kind)
    task, splits = make(folder, "stsb")
    assert len(task.buckets) == 2
    model, batches = task.model(0), task.eval_batches("validation")
    found = task.score("validation", outputs_of(task, model, batches))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone = nnx.jit(lambda model, *inputs: model(*inputs))
    mean, spread = splits.train.labels.mean(), splits.train.labels.std()
    lengths, compared = (6, 9), 0  # each length is a program; one of each bucket
    for i, texts in enumerate(zip(splits.validation.first, splits.validation.second, strict=True)):
        pair = tokenizer.encode(*texts)
        if len(pair.ids) not in lengths:
            continue
        inputs = [np.array([x], np.int32) for x in (pair.ids, pair.attention_mask, pair.type_ids)]
        expected = float(alone(model, *inputs)[0, 0]) * spread + mean
        assert found.predictions[i] == pytest.approx(expected, abs=1e-5)
        compared += 1
    assert compared > 5
    np.testing.assert_array_equal(found.labels, splits.validation.labels)
    squares = np.square((found.predictions - found.labels) / spread)
    assert found.metrics["loss"] == pytest.approx(squares.mean(), rel=1e-4)
    assert found.metrics.keys() == {"pearson", "spearman", "loss"}
    # The second text of BERT has a type of its own.
    others = {**batches[0], "token_type_ids": np.zeros_like(batches[0]["token_type_ids"])}
    changed = outputs_of(task, model, [others]) - outputs_of(task, model, batches[:1])
    assert (np.abs(changed).max() > 1e-3) == (kind == "bert")


def test_classes_are_scored_by_the_published_metrics(tmp_path):
    task, splits = make(write_encoder(tmp_path / "encoder", "bert"), "mrpc")
    labels = splits.validation.labels
    logits = np.random.default_rng(0).standard_normal((len(labels), 2)).astype(np.float32)
    # In the order of the batches, and with numbers of its own in the rows that fill them up.
    where = {
        row.tobytes(): i for i, row in enumerate(task._parts["validation"][0].arrays["input_ids"])
    }
    outputs = []
    for batch in task.eval_batches("validation"):
        assert len(batch["label"]) == EVAL_ROWS
        ids = np.pad(batch["input_ids"], [(0, 0), (0, 12 - batch["input_ids"].shape[1])])
        order = [where[row.tobytes()] for row in ids]
        seen = {j: i for i, j in reversed(list(enumerate(order)))}
        outputs.append([logits[j] if seen[j] == i else [9.0, -9.0] for i, j in enumerate(order)])
    found = task.score("validation", np.concatenate(outputs))
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predictions, logits.argmax(-1))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss = -np.log(shares[np.arange(len(labels)), labels]).mean()
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["accuracy"] == np.mean(logits.argmax(-1) == labels)
    assert found.metrics.keys() == {"accuracy", "f1", "loss"}


def test_mismatched_rows_are_scored_apart(tmp_path):
    mismatched = rows_of_words(9, seed=3)
    folder = write_encoder(tmp_path / "encoder", "bert")
    task, splits = make(folder, "mnli", mismatched=mismatched)
    rows = sum(len(batch["label"]) for batch in task.eval_batches("test"))
    found = task.score("test", np.tile([0.0, 1.0, 0.5], (rows, 1)))  # always class 1
    assert found.metrics["accuracy"] == np.mean(splits.test.labels == 1)
    assert found.metrics["accuracy_mismatched"] == np.mean(mismatched.labels == 1)
    assert len(found.predictions) == len(splits.test)
    assert "accuracy_mismatched" not in task.score("validation", np.zeros((640, 3))).metrics


@pytest.mark.parametrize("key", ["rte", "stsb"])
def test_loss_of_a_training_batch_is_the_mean_over_its_rows(tmp_path, key):
    task, splits = make(write_encoder(tmp_path / "encoder", "bert"), key)
    batch = next(task.batches(0, 8))
    outputs = np.random.default_rng(0).standard_normal((8, 1 if key == "stsb" else 2))
    with jax.disable_jit():
        loss = float(task.loss(lambda *_: jnp.asarray(outputs), batch)[0])
    if key == "stsb":
        scores = splits.train.labels.astype(np.float64)
        expected = (outputs[:, 0] - (batch["label"] - scores.mean()) / scores.std()) ** 2
    else:
        chosen = outputs[np.arange(8), batch["label"]]
        expected = np.log(np.exp(outputs).sum(-1)) - chosen
    assert loss == pytest.approx(expected.mean(), rel=1e-5)


def test_seeds_differ_in_rows_and_heads_and_not_in_lengths_and_encoder(tmp_path):
    task, _ = make(write_encoder(tmp_path / "encoder", "bert"))
    one, again, other = ([*itertools.islice(task.batches(s, 8), 7)] for s in (0, 0, 1))
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"])
        assert a["input_ids"].shape == c["input_ids"].shape
    assert any((a["input_ids"] != c["input_ids"]).any() for a, c in zip(one, other, strict=True))
    heads, encoders = [], []
    for seed in (0, 1):
        model = task.model(seed)
        heads.append(np.asarray(model.classifier.kernel[...]))
        encoders.append(jax.tree.leaves(nnx.state(model.encoder, nnx.Param)))
    assert (heads[0] != heads[1]).any()
    for a, b in zip(*encoders, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_encoder(tmp_path / "encoder", "bert")
    config = json.loads((folder / "config.json").read_text())
    for field, value, message in (
        ("type_vocab_size", 1, "gives the second text token type 1, but the model has 1"),
        ("vocab_size", 50, "has token .*, the model 50"),
        ("max_position_embeddings", 11, "--max-length 12: tiny has positions for 11 tokens"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(DatasetError, match=message):
            make(folder)


def test_rows_that_are_longer_than_all_that_are_trained_on_have_a_bucket(tmp_path):
    folder = write_encoder(tmp_path / "encoder", "bert")
    task, splits = make(folder)
    short = dataclasses.replace(rows_of_words(40), first=["w1"] * 40, second=["w2"] * 40)
    settings = EncoderSettings(folder=folder, name="tiny", max_length=12)
    task = GlueSweepTask(TASKS["rte"], dataclasses.replace(splits, train=short), settings)
    assert task.buckets == (8,)
    assert {b["input_ids"].shape[1] for b in task.eval_batches("validation")} == {8, 12}
    assert {b["input_ids"].shape[1] for b in itertools.islice(task.batches(0, 8), 5)} == {8}
