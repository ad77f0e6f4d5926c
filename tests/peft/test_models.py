"""Adapters that PEFT wrote, in models of several kinds: the same outputs, gradients, training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dora_jax.names import HFModule, Interleaved
from dora_jax.peft import folder as files
from tests.support.peft_models import FIXTURES, TWINS, build, loss, reference

LEARNING_RATE = 5e-3  # as in make_peft_fixtures.py


def twins(default, full):
    """Parametrises a test with names of twins, of which only some are in the default set."""
    rows = [*default, *(pytest.param(name, marks=pytest.mark.full) for name in full)]
    return pytest.mark.parametrize("name", rows)


@functools.cache
def built(name):
    """Returns the Flax twin with PEFT's base."""
    twin = TWINS[name]
    return build(twin, reference(twin.fixture, "base."), reference(twin.fixture, "input."))


@functools.cache
def adapted(name):
    """Returns the Flax twin with the adapter that PEFT wrote."""
    return built(name).load(FIXTURES / TWINS[name].fixture)


def relative(x, y):
    return float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())


# With numbered layers, "llama_some" and "llama_lora" have nothing in them that "llama" does not.
# The twins in the training test have the same outputs there.
@pytest.mark.rows(1)
@twins(
    ["bert", "llama_stacked", "tables_linen"],
    ["llama", "llama_some_stacked", "llama_lora_stacked", "convolutions", "tables", "attention"],
)
def test_outputs_are_pefts(name):
    y = reference(TWINS[name].fixture)["outputs"]
    assert relative(adapted(name)(), y) < 2e-6


@pytest.mark.rows(5)
@pytest.mark.parametrize("name", sorted(TWINS.keys() - {"llama_some", "llama_lora"}))
def test_what_was_read_is_written_again_bit_for_bit(name, tmp_path):
    fixture = FIXTURES / TWINS[name].fixture
    config, tensors = files.read(fixture)
    tree, own_config = built(name).read(fixture)
    built(name).abstract(own_config).save(tmp_path, adapters=tree)
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


@pytest.mark.rows(1)
@twins(["attention_linen", "convolutions_linen"], ["bert", "llama_stacked"])
def test_outputs_gradients_and_training_are_pefts(name, tmp_path):
    model = adapted(name)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

    @jax.jit
    def step(tree, state):
        def value(tree):
            outputs = model(tree)
            return loss(outputs), outputs

        (value, outputs), gradient = jax.value_and_grad(value, has_aux=True)(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, (value, outputs, gradient)

    tree, state, losses = model.tree, jax.jit(optimizer.init)(model.tree), []
    wanted = reference(TWINS[name].fixture)
    for i in range(len(wanted["losses"])):
        tree, state, (value, outputs, gradient) = step(tree, state)
        losses.append(value)
        if i == 0:  # a gradient has the shapes of the adapter, so that it can be written as one
            assert relative(outputs, wanted["outputs"]) < 2e-6
            model.save(tmp_path, adapters=gradient)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-4)
    assert wanted["losses"][-1] < 0.9 * wanted["losses"][0]

    own = files.read(tmp_path)[1]
    gradients = reference(TWINS[name].fixture, "gradient.")
    assert own.keys() == gradients.keys()
    for key, x in gradients.items():
        assert relative(own[key], x) < 1e-5, key


def rotate_neighbours(x, angles):
    """The rotary embedding of the original LLaMA, which turns the pairs (2k, 2k + 1)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


@pytest.mark.full
@twins(["llama_stacked"], ["llama"])
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
