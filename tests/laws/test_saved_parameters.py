"""Every parameter that `modules_to_save` names is trained, and nothing else of the base is."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.errors import ConfigError
from dora_jax.names import IDENTITY
from dora_jax.peft import PeftError, save_pretrained
from tests.support.models import linen_variables, nnx_model, random_adapters
from tests.support.quick import quick_jit

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
SAVED = ["cls_token", "pos", "norm", "head"]


class Position(nnx.Param):
    """A class of parameters of a user's own."""


class NNXNorm(nnx.Module):
    def __init__(self):
        self.gain = Position(jnp.ones(4))

    def __call__(self, x):
        return x * self.gain[...]


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.cls_token = nnx.Param(jnp.ones(4))
        self.pos = Position(jnp.ones(4))
        self.temperature = nnx.Param(jnp.ones(()))
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.norm = NNXNorm()
        self.head = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        x = (x + self.cls_token[...]) * self.pos[...]
        return self.head(self.norm(self.up(x))) / self.temperature[...]


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x * self.param("magnitude", linen.initializers.ones, (4,))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        cls_token, pos, temperature = (
            self.param(name, linen.initializers.ones, shape)
            for name, shape in (("cls_token", (4,)), ("pos", (4,)), ("temperature", ()))
        )
        x = linen.Dense(4, name="up")((x + cls_token) * pos)
        return linen.Dense(3, name="head")(LinenNorm(name="norm")(x)) / temperature


CONFIG = dora.DoRAConfig(rank=2, target_modules=["up"], modules_to_save=SAVED)


def base():
    return nnx_model(NNXModel)


def trained_in_nnx():
    """Returns the paths that one gradient reaches, by whether the optimiser moved them."""
    model = dora.apply_dora(base(), CONFIG, rngs=nnx.Rngs(1))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    graphdef, trained, rest = nnx.split(model, dora.DoRAParam, ...)

    def loss(trained):
        return jnp.sum(nnx.merge(graphdef, trained, rest)(X) ** 2)

    before = dora.get_adapters(model)
    grads = quick_jit(jax.grad(loss))(trained)
    nnx.update(model, jax.tree.map(lambda x, g: x - 0.1 * g, trained, grads))
    return model, before, dora.get_adapters(model)


def moved(before, after):
    return {name for name, change in dora.adapters.diff(before, after).items() if change > 0}


ADAPTER = {"up.lora_a", "up.lora_b", "up.magnitude"}


def test_every_parameter_of_an_nnx_model_is_trained():
    model, before, after = trained_in_nnx()
    assert moved(before, after) == ADAPTER | {
        "cls_token",
        "pos",
        "norm.gain",
        "head.kernel",
        "head.bias",
        "head.lora.lora_a",
        "head.lora.lora_b",
    }
    merged = dora.merge(model)
    kinds = {".".join(path): type(v) for path, v in nnx.to_flat_state(nnx.state(merged))}
    assert kinds == {".".join(p): type(v) for p, v in nnx.to_flat_state(nnx.state(base()))}
    np.testing.assert_array_equal(merged.pos[...], after["pos"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model.pos))[...], after["pos"])


def test_every_parameter_of_a_linen_model_is_trained():
    module = LinenModel()
    params = linen_variables(module, X)["params"]
    model, adapters = dora.apply_dora(
        module, CONFIG, params=params, rng=jax.random.key(1), inputs=(X,)
    )
    adapters = random_adapters(adapters)

    def loss(adapters):
        return jnp.sum(model.apply({"params": params, "dora": adapters}, X) ** 2)

    after = jax.tree.map(lambda x, g: x - 0.1 * g, adapters, quick_jit(jax.grad(loss))(adapters))
    saved = {"cls_token", "pos", "norm.magnitude", "head.kernel", "head.bias"}
    assert moved(adapters, after) == ADAPTER | saved
    merged = dora.merge(model, params, after)
    np.testing.assert_array_equal(merged["pos"], after["pos"])
    assert merged["temperature"] == params["temperature"]


def test_parameters_next_to_modules_are_saved_and_loaded(tmp_path):
    model, _, trained = trained_in_nnx()
    dora.save(tmp_path / "a", model, CONFIG)
    loaded = dora.load(tmp_path / "a", base())
    assert not moved(dora.get_adapters(loaded), trained)


@pytest.mark.parametrize("name", ["kernel", "up.kernel", "norm.gain", "temperatur"])
def test_a_parameter_inside_a_layer_is_named_by_its_layer(name):
    config = dora.DoRAConfig(rank=2, target_modules=["up"], modules_to_save=[name])
    with pytest.raises(ConfigError, match=r"modules_to_save entry .* matches nothing"):
        dora.apply_dora(base(), config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ("cls_token", "^cls_token is trained in full and stands"),
        ("head", "^head.lora holds factors"),
    ],
)
def test_what_peft_does_not_have_is_not_written_for_it(saved, problem, tmp_path):
    config = dora.DoRAConfig(rank=2, target_modules=["up"], modules_to_save=[saved])
    model = dora.apply_dora(base(), config, rngs=nnx.Rngs(1))
    with pytest.raises(PeftError, match=problem):
        save_pretrained(model, tmp_path / "a", IDENTITY)
