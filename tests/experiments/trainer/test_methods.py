"""Each method trains the variables that its name says, and starts from the pretrained model."""

import dataclasses

import jax
import pytest
from flax import nnx

import dora_jax as dora
from experiments.models.bert import BertEncoder
from experiments.models.bert_classifier import BertClassifier
from experiments.trainer.classification import count, cross_entropy
from experiments.trainer.methods import METHODS
from experiments.trainer.step import TrainStep
from tests.experiments.tiny_models import BERT

RANK, HIDDEN, WIDE = 2, BERT.hidden_size, BERT.intermediate_size
FACTORS = RANK * (4 * 2 * HIDDEN + 2 * (HIDDEN + WIDE))
MAGNITUDES = 4 * HIDDEN + WIDE + HIDDEN
HEAD = 2 * HIDDEN + 2


def base():
    return BertClassifier(BertEncoder(BERT, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", FACTORS + HEAD),
        ("dora", FACTORS + MAGNITUDES + HEAD),
        ("dora-frozen-magnitude", FACTORS + HEAD),
        ("dora-not-normalized", FACTORS + MAGNITUDES + HEAD),
    ],
)
def test_an_adapted_model_trains_its_adapters_and_the_new_head(name, expected):
    method = METHODS[name]
    model = nnx.eval_shape(lambda: method.adapt(base(), rank=RANK, alpha=4.0, seed=0))
    assert count(model, method.trainable) == expected


def test_full_fine_tuning_trains_every_parameter_of_the_base():
    method, model = METHODS["full"], nnx.eval_shape(base)
    assert method.adapt(model, rank=RANK, alpha=4.0, seed=0) is model
    assert count(model, method.trainable) == count(model, nnx.Param) > FACTORS


@pytest.mark.parametrize("name", ["full", "dora"])
def test_a_step_can_be_taken(name):
    method = METHODS[name]

    def step():
        model = method.adapt(base(), rank=RANK, alpha=4.0, seed=0)
        optimizer = nnx.Optimizer(model, method.optimizer(1e-3, 3.0), wrt=method.trainable)
        ids = jax.numpy.ones((2, 8), int)
        batch = {"input_ids": ids, "attention_mask": ids, "label": ids[:, 0]}
        take = TrainStep(model, optimizer, cross_entropy)
        return take(batch | {"weight": jax.numpy.ones(2)})

    loss, metrics, squares = nnx.eval_shape(step)
    assert loss.shape == metrics["accuracy"].shape == () and squares.ndim == 1


def test_every_switch_is_a_field_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(dora.DoRAConfig)}
    assert all(set(method.switches or {}) <= fields for method in METHODS.values())
