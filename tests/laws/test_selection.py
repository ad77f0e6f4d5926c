"""Which layers are adapted, which are trained in full; and what `summary` says of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from tests.support import reference
from tests.support.models import (
    FRONT_ENDS,
    inputs,
    linen_variables,
    nnx_model,
    random_adapters,
    same,
)
from tests.support.operations import LAYERS, WIDTH, of_linen, of_nnx, parameters, stack
from tests.support.quick import quick_jit

# A model of numbered layers, a norm and a head. The parameters stand under the same paths, but for
# `layers_0` in Linen, which is `layers.0` in NNX.


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(WIDTH, name="down")(jnp.tanh(linen.Dense(8, name="up")(x)))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        for i in range(3):
            x = LinenBlock(name=f"layers_{i}")(x)
        return linen.Dense(5, name="head")(linen.LayerNorm(name="norm")(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.down = nnx.Linear(8, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Stages(nnx.Module):
    """Layers within stages: paths of two numbers."""

    def __init__(self, rngs):
        self.stages = nnx.List([NNXModel(rngs) for _ in range(2)])


def model(front_end, **fields):
    config = dora.DoRAConfig(**{"rank": 2, **fields})
    if front_end == "linen":
        module, x = LinenModel(), inputs(2, WIDTH)
        return of_linen(module, linen_params(), x, config)
    return of_nnx(NNXModel, parameters(nnx_model(NNXModel)), config)


@functools.cache
def linen_params():
    return linen_variables(LinenModel(), inputs(2, WIDTH))["params"]


def adapted(operations):
    """Returns the dotted paths of what is in the adapter tree, written as in NNX."""
    paths = jax.tree_util.tree_flatten_with_path(operations.adapters)[0]
    names = {".".join(str(key.key) for key in path[:-1]) for path, _ in paths}
    return {name.replace("layers_", "layers.") for name in names}


def selected(front_end, **fields):
    return adapted(model(front_end, **fields))


# Numbered layers.


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_are_selected_by_their_number(front_end):
    """A head, which has none, is not among them."""
    assert selected(front_end, layers_to_transform=[0, 2]) == {
        "layers.0.up",
        "layers.0.down",
        "layers.2.up",
        "layers.2.down",
    }
    assert selected(front_end, layers_to_transform=[-3, -1]) == selected(
        front_end, layers_to_transform=[0, 2]
    )
    only_up = selected(front_end, target_modules=["up"], layers_to_transform=[1])
    assert only_up == {"layers.1.up"}


@pytest.mark.rows(1)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_that_are_not_selected_compute_as_before(front_end):
    operations, x = model(front_end, layers_to_transform=[1]), inputs(5, WIDTH)
    assert same(
        jax.jit(operations.apply)(operations.params, operations.adapters, x),
        jax.jit(operations.base)(operations.params, x),
    )
    merged = operations.merge(operations.params, random_adapters(operations.adapters))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), merged, operations.params)
    paths = jax.tree_util.tree_flatten_with_path(changed)[0]
    names = {".".join(str(key.key) for key in path) for path, leaf in paths if leaf}
    assert {n.replace("layers_", "layers.") for n in names} == {
        "layers.1.up.kernel",
        "layers.1.down.kernel",
    }


def test_the_pattern_names_the_number_that_counts():
    def adapted_paths(**fields):
        config = dora.DoRAConfig(rank=2, target_modules=["up"], **fields)
        stages = dora.apply_dora(nnx_model(Stages), config, rngs=nnx.Rngs(1))
        return {layer.path for layer in dora.summary(stages).layers}

    assert adapted_paths(layers_to_transform=[1]) == {f"stages.1.layers.{i}.up" for i in range(3)}
    by_layer = {"stages.0.layers.2.up", "stages.1.layers.2.up"}
    assert adapted_paths(layers_to_transform=[2], layers_pattern="layers") == by_layer
    assert adapted_paths(layers_to_transform=[0], layers_pattern="stages") == {
        f"stages.0.layers.{i}.up" for i in range(3)
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 7]},
        {"layers_to_transform": [7], "target_modules": ["up"]},
        {"layers_to_transform": [7], "target_modules": ["head"]},
    ],
)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_number_that_no_layer_has_is_named(front_end, fields):
    with pytest.raises(dora.errors.ConfigError, match=r"layers_to_transform asks for \[7\]"):
        model(front_end, **fields)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_pattern_that_no_number_follows_is_named(front_end):
    with pytest.raises(dora.errors.ConfigError, match=r"asks for \[0\].*layers_pattern='blocks'"):
        model(front_end, layers_to_transform=[0], layers_pattern="blocks")


# Layers of a stack.


@functools.cache
def stack_with(front_end, indices=(0, 2)):
    config = dora.DoRAConfig(rank=2, layers_to_transform=indices)
    return stack(front_end, config)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_of_a_stack_that_are_not_selected_are_not_trained(front_end):
    """Exactly zero gradients: Adam would make a step of any other."""
    operations, x = stack_with(front_end), inputs(5, WIDTH)
    adapters = random_adapters(operations.adapters)

    @quick_jit
    def gradient(params, adapters, x):
        return jax.grad(lambda a: jnp.sum(jnp.sin(operations.apply(params, a, x))))(adapters)

    for leaf in jax.tree.leaves(gradient(operations.params, adapters, x)):
        assert len(leaf) == LAYERS
        assert np.all(np.asarray(leaf[1]) == 0)
        assert np.any(np.asarray(leaf[0]) != 0) and np.any(np.asarray(leaf[2]) != 0)


@pytest.mark.full
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_of_a_stack_that_are_not_selected_stay_as_they_are(front_end):
    """Whatever stands in their part of the adapter; also precomputed."""
    operations, x = stack_with(front_end), inputs(5, WIDTH)
    params, adapters = operations.params, random_adapters(operations.adapters)
    precomputed = operations.precompute_scales(params, adapters)
    assert np.all(np.asarray(precomputed["blocks"]["up"]["scale"][1]) == 1)
    apply = quick_jit(operations.apply)
    y = apply(params, adapters, x)
    kernel = params["blocks"]["up"]["kernel"]
    for tree in (adapters, precomputed):
        merged = operations.merge(params, tree)
        found = merged["blocks"]["up"]["kernel"]
        assert same(found[1], kernel[1])
        up = adapters["blocks"]["up"]
        expected = reference.merged(
            kernel, up["lora_a"], up["lora_b"], up["magnitude"], dora.DoRAConfig(rank=2).alpha / 2
        )
        for i in (0, 2):
            assert reference.relative_error(found[i], expected[i]) <= 2e-6
        assert reference.relative_error(quick_jit(operations.base)(merged, x), y) <= 1e-5
        assert reference.relative_error(apply(params, tree, x), y) <= 1e-6
    other = jax.tree.map(lambda leaf: leaf.at[1].set(9.0), adapters)
    assert same(apply(params, other, x), y)


@pytest.mark.parametrize("init", ["kaiming_uniform", "pissa"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_first_layer_alone_may_be_adapted(front_end, init):
    """Index 0 is no absence of an index."""
    config = dora.DoRAConfig(rank=2, layers_to_transform=[0], init=init)
    operations = stack(front_end, config)
    merged = operations.merge(operations.params, random_adapters(operations.adapters))
    found, kernel = (tree["blocks"]["up"]["kernel"] for tree in (merged, operations.params))
    assert same(found[1:], kernel[1:])
    assert not same(found[0], kernel[0])


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_place_behind_the_end_of_a_stack_is_named(front_end):
    message = r"blocks.up: layers_to_transform asks for \[1, 3\], but the stack has 3 layers"
    with pytest.raises(dora.errors.ConfigError, match=message):
        stack_with(front_end, (1, 3))


# Modules trained in full, and magnitudes alone.


def moved(adapters):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), adapters)


@pytest.mark.rows(1)
@pytest.mark.parametrize("saved", ["head", "norm"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_modules_to_save_are_trained_in_full_and_merged(front_end, saved):
    """A norm's `scale` is no precomputed one."""
    operations, x = model(front_end, modules_to_save=[saved]), inputs(5, WIDTH)
    params, adapters = operations.params, operations.adapters
    assert same(adapters[saved], params[saved])
    apply, base = quick_jit(operations.apply), quick_jit(operations.base)
    # Not to the last bit: XLA fuses the layers of the two into the norm's sums in another way.
    assert reference.relative_error(apply(params, adapters, x), base(params, x)) <= 5e-7
    trained = moved(adapters)
    merged = operations.merge(params, trained)
    assert same(merged[saved], trained[saved])
    y = apply(params, trained, x)
    assert reference.relative_error(base(merged, x), y) <= 1e-5
    assert (
        reference.relative_error(apply(params, operations.precompute_scales(params, trained), x), y)
        <= 1e-6
    )
    labels = dora.adapters.label_adapters(adapters)
    assert set(jax.tree.leaves(labels[saved])) == {"saved"}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_modules_may_be_trained_in_full_without_any_adapter(front_end):
    operations = model(front_end, target_modules=[], modules_to_save=["norm", "head"])
    assert adapted(operations) == {"norm", "head"}
    trained = moved(operations.adapters)
    merged = operations.merge(operations.params, trained)
    assert same({"norm": merged["norm"], "head": merged["head"]}, trained)
    assert operations.summary().trainable_parameters == 2 * WIDTH + WIDTH * 5 + 5


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_of_rank_zero_train_the_magnitude_alone(front_end):
    operations, x = model(front_end, rank_pattern={"up": 0}), inputs(5, WIDTH)
    numbered = (
        operations.adapters["layers"]["1"]
        if front_end == "nnx"
        else (operations.adapters["layers_1"])
    )
    assert jax.tree.map(jnp.shape, numbered) == {
        "up": {"magnitude": (8,)},
        "down": {"lora_a": (8, 2), "lora_b": (2, WIDTH), "magnitude": (WIDTH,)},
    }
    trained = random_adapters(operations.adapters)
    y = quick_jit(operations.apply)(operations.params, trained, x)
    merged = operations.merge(operations.params, trained)
    assert reference.relative_error(quick_jit(operations.base)(merged, x), y) <= 1e-5


# What the summary says.

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "numbered": {"layers_to_transform": [1], "target_modules": ["up"]},
    "a head in full": {"modules_to_save": ["head", "norm"]},
    "other ranks": {"rank_pattern": {"up": 0, "head": 3}, "alpha_pattern": {"down": 3.0}},
    "plain LoRA": {"decompose": False},
    "magnitude frozen": {"magnitude_trainable": False},
    "PiSSA": {"init": "pissa"},
}


def arrays(tree):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in paths}


@pytest.mark.rows(6)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_summary_counts_what_is_trained(front_end, settings):
    operations = model(front_end, **SETTINGS[settings])
    summary, trained = operations.summary(), arrays(operations.adapters)
    base, config = arrays(operations.params), dora.DoRAConfig(rank=2, **SETTINGS[settings])
    for row in summary.layers:
        path = tuple(row.path.split("."))
        kernel = base[*path, "kernel"]
        own = [leaf for p, leaf in trained.items() if p[:-1] == path]
        assert row.parameters == sum(leaf.size for leaf in own) > 0
        assert (*row.stack, *row.inputs, *row.outputs) == kernel.shape
        assert (row.rank, row.alpha) == (
            config.layer_settings(path).rank,
            config.layer_settings(path).alpha,
        )
        assert row.dtype == "float32"
        assert row.layer == {"linen": "Dense", "nnx": "Linear"}[front_end]
    assert summary.trainable_parameters == sum(leaf.size for leaf in trained.values())
    assert summary.base_parameters == sum(leaf.size for leaf in base.values())
    counted = dora.adapters.count_parameters(operations.adapters)
    assert summary.trainable_parameters == counted["total"]
    assert summary.saved_parameters == counted["saved"]
    assert f"{counted['total']:,} trainable parameters" in str(summary)
    assert all(row.path in str(summary) for row in summary.layers)


@pytest.mark.rows(6)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_dry_run_says_what_apply_dora_does(front_end, settings):
    config = dora.DoRAConfig(rank=2, **SETTINGS[settings])
    if front_end == "linen":
        found = dora.summary(
            LinenModel(), config, params=linen_params(), inputs=(inputs(2, WIDTH),)
        )
    else:
        found = dora.summary(nnx_model(NNXModel), config)
    assert found == model(front_end, **SETTINGS[settings]).summary()


def test_the_summary_of_a_stack_shows_its_length():
    (row,) = stack_with("linen").summary().layers
    assert (row.path, row.stack, row.inputs) == ("blocks.up", (LAYERS,), (WIDTH,))
    assert stack_with("nnx").summary().layers[0].parameters == row.parameters


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_precomputed_model_has_the_summary_of_the_adapted_one(front_end):
    config = dora.DoRAConfig(rank=2, magnitude_trainable=False)
    if front_end == "nnx":
        adapted = dora.apply_dora(nnx_model(NNXModel), config, rngs=nnx.Rngs(1))
        assert dora.summary(dora.precompute_scales(adapted)) == dora.summary(adapted)
    else:
        params, x = linen_params(), inputs(2, WIDTH)
        adapted, adapters = dora.apply_dora(
            LinenModel(), config, params=params, rng=jax.random.key(1), inputs=(x,)
        )
        precomputed = dora.precompute_scales(adapted, params, adapters)
        plain = dora.summary(adapted, params=params, adapters=adapters)
        assert dora.summary(adapted, params=params, adapters=precomputed) == plain


# A dry run of a model that would not fit in memory: of the shapes of LLaMA-7B.

HIDDEN, INNER, VOCABULARY, DEPTH = 4096, 11008, 32000, 32
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}


class LinenLlamaBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        for norm in ("input_norm", "attention_norm"):
            x = linen.RMSNorm(param_dtype=jnp.bfloat16, name=norm)(x)
        for name, (fan_in, fan_out) in PROJECTIONS.items():
            y = x if fan_in == HIDDEN else jnp.ones((*x.shape[:-1], fan_in), x.dtype)
            dense = linen.Dense(fan_out, use_bias=False, param_dtype=jnp.bfloat16, name=name)
            x = x + jnp.sum(dense(y), -1, keepdims=True)
        return x, None


class LinenLlama(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(VOCABULARY, HIDDEN, param_dtype=jnp.bfloat16, name="embed")(ids)
        blocks = linen.scan(
            LinenLlamaBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        x = linen.RMSNorm(param_dtype=jnp.bfloat16, name="norm")(blocks(name="layers")(x, None)[0])
        return linen.Dense(VOCABULARY, use_bias=False, param_dtype=jnp.bfloat16, name="head")(x)


class NNXLlamaBlock(nnx.Module):
    def __init__(self, rngs):
        options = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.input_norm = nnx.RMSNorm(HIDDEN, **options)
        self.attention_norm = nnx.RMSNorm(HIDDEN, **options)
        for name, shape in PROJECTIONS.items():
            setattr(self, name, nnx.Linear(*shape, use_bias=False, **options))


class NNXLlama(nnx.Module):
    def __init__(self, rngs):
        options = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, **options)
        self.layers = nnx.List([NNXLlamaBlock(rngs) for _ in range(DEPTH)])
        self.norm = nnx.RMSNorm(HIDDEN, **options)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, use_bias=False, **options)


@pytest.mark.rows(1)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_dry_run_makes_no_array(front_end):
    """LoRA of rank 8 on q and v of LLaMA-7B is known to train 4,194,304 parameters."""
    config = dora.DoRAConfig(rank=8, target_modules=["q_proj", "v_proj"])
    if front_end == "linen":
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        variables = jax.eval_shape(LinenLlama().init, jax.random.key(0), ids)
        summary = dora.summary(LinenLlama(), config, params=variables["params"], inputs=(ids,))
    else:
        summary = dora.summary(nnx.eval_shape(lambda: NNXLlama(nnx.Rngs(0))), config)
    assert summary.base_parameters == 6_738_415_616
    magnitudes = DEPTH * 2 * HIDDEN
    assert summary.trainable_parameters == 4_194_304 + magnitudes
    assert len(summary.layers) == (2 if front_end == "linen" else 2 * DEPTH)
    row = summary.layers[0]
    assert (row.inputs, row.outputs, row.dtype) == ((HIDDEN,), (HIDDEN,), "bfloat16")
    assert row.stack == ((DEPTH,) if front_end == "linen" else ())
    assert str(summary).endswith("trainable parameters: 0.066% of 6,738,415,616")
