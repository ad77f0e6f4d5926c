"""Several adapters of one base: mixed in a batch, and switched off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from tests.adapters.compiled import CONFIG, WIDTHS, build, chain_with, several
from tests.support import reference
from tests.support.models import FRONT_ENDS, NNXChain, inputs, random_adapters, same


def like(leaf):
    return leaf.shape, leaf.dtype


# Mixed in one batch.


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    ("kind", "precomputed"),
    [("chain", False), ("chain", True), pytest.param("stack", True, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_mixed_batch_is_one_call_for_each_adapter(front_end, kind, precomputed):
    model, x = build(front_end, kind), inputs(5, WIDTHS[0])
    adapters, index = several(model), np.array([2, 0, 0, 1, 2])
    outputs = np.stack([model.apply(model.params, tree, x) for tree in adapters])
    expected = outputs[index, np.arange(5)]
    if precomputed:
        adapters = [model.precompute_scales(model.params, tree) for tree in adapters]
    stacked = jax.jit(dora.adapters.stack_adapters)(adapters)
    mixed = model.mixed(model.params, stacked, index, x)
    assert reference.relative_error(mixed, expected) <= 2e-6
    assert not np.allclose(expected[0], expected[1])


@pytest.mark.parametrize("out_of_range", [3, -1])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_an_index_out_of_range_gives_nan_and_leaves_the_others(front_end, out_of_range):
    """Clamping it, or counting from the end, would give another user's adapter."""
    model, x = chain_with(front_end), inputs(5, WIDTHS[0])
    stacked = jax.jit(dora.adapters.stack_adapters)(several(model))
    y = np.asarray(model.mixed(model.params, stacked, np.array([0, out_of_range, 2, 1, 0]), x))
    assert np.all(np.isnan(y[1]))
    within = np.asarray(model.mixed(model.params, stacked, np.array([0, 1, 2, 1, 0]), x))
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(within, 1, 0))
    assert np.isfinite(within).all()


def test_selected_adapters_are_those_that_were_stacked():
    trees = several(chain_with("linen"))
    stacked = jax.jit(dora.adapters.stack_adapters)(trees)
    select = jax.jit(dora.adapters.select_adapters)
    for i, tree in enumerate(trees):
        assert same(select(stacked, i), tree)
    grid = select(stacked, np.array([[0, 1], [2, 0]]))
    assert grid["layer_0"]["lora_a"].shape == (2, 2, WIDTHS[0], 4)
    assert same(jax.tree.map(lambda leaf: np.asarray(leaf)[1, 0], grid), trees[2])


def test_the_index_is_of_integers_and_there_is_one_for_each_example():
    model, x = chain_with("nnx"), inputs(5, WIDTHS[0])
    stacked = dora.adapters.stack_adapters([jax.tree.map(np.asarray, model.adapters)] * 2)
    with pytest.raises(dora.errors.AdapterError, match="selected by integers, got"):
        dora.adapters.select_adapters(stacked, jnp.ones(5))
    for index in (np.zeros(4, int), np.zeros((5, 1), int)):
        with pytest.raises(dora.errors.AdapterError, match="every example needs the index"):
            model.mixed(model.params, stacked, index, x)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_stack_of_adapters_of_another_model_is_refused(front_end):
    model, x = chain_with(front_end), inputs(2, WIDTHS[0])
    narrower = jax.tree.map(
        lambda leaf: np.zeros([2 if n == 4 else n for n in leaf.shape]), model.adapters
    )
    stacked = dora.adapters.stack_adapters([narrower, narrower])
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0.lora_a has shape \(16, 2\).*\(16, 4\)"
    ):
        model.mixed(model.params, stacked, np.array([0, 1]), x)


# Switched off.


@pytest.mark.rows(3)
@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"layer_0": 0}, "adapter_dtype": "bfloat16"},
        {"decompose": False},
        {"init": "pissa"},
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"init": "olora"}, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_without_its_adapters_a_model_computes_what_its_base_does(front_end, fields):
    model, x = chain_with(front_end, **fields), inputs(5, WIDTHS[0])
    (trained,) = several(model, 1)
    disabled = model.disabled(trained)
    assert jax.tree.map(like, disabled) == jax.tree.map(like, trained)
    base = model.base(model.params, x)
    y = model.apply(model.params, disabled, x)
    if "init" in fields:  # the products of the factors cancel, to rounding
        assert reference.relative_error(y, base) <= 2e-6
    else:
        assert same(y, base)
    merged = model.merge(model.params, disabled)
    for name, layer in merged.items():
        assert reference.relative_error(layer["kernel"], model.params[name]["kernel"]) <= 2e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_switching_precomputed_adapters_off_and_on_compiles_nothing_anew(front_end):
    model, x, traces = chain_with(front_end), inputs(5, WIDTHS[0]), []

    @jax.jit
    def apply(params, adapters, x):
        traces.append(1)
        return model.apply(params, adapters, x)

    precomputed = model.precompute_scales(model.params, several(model, 1)[0])
    on = apply(model.params, precomputed, x)
    off = apply(model.params, model.disabled(precomputed), x)
    again = apply(model.params, precomputed, x)
    assert len(traces) == 1
    assert same(off, model.base(model.params, x))
    assert same(again, on) and not same(on, off)


def test_switching_an_nnx_model_off_and_on_compiles_nothing_anew():
    model, x, traces = NNXChain(WIDTHS, rngs=nnx.Rngs(0)), inputs(5, WIDTHS[0]), []

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
    assert same(off, run(model, x)) and not same(on, off)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_modules_trained_in_full_stay_when_adapters_are_switched_off(front_end):
    model = chain_with(front_end, target_modules=["layer_0"], modules_to_save=["layer_1"])
    (trained,) = several(model, 1)
    assert same(model.disabled(trained)["layer_1"], trained["layer_1"])


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_disabled_adapter_mixes_with_others(front_end):
    model, x = chain_with(front_end), inputs(5, WIDTHS[0])
    (trained,) = several(model, 1)
    trees = [trained, model.disabled(trained), trained]
    stacked = jax.jit(dora.adapters.stack_adapters)(trees)
    y = model.mixed(model.params, stacked, np.array([1, 0, 0, 0, 1]), x)
    off, on = model.base(model.params, x), model.apply(model.params, trained, x)
    expected = np.where(np.array([1, 0, 0, 0, 1])[:, None], off, on)
    assert reference.relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_merge_is_undone_by_merging_another_adapter_into_the_base(front_end):
    """Merging rounds: taking the adapter off a merged kernel would not give the base."""
    model, x = chain_with(front_end), inputs(5, WIDTHS[0])
    one, other = several(model, 2)
    merged = model.merge(model.params, one)
    assert not same(model.base(merged, x), model.base(model.params, x))
    again = model.merge(model.params, other)
    y = model.apply(model.params, other, x)
    assert reference.relative_error(model.base(again, x), y) <= 1e-5
