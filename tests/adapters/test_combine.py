"""Several adapters of one base: mixed in a batch, switched off, averaged, added, compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from tests.support import reference
from tests.support.models import FRONT_ENDS, NNXChain, inputs, random_adapters
from tests.support.operations import CHAIN, LAYERS, WIDTH, chain, same, stack, structure

CONFIG = dora.DoRAConfig(rank=4)
WITH_WEIGHTS: dict[str, Callable[..., Any]] = {
    "interpolate": dora.adapters.interpolate,
    "add_weighted": lambda trees, weights: dora.adapters.add_weighted(trees, weights, CONFIG),
}


def chain_with(front_end, **fields):
    return cached_chain(front_end, dora.DoRAConfig(**{"rank": 4, **fields}))


cached_chain = functools.cache(chain)


def several(model, number=3):
    """Returns adapters of a model, each far from its start and from the others."""
    return [random_adapters(model.adapters, seed) for seed in range(number)]


# Mixed in one batch.


@pytest.mark.parametrize(("build", "precomputed"), [(chain, False), (stack, True)])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_mixed_batch_is_one_call_for_each_adapter(front_end, build, precomputed):
    model = build(front_end, CONFIG)
    x = inputs(5, CHAIN[0] if build is chain else WIDTH)
    adapters, index = several(model), jnp.array([2, 0, 0, 1, 2])
    apply = jax.jit(model.apply)
    outputs = jnp.stack([apply(model.params, tree, x) for tree in adapters])
    expected = outputs[index, jnp.arange(5)]
    if precomputed:
        adapters = [model.precompute_scales(model.params, tree) for tree in adapters]
    mixed = jax.jit(model.mixed)(model.params, dora.adapters.stack_adapters(adapters), index, x)
    assert reference.relative_error(mixed, expected) <= 2e-6
    assert not np.allclose(expected[0], expected[1])


@pytest.mark.parametrize("out_of_range", [3, -1])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_an_index_out_of_range_gives_nan_and_leaves_the_others(front_end, out_of_range):
    """Not the last adapter, as clamping or counting from behind would: another user's."""
    model, x = chain_with(front_end), inputs(3, CHAIN[0])
    stacked, mixed = dora.adapters.stack_adapters(several(model)), jax.jit(model.mixed)
    y = mixed(model.params, stacked, jnp.array([0, out_of_range, 2]), x)
    assert np.all(np.isnan(y[1]))
    within = mixed(model.params, stacked, jnp.array([0, 1, 2]), x)
    assert same(y[jnp.array([0, 2])], within[jnp.array([0, 2])])


def test_selected_adapters_are_those_that_were_stacked():
    trees = several(chain_with("linen"))
    stacked = dora.adapters.stack_adapters(trees)
    for i, tree in enumerate(trees):
        assert same(dora.adapters.select_adapters(stacked, i), tree)
    grid = dora.adapters.select_adapters(stacked, jnp.array([[0, 1], [2, 0]]))
    assert grid["layer_0"]["lora_a"].shape == (2, 2, 24, 4)
    assert same(jax.tree.map(lambda leaf: leaf[1, 0], grid), trees[2])


# Switched off.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"layer_0": 0}},
        {"decompose": False},
        {"adapter_dtype": "bfloat16"},
        {"init": "pissa"},
        {"init": "olora"},
    ],
    ids=str,
)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_without_its_adapters_a_model_computes_what_its_base_does(front_end, fields):
    model, x = chain_with(front_end, **fields), inputs(7, CHAIN[0])
    (trained,) = several(model, 1)
    disabled = model.disabled(trained)
    assert jax.tree.map(_like, disabled) == jax.tree.map(_like, trained)
    base = jax.jit(model.base)(model.params, x)
    y = jax.jit(model.apply)(model.params, disabled, x)
    if "init" in fields:  # the products of the factors cancel, to rounding
        assert reference.relative_error(y, base) <= 2e-6
    else:
        assert same(y, base)
    merged = model.merge(model.params, disabled)
    for name, layer in merged.items():
        assert reference.relative_error(layer["kernel"], model.params[name]["kernel"]) <= 2e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_switching_precomputed_adapters_off_and_on_compiles_nothing_anew(front_end):
    model, x, traces = chain_with(front_end), inputs(7, CHAIN[0]), []

    @jax.jit
    def apply(params, adapters, x):
        traces.append(1)
        return model.apply(params, adapters, x)

    precomputed = model.precompute_scales(model.params, *several(model, 1))
    on = apply(model.params, precomputed, x)
    off = apply(model.params, model.disabled(precomputed), x)
    again = apply(model.params, precomputed, x)
    assert len(traces) == 1
    assert same(off, jax.jit(model.base)(model.params, x))
    assert same(again, on) and not same(on, off)


def test_switching_an_nnx_model_off_and_on_compiles_nothing_anew():
    model, x, traces = NNXChain(CHAIN, rngs=nnx.Rngs(0)), inputs(7, CHAIN[0]), []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    adapted = dora.apply_dora(model, CONFIG, rngs=nnx.Rngs(1))
    trained = random_adapters(dora.get_adapters(adapted))
    dora.set_adapters(adapted, trained)
    on = run(adapted, x)
    dora.set_adapters(adapted, dora.disabled_adapters(adapted))
    off = run(adapted, x)
    dora.set_adapters(adapted, trained)
    assert same(run(adapted, x), on)
    assert len(traces) == 1
    assert same(off, run(model, x))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_modules_trained_in_full_stay_when_adapters_are_switched_off(front_end):
    config = dora.DoRAConfig(rank=4, target_modules=["layer_0"], modules_to_save=["layer_1"])
    model = chain(front_end, config)
    (trained,) = several(model, 1)
    assert same(model.disabled(trained)["layer_1"], trained["layer_1"])


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_disabled_adapter_mixes_with_others(front_end):
    model, x = chain_with(front_end), inputs(2, CHAIN[0])
    (trained,) = several(model, 1)
    stacked = dora.adapters.stack_adapters([trained, model.disabled(trained)])
    y = jax.jit(model.mixed)(model.params, stacked, jnp.array([1, 0]), x)
    assert reference.relative_error(y[0], jax.jit(model.base)(model.params, x)[0]) <= 1e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_base_is_kept_so_that_a_merge_can_be_undone(front_end):
    """Merging rounds: taking the adapter off a merged kernel would not give the base."""
    model, x = chain_with(front_end), inputs(7, CHAIN[0])
    one, other = several(model, 2)
    base, before = jax.jit(model.base), jax.tree.map(jnp.copy, model.params)
    plain = base(model.params, x)
    merged = model.merge(model.params, one)
    assert not same(base(merged, x), plain)
    assert same(model.params, before)
    assert same(base(model.params, x), plain)
    again = model.merge(model.params, other)
    y = jax.jit(model.apply)(model.params, other, x)
    assert reference.relative_error(base(again, x), y) <= 1e-5


# Averaged and added.


def test_interpolation_is_the_weighted_mean_of_every_array():
    trees, weights = several(chain_with("linen")), (0.5, 0.75, -0.25)
    mean = dora.adapters.interpolate(trees, weights)
    expected = jax.tree.map(lambda *leaves: np.average(reference.wide(*leaves), 0, weights), *trees)
    assert structure(mean) == structure(expected)
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    assert same(dora.adapters.interpolate(trees[:1], [1.0]), trees[0])


@pytest.mark.parametrize("operation", ["interpolate", "add_weighted"])
@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.0, 1.0), (0.0, 0.0)])
def test_weights_that_do_not_sum_to_one_are_refused(operation, weights):
    """A sum of 2 would double every norm."""
    with pytest.raises(
        dora.errors.AdapterError, match=f"must sum to 1, these sum to {sum(weights):g}"
    ):
        WITH_WEIGHTS[operation](several(chain_with("linen"), 2), weights)


def test_a_mean_of_precomputed_scales_is_refused():
    """It is not the scale of the mean."""
    model = chain_with("linen")
    precomputed = [model.precompute_scales(model.params, tree) for tree in several(model, 2)]
    for combine in WITH_WEIGHTS.values():
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0.scale is a precomputed scale"):
            combine(precomputed, (0.5, 0.5))


def test_adapters_of_another_rank_than_the_configurations_are_not_added():
    """The scaling would be another one."""
    trees = several(chain_with("linen"), 2)
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0: the adapters have rank 4, the con.* 8;"
    ):
        dora.adapters.add_weighted(trees, (0.5, 0.5), dora.DoRAConfig(rank=8))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer_0": 2}, "alpha_pattern": {"layer_1": 3.0}},
        {"rank_pattern": {"layer_0": 0}},
        {"decompose": False},
    ],
    ids=str,
)
def test_added_adapters_add_their_changes(fields, front_end="linen"):
    """`V = W0 + sum w_i s A_i B_i`, and the weighted mean of the magnitudes."""
    model = chain_with(front_end, **fields)
    config = dora.DoRAConfig(**{"rank": 4, **fields})
    trees, weights = several(model), (0.5, 0.75, -0.25)
    joined, wider = dora.adapters.add_weighted(trees, weights, config)
    model_of_it = chain(front_end, wider)
    assert jax.tree.map(_like, joined) == jax.tree.map(_like, model_of_it.adapters)
    x = inputs(7, CHAIN[0])
    y = jax.jit(model_of_it.apply)(model.params, joined, x)
    (expected,) = reference.wide(x)
    for i, (name, layer) in enumerate(model.params.items()):
        expected = expected if i == 0 else np.tanh(expected)
        kernel = added_kernel(config, name, layer["kernel"], [t[name] for t in trees], weights)
        expected = expected @ kernel + np.asarray(layer["bias"], np.float64)
    assert reference.relative_error(y, expected) <= 2e-6


def test_added_adapters_fit_an_nnx_model_too():
    test_added_adapters_add_their_changes({}, "nnx")


def added_kernel(config, name, kernel, adapters, weights):
    spec = config.layer_settings((name,))
    (v,) = reference.wide(kernel)
    for w, adapter in zip(weights, adapters, strict=True):
        if spec.rank:
            a, b = reference.wide(adapter["lora_a"], adapter["lora_b"])
            v = v + w * spec.scaling * (a @ b)
    if not spec.decompose:
        return v
    m = np.average(reference.wide(*(a["magnitude"] for a in adapters)), 0, weights)
    return m * v / np.linalg.norm(v, axis=0)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapters_of_a_stack_are_added_slice_by_slice(front_end):
    model = stack(front_end, CONFIG)
    trees, weights = several(model, 2), (0.25, 0.75)
    joined, wider = dora.adapters.add_weighted(trees, weights, CONFIG)
    merged = stack(front_end, wider).merge(model.params, joined)["blocks"]["up"]["kernel"]
    for i in range(LAYERS):
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], t["blocks"]["up"]) for t in trees]
        kernel = model.params["blocks"]["up"]["kernel"][i]
        expected = added_kernel(CONFIG, "up", kernel, layers, weights)
        assert reference.relative_error(merged[i], expected) <= 2e-6


def test_a_stack_as_long_as_the_rank_has_to_be_told_apart():
    """Its `lora_b (4, 4, 16)` could be one of a kernel with two out axes."""
    tree = {
        "up": {
            "lora_a": jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 4))),
            "lora_b": jnp.ones((4, 4, 16)),
            "magnitude": jnp.ones((4, 16)),
        }
    }
    with pytest.raises(dora.errors.AdapterError, match=r"up: the shapes .* pass stack_axes"):
        dora.adapters.add_weighted([tree, tree], [0.5, 0.5], CONFIG)
    joined, _ = dora.adapters.add_weighted([tree, tree], [0.5, 0.5], CONFIG, {"up": 1})
    product = np.einsum("lir,lro->lio", joined["up"]["lora_a"], joined["up"]["lora_b"])
    expected = np.einsum("lir,lro->lio", tree["up"]["lora_a"], tree["up"]["lora_b"])
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_did_not_start_at_zero_are_not_added(init):
    config = dora.DoRAConfig(rank=4, init=init)
    with pytest.raises(dora.errors.AdapterError, match=f"init='{init}'.*merge each instead"):
        dora.adapters.add_weighted(several(chain_with("linen"), 2), [0.5, 0.5], config)


# Compared and cast.


def test_the_difference_is_relative_to_the_larger_norm():
    one, other = {"q": {"magnitude": jnp.array([3.0, 4.0])}}, {"q": {"magnitude": jnp.zeros(2)}}
    assert dora.adapters.diff(one, one) == {"q.magnitude": 0.0}
    assert dora.adapters.diff(one, other) == dora.adapters.diff(other, one) == {"q.magnitude": 1.0}
    assert dora.adapters.diff(other, other) == {"q.magnitude": 0.0}
    doubled = jax.tree.map(lambda leaf: 2 * leaf, one)
    assert math.isclose(dora.adapters.diff(one, doubled)["q.magnitude"], 0.5)


def test_the_difference_names_what_training_moved():
    model = chain_with("linen")
    moved = jax.tree.map(jnp.copy, model.adapters)
    moved["layer_1"]["lora_b"] += 1
    differences = dora.adapters.diff(model.adapters, moved)
    assert differences.pop("layer_1.lora_b") == 1.0
    assert set(differences.values()) == {0.0} and len(differences) == 5


def test_casting_rounds_floating_arrays_only():
    tree = {"head": {"lora_a": jnp.full(2, 1 / 3), "count": jnp.arange(2)}}
    cast = dora.adapters.cast_adapters(tree, jnp.bfloat16)["head"]
    assert same(cast, {"lora_a": jnp.full(2, 1 / 3, jnp.bfloat16), "count": jnp.arange(2)})
    assert cast["lora_a"][0] != np.float32(1 / 3)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_cast_adapters_apply_to_rounding(front_end):
    model, x = chain_with(front_end), inputs(7, CHAIN[0])
    (trained,) = several(model, 1)
    apply = jax.jit(model.apply)
    y = apply(model.params, dora.adapters.cast_adapters(trained, jnp.bfloat16), x)
    assert y.dtype == jnp.float32
    error = reference.relative_error(y, apply(model.params, trained, x))
    assert 1e-5 < error < 2e-2


# Trees that do not belong together.

PAIRS: dict[str, Callable[..., Any]] = {
    "interpolate": lambda one, other: dora.adapters.interpolate([one, other], [0.5, 0.5]),
    "add_weighted": lambda one, other: dora.adapters.add_weighted([one, other], [0.5, 0.5], CONFIG),
    "diff": dora.adapters.diff,
    "stack_adapters": lambda one, other: dora.adapters.stack_adapters([one, other]),
}


@pytest.mark.parametrize("operation", PAIRS)
def test_trees_of_different_models_are_refused_by_name(operation):
    tree = chain_with("linen").adapters
    fewer = {"layer_0": tree["layer_0"]}
    with pytest.raises(dora.errors.AdapterError, match=r"missing layer_1.lora_a"):
        PAIRS[operation](tree, fewer)
    with pytest.raises(dora.errors.AdapterError, match=r"unknown layer_1.lora_a"):
        PAIRS[operation](fewer, tree)
    narrower = chain_with("linen", rank=2).adapters
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0.lora_a has shape \(24, 2\).*\(24, 4\)"
    ):
        PAIRS[operation](tree, narrower)
    scalar = {**fewer, "layer_1": {**tree["layer_1"], "magnitude": jnp.ones(1)}}
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1.magnitude has shape \(1,\)"):
        PAIRS[operation](tree, scalar)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_stack_of_adapters_of_another_model_is_refused(front_end):
    model, x = chain_with(front_end), inputs(2, CHAIN[0])
    narrower = [chain_with(front_end, rank=2).adapters] * 2
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0.lora_a has shape \(24, 2\).*\(24, 4\)"
    ):
        model.mixed(model.params, dora.adapters.stack_adapters(narrower), jnp.array([0, 1]), x)


def _like(leaf):
    return leaf.shape, leaf.dtype
