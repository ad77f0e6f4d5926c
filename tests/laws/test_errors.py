"""Every misuse of the front ends has an error that names the layer and the fix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from tests.support.models import FRONT_ENDS, adapted_chain, inputs, linen_variables, random_adapters

CONFIG = dora.DoRAConfig(rank=2)
X = inputs(5, 16)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="up")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(3, name="down")(x)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.down = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.norm(self.up(x)))


LINEN = LinenModel()
PARAMS = linen_variables(LINEN, X)["params"]


def adapt_linen(module=LINEN, params=PARAMS, **fields):
    return dora.apply_dora(
        module,
        dora.DoRAConfig(**{"rank": 2, **fields}),
        params=params,
        rng=jax.random.key(1),
        inputs=(X,),
    )


def adapt_nnx(**fields):
    model = NNXModel(nnx.Rngs(0))
    return dora.apply_dora(model, dora.DoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": ["upp"]},
            dora.errors.ConfigError,
            r"'upp' matches nothing. Nearest.*'up'",
        ),
        (
            {"target_modules": "model.*"},
            dora.errors.ConfigError,
            "no layer's dotted path.*: down, up",
        ),
        (
            {"target_modules": ["norm"]},
            dora.errors.LayoutError,
            "'norm', but that module is no layer",
        ),
        (
            {"exclude_modules": ["up", "down"]},
            dora.errors.ConfigError,
            "no layer matched target_modules",
        ),
        (
            {"modules_to_save": ["hed"]},
            dora.errors.ConfigError,
            "modules_to_save entry 'hed' matches no",
        ),
        (
            {"rank_pattern": {"upp": 1}},
            dora.errors.ConfigError,
            "rank_pattern key 'upp' matches no adap",
        ),
    ],
)
@pytest.mark.parametrize("adapt", [adapt_linen, adapt_nnx])
def test_a_configuration_that_does_not_fit_the_model(adapt, fields, error, message):
    with pytest.raises(error, match=message):
        adapt(**fields)


def test_every_error_is_a_value_error():
    for error in (dora.errors.ConfigError, dora.errors.LayoutError, dora.errors.AdapterError):
        assert issubclass(error, dora.DoRAError)
        assert issubclass(error, ValueError)


def test_adapting_twice():
    with pytest.raises(
        dora.errors.AdapterError, match=r"adapted already \(\w+ has an adapter\); merge it"
    ):
        dora.apply_dora(adapt_nnx(), CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(dora.errors.AdapterError, match="adapted already: merge it first"):
        adapt_linen(module=adapt_linen()[0])


def test_merging_twice():
    merged = dora.merge(adapt_nnx())
    for function in (dora.merge, dora.check_base):
        with pytest.raises(dora.errors.AdapterError, match="the model has no adapter"):
            function(merged)
    model, adapters = adapt_linen()
    adapters = random_adapters(adapters)
    once = dora.merge(model, PARAMS, adapters)
    with pytest.raises(dora.errors.AdapterError, match="the kernel changed since apply_dora"):
        dora.merge(model, once, adapters)


@pytest.mark.full
def test_adapting_anew_after_merging_is_no_error():
    again = dora.apply_dora(dora.merge(adapt_nnx()), CONFIG, rngs=nnx.Rngs(0))
    assert np.all(np.asarray(again(X) == NNXModel(nnx.Rngs(0))(X)))


@pytest.mark.parametrize("model", [jnp.ones(3), {"kernel": jnp.ones(3)}, None, nnx.Linear])
def test_adapting_what_is_no_module(model):
    with pytest.raises(TypeError, match=r"expected a flax.nnx.Module or a flax.linen.Module, got"):
        dora.apply_dora(model, CONFIG, rngs=nnx.Rngs(0))


def test_merging_needs_all_parts():
    model, adapters = adapt_linen()
    with pytest.raises(TypeError, match="an NNX model carries its arrays: leave out params"):
        dora.merge(adapt_nnx(), adapters)
    with pytest.raises(TypeError, match="a Linen model needs adapters too"):
        dora.merge(model, PARAMS)
    with pytest.raises(TypeError, match=r"expected an adapted flax.nnx.Module or a DoRAModel"):
        dora.merge(PARAMS, adapters, CONFIG)
    with pytest.raises(dora.errors.AdapterError, match="the adapter tree is empty"):
        dora.merge(model, PARAMS, {})


def test_applying_without_adapters():
    model, _ = adapt_linen()
    with pytest.raises(dora.errors.AdapterError, match="variables has no collection 'dora'"):
        model.apply({"params": PARAMS}, X)


def test_giving_all_variables_for_the_parameters():
    with pytest.raises(dora.errors.ConfigError, match=r"pass variables\['params'\]"):
        adapt_linen(params={"params": PARAMS})


@pytest.mark.parametrize(
    ("params", "missing"),
    [
        ({k: v for k, v in PARAMS.items() if k != "down"}, "down"),
        ({**PARAMS, "up": {"bias": PARAMS["up"]["bias"]}}, "up.kernel"),
    ],
)
def test_parameters_of_another_model(params, missing):
    """Flax would make new ones in silence."""
    with pytest.raises(dora.errors.AdapterError, match=f"no entry {missing} in the parameters"):
        adapt_linen(params=params)
    model, adapters = adapt_linen()
    with pytest.raises(dora.errors.AdapterError, match=missing.split(".")[0]):
        dora.merge(model, params, adapters)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_base_that_was_trained_by_mistake(front_end):
    """One step of 10 % on the kernels: the adapters' norms no longer hold."""
    chain = adapted_chain(front_end, CONFIG, (24, 17))
    changed = jax.tree.map(lambda leaf: 1.1 * leaf, chain.params)
    assert np.all(np.isnan(chain.apply(changed, chain.adapters, inputs(5, 24))))
    with pytest.raises(
        dora.errors.AdapterError, match="layer_0: the kernel changed since apply_dora"
    ):
        chain.merge(changed, chain.adapters)


def test_a_base_that_is_not_the_same_is_named_before_training():
    model, _ = adapt_linen()
    dora.check_base(model, PARAMS)
    other = linen_variables(LINEN, X, seed=9)["params"]
    with pytest.raises(dora.errors.AdapterError, match=r"(up|down): the kernel changed"):
        dora.check_base(model, other)


class OwnCallLinen(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class OwnCallNNX(nnx.Linear):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("target_modules", ["all-linear", ["own"]])
def test_a_layer_with_a_call_of_its_own_is_not_adapted_in_silence(target_modules):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(OwnCallLinen(4, name="own")(x))

    module = Model()
    params = linen_variables(module, X)["params"]
    with pytest.raises(dora.errors.LayoutError, match=r"own cannot be adapted: OwnCallLinen"):
        adapt_linen(module, params, target_modules=target_modules)
    model = nnx.Dict(
        own=OwnCallNNX(3, 4, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    )
    config = dora.DoRAConfig(rank=2, target_modules=target_modules)
    with pytest.raises(dora.errors.LayoutError, match=r"own cannot be adapted: OwnCallNNX"):
        dora.apply_dora(model, config, rngs=nnx.Rngs(0))


def test_a_failed_call_leaves_the_model_as_it_was():
    model = NNXModel(nnx.Rngs(0))
    with pytest.raises(dora.errors.ConfigError, match="layers_to_transform asks for"):
        dora.apply_dora(model, dora.DoRAConfig(rank=2, layers_to_transform=[0]), rngs=nnx.Rngs(0))
    assert type(model.up) is nnx.Linear
    assert nnx.graphdef(model) == nnx.graphdef(NNXModel(nnx.Rngs(0)))
