"""A new adapted model is in the mode, train or eval, of the base it was made from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.names import IDENTITY
from dora_jax.peft import load_pretrained, save_pretrained
from tests.support.models import nnx_model, random_adapters

CONFIG = dora.DoRAConfig(rank=2, dropout=0.5)


class Part(nnx.Module):
    """A layer, and one that the mode matters to."""

    def __init__(self, rngs, mode_layer):
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.other = mode_layer(rngs)

    def __call__(self, x):
        return self.other(self.up(x))


class Model(nnx.Module):
    def __init__(self, rngs, mode_layer):
        self.parts = nnx.List([Part(rngs, mode_layer) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return self.head(x)


def dropout(rngs):
    return nnx.Dropout(0.5, rngs=rngs)


def batch_norm(rngs):
    return nnx.BatchNorm(4, rngs=rngs)


def nothing(rngs):
    return nnx.LayerNorm(4, rngs=rngs)


def adapt(model):
    return dora.apply_dora(model, CONFIG, rngs=nnx.Rngs(1))


def dropping(model):
    """Returns the layers whose adapter dropout acts."""
    return {
        ".".join(path)
        for path, layer in dora.nnx.adapted_layers(model).items()
        if not layer.lora_dropout.deterministic
    }


ALL = {"parts.0.up", "parts.1.up", "head"}


def abstract(make):
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


@pytest.mark.parametrize("mode_layer", [dropout, batch_norm])
def test_adapters_are_in_the_mode_of_the_base(mode_layer):
    model = abstract(lambda rngs: Model(rngs, mode_layer))
    assert dropping(adapt(model)) == ALL
    model.eval()
    assert dropping(adapt(model)) == set()
    model.parts[0].train()
    assert dropping(adapt(model)) == {"parts.0.up", "head"}


def test_dropout_tells_the_mode_where_batch_statistics_are_frozen():
    model = abstract(
        lambda rngs: Part(rngs, lambda rngs: nnx.Sequential(batch_norm(rngs), dropout(rngs)))
    )
    model.other.layers[0].use_running_average = True
    assert dropping(adapt(model)) == {"up"}


def test_a_model_that_has_no_mode_is_in_train_mode():
    model = abstract(lambda rngs: Model(rngs, nothing))
    model.eval()
    adapted = adapt(model)
    assert dropping(adapted) == ALL
    adapted.eval()
    assert dropping(adapted) == set()


def test_an_unset_mode_does_not_count():
    model = abstract(
        lambda rngs: Part(rngs, lambda rngs: nnx.Dropout(0.5, deterministic=None, rngs=rngs))
    )
    assert dropping(adapt(model)) == {"up"}


def test_adapters_loaded_into_a_model_that_has_no_mode_are_in_eval_mode(tmp_path):
    base = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    dora.save(tmp_path / "own", adapt(base), CONFIG)
    loaded = dora.load(tmp_path / "own", base)
    assert loaded.lora_dropout.deterministic
    loaded.train()
    assert not dora.load(tmp_path / "own", loaded).lora_dropout.deterministic


@pytest.mark.full
def test_a_loaded_model_is_in_the_mode_of_its_base(tmp_path):
    base = nnx_model(lambda rngs: Model(rngs, dropout))
    base.eval()
    trained = adapt(base)
    dora.set_adapters(trained, random_adapters(dora.get_adapters(trained)))
    dora.save(tmp_path / "own", trained, CONFIG)
    save_pretrained(trained, tmp_path / "peft", IDENTITY)
    loaded = dora.load(tmp_path / "own", base), load_pretrained(base, tmp_path / "peft", IDENTITY)
    call = jax.jit(lambda state: nnx.merge(nnx.graphdef(trained), state)(jnp.ones((2, 4))))
    for model in loaded:
        assert dropping(model) == set()
        np.testing.assert_array_equal(call(nnx.state(model)), call(nnx.state(trained)))
    with dora.Checkpoints(tmp_path / "run", CONFIG) as checkpoints:
        checkpoints.save(1, trained)
        other = adapt(nnx_model(lambda rngs: Model(rngs, dropout)))
        other.eval()
        checkpoints.restore(other)
    assert dropping(other) == set()
