"""Adapter trees averaged, added, compared and cast; trees that do not belong together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dora_jax as dora
from tests.adapters.compiled import CONFIG, WIDTHS, build, chain_with, several
from tests.support import reference
from tests.support.models import FRONT_ENDS, inputs, same
from tests.support.operations import LAYERS, structure

KernelAxes = dora.decomposition.KernelAxes
# The axes of the stacked kernel `(layers, in, out)`.
STACKED = {("blocks", "up"): KernelAxes((0,), (1,), (2,))}
WITH_WEIGHTS: dict[str, Callable[..., Any]] = {
    "interpolate": dora.adapters.interpolate,
    "add_weighted": lambda trees, weights: dora.adapters.add_weighted(trees, weights, CONFIG),
}


# Averaged and added.


def test_interpolation_is_the_weighted_mean_of_every_array():
    trees, weights = several(chain_with("linen")), (0.5, 0.75, -0.25)
    mean = jax.jit(dora.adapters.interpolate, static_argnums=1)(trees, weights)
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
        dora.errors.AdapterError, match=r"layer_0: the adapters have rank 4, the con.* 8; pass"
    ):
        dora.adapters.add_weighted(trees, (0.5, 0.5), dora.DoRAConfig(rank=8))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"layer_0": 0, "layer_1": 2}, "alpha_pattern": {"layer_1": 3.0}},
        pytest.param({"use_rslora": True}, marks=pytest.mark.full),
        pytest.param({"decompose": False}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_added_adapters_add_their_changes(fields, front_end="linen"):
    """`V = W0 + sum w_i s A_i B_i`, and the weighted mean of the magnitudes."""
    model = chain_with(front_end, **fields)
    config = dora.DoRAConfig(**{"rank": 4, **fields})
    trees, weights = several(model), (0.5, 0.75, -0.25)
    joined, wider = dora.adapters.add_weighted(trees, weights, config)
    model_of_it = build(front_end, "chain", wider)
    assert jax.tree.map(like, joined) == jax.tree.map(like, model_of_it.adapters)
    x = inputs(5, WIDTHS[0])
    y = model_of_it.apply(model.params, joined, x)
    (expected,) = reference.wide(x)
    for i, (name, layer) in enumerate(model.params.items()):
        expected = expected if i == 0 else np.tanh(expected)
        kernel = added_kernel(config, name, layer["kernel"], [t[name] for t in trees], weights)
        expected = expected @ kernel + np.asarray(layer["bias"], np.float64)
    assert reference.relative_error(y, expected) <= 2e-6


@pytest.mark.full
def test_added_adapters_fit_an_nnx_model_too():
    test_added_adapters_add_their_changes({"rank_pattern": {"layer_0": 0}}, "nnx")


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


@pytest.mark.full
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapters_of_a_stack_are_added_slice_by_slice(front_end):
    model = build(front_end, "stack")
    trees, weights = several(model, 2), (0.25, 0.75)
    joined, wider = dora.adapters.add_weighted(trees, weights, CONFIG, STACKED)
    merged = build(front_end, "stack", wider).merge(model.params, joined)["blocks"]["up"]["kernel"]
    for i in range(LAYERS):
        layers = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], t["blocks"]) for t in trees]
        kernel = np.asarray(model.params["blocks"]["up"]["kernel"])[i]
        expected = added_kernel(CONFIG, "up", kernel, [layer["up"] for layer in layers], weights)
        assert reference.relative_error(np.asarray(merged)[i], expected) <= 2e-6


def test_a_layer_with_more_axes_is_added_only_with_its_axes():
    """Its `lora_b (4, 4, 16)` could be one of a kernel with two out axes."""
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (4, 16, 4), "lora_b": (4, 4, 16), "magnitude": (4, 16)}
    trees = [{"up": {k: np.float32(rng.normal(size=n)) for k, n in shapes.items()}} for _ in "ab"]
    weights = (0.25, 0.75)
    with pytest.raises(dora.errors.AdapterError, match=r"up: the shapes of lora_a .*: pass axes"):
        dora.adapters.add_weighted(trees, weights, CONFIG)
    for axes, product in (
        (KernelAxes((0,), (1,), (2,)), "lir,lro->lio"),
        (KernelAxes((), (0, 1), (2, 3)), "ijr,rop->ijop"),
    ):
        joined, _ = dora.adapters.add_weighted(trees, weights, CONFIG, {("up",): axes})
        found, *each = (
            np.einsum(product, *reference.wide(tree["up"]["lora_a"], tree["up"]["lora_b"]))
            for tree in (joined, *trees)
        )
        np.testing.assert_allclose(found, np.tensordot(weights, each, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_of_added_adapters_is_that_of_each(use_rslora):
    """`alpha / r`, or `alpha / sqrt(r)`, at three times the rank."""
    config = dora.DoRAConfig(
        rank=4, use_rslora=use_rslora, rank_pattern={"up": 2}, alpha_pattern={"up": 3.0}
    )
    shapes = {"lora_a": (8, 2), "lora_b": (2, 5), "magnitude": (5,)}
    tree = {"up": {name: np.ones(shape, np.float32) for name, shape in shapes.items()}}
    _, wider = dora.adapters.add_weighted([tree] * 3, [0.5, 0.25, 0.25], config)
    for path, rank in ((("up",), 6), (("other",), 12)):
        one, other = (c.layer_settings(path) for c in (config, wider))
        assert other.rank == rank and math.isclose(other.scaling, one.scaling)


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
    moved = jax.tree.map(np.array, model.adapters)
    moved["layer_1"]["lora_b"] += 1
    differences = dora.adapters.diff(model.adapters, moved)
    assert differences.pop("layer_1.lora_b") == 1.0
    assert set(differences.values()) == {0.0} and len(differences) == 5


def test_casting_rounds_floating_arrays_only():
    third = np.full(2, 1 / 3, np.float32)
    tree = {"head": {"lora_a": third, "count": np.arange(2)}}
    cast = dora.adapters.cast_adapters(tree, jnp.bfloat16)["head"]
    assert same(cast, {"lora_a": third.astype(jnp.bfloat16), "count": np.arange(2)})
    assert np.asarray(cast["lora_a"], np.float32)[0] != third[0]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_cast_adapters_apply_to_rounding(front_end):
    model, x = chain_with(front_end), inputs(5, WIDTHS[0])
    (trained,) = several(model, 1)
    y = model.apply(model.params, dora.adapters.cast_adapters(trained, jnp.bfloat16), x)
    assert y.dtype == jnp.float32
    error = reference.relative_error(y, model.apply(model.params, trained, x))
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
    narrower = {**tree, "layer_0": {**tree["layer_0"], "lora_a": np.ones((16, 2))}}
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0.lora_a has shape \(16, 2\).*\(16, 4\)"
    ):
        PAIRS[operation](tree, narrower)
    scalar = {**fewer, "layer_1": {**tree["layer_1"], "magnitude": np.ones(1)}}
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1.magnitude has shape \(1,\)"):
        PAIRS[operation](tree, scalar)


def like(leaf):
    return leaf.shape, leaf.dtype
