"""Adapters that PEFT wrote, in models of several kinds: the same outputs, gradients, training."""

from __future__ import annotations

import dataclasses
import functools

import pytest

pytest.importorskip("safetensors")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dora_jax.names import HFModule, Interleaved
from dora_jax.peft import folder as files
from tests.support.peft_models import FIXTURES, TWINS, build, loss, reference

LEARNING_RATE = 5e-3  # as in make_peft_fixtures.py
# With numbered layers, the latter two have nothing in them that "llama" does not have.
NAMES = sorted(TWINS.keys() - {"llama_some", "llama_lora"})
TRAINED = ("bert", "llama_stacked", "convolutions_linen")


@functools.cache
def adapted(name):
    """Returns the Flax twin with the adapter that PEFT wrote."""
    twin = TWINS[name]
    base, inputs = reference(twin.fixture, "base."), reference(twin.fixture, "input.")
    return build(twin, base, inputs).load(FIXTURES / twin.fixture)


def relative(x, y):
    return float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_pefts(name):
    y = reference(TWINS[name].fixture)["outputs"]
    assert relative(adapted(name)(), y) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_written_again_bit_for_bit(name, tmp_path):
    fixture = FIXTURES / TWINS[name].fixture
    config, tensors = files.read(fixture)
    adapted(name).save(tmp_path)
    again, written = files.read(tmp_path)
    own = {k: x for k, x in tensors.items() if ".base_layer." not in k}
    assert written.keys() == own.keys()
    for key, x in own.items():
        assert written[key].dtype == x.dtype
        np.testing.assert_array_equal(written[key], x, key)
    modules = [k for k in reference(TWINS[name].fixture, "base.")]
    for module in {key.rpartition(".")[0] for key in modules}:
        assert config.selects(module) == again.selects(module), module
        assert not config.selects(module) or scaling(config, module) == scaling(again, module)


def scaling(config, module):
    rank, alpha = config.rank(module), config.alpha(module)
    return alpha / (rank**0.5 if config.use_rslora else rank)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_and_training_are_pefts(name, tmp_path):
    model = adapted(name)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

    @jax.jit
    def step(tree, state):
        value, gradient = jax.value_and_grad(lambda tree: loss(model(tree)))(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value, gradient

    tree, state, losses = model.tree, optimizer.init(model.tree), []
    wanted_losses = reference(TWINS[name].fixture)["losses"]
    for i in range(len(wanted_losses)):
        tree, state, value, gradient = step(tree, state)
        losses.append(value)
        if i == 0:  # a gradient has the shapes of the adapter, so that it can be written as one
            model.save(tmp_path, adapters=gradient)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-4)
    assert wanted_losses[-1] < 0.9 * wanted_losses[0]

    own = files.read(tmp_path)[1]
    wanted = reference(TWINS[name].fixture, "gradient.")
    assert own.keys() == wanted.keys()
    for key, x in wanted.items():
        assert relative(own[key], x) < 1e-5, key


def rotate_neighbours(x, angles):
    """The rotary embedding of the original LLaMA, which turns the pairs (2k, 2k + 1)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


@pytest.mark.parametrize("name", ["llama", "llama_stacked"])
def test_interleaved_heads_are_reordered_magnitudes_too(name, monkeypatch, tmp_path):
    twin = TWINS[name]
    heads = {
        f"layers.{{i}}.self_attn.{n}_proj": HFModule(
            f"model.layers.{{i}}.self_attn.{n}_proj", Interleaved(head_dim=4)
        )
        for n in "qk"
    }
    twin = dataclasses.replace(twin, names=twin.names | heads)
    base, inputs = reference(twin.fixture, "base."), reference(twin.fixture, "input.")
    monkeypatch.setattr("experiments.models.llama.rotate", rotate_neighbours)
    model = build(twin, base, inputs).load(FIXTURES / twin.fixture)
    assert relative(model(), reference(twin.fixture)["outputs"]) < 2e-6
    model.save(tmp_path)
    for key, x in files.read(tmp_path)[1].items():
        np.testing.assert_array_equal(x, files.read(FIXTURES / twin.fixture)[1][key], key)
