"""Laws that hold in Linen and in NNX alike."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import dora_jax as dora
from tests.support import reference
from tests.support.models import (
    FRONT_ENDS,
    Adapted,
    adapted_chain,
    chain_params,
    inputs,
    random_adapters,
    same,
    structure,
)
from tests.support.properties import for_all
from tests.support.quick import quick_jit
from tests.support.selection import table

SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "magnitude frozen": {"magnitude_trainable": False},
    "not normalised": {"normalize": False},
    "plain LoRA": {"decompose": False},
    "detached": {"norm_gradient": "detached"},
    "rsLoRA": {"use_rslora": True},
    "magnitude alone": {"rank": 0},
    "magnitude alone in one layer": {"rank_pattern": {"layer_0": 0}},
    "other ranks": {"rank_pattern": {"layer_0": 1}, "alpha_pattern": {"layer_1": 1.0}},
    "one layer": {"target_modules": ["layer_1"]},
    "dropout": {"dropout": 0.5},
}

# dtype and param_dtype of the layers
DTYPES = [
    (None, jnp.float32),
    (None, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32),
    (jnp.float16, jnp.float16),
]


# Both front ends call the same functions: in other dtypes than float32 Linen stands for both.
BY_DTYPE = table(
    FRONT_ENDS, DTYPES, default=lambda front_end, d: front_end == "linen" or d == DTYPES[0]
)


def config(**fields) -> dora.DoRAConfig:
    return dora.DoRAConfig(**{"rank": 4, **fields})


def without_arrays(adapter, layer):
    """Returns A, B, m of a layer, with what is missing as it would be if it did nothing."""
    kernel = np.asarray(layer["kernel"]).astype(np.float64)
    a = adapter.get("lora_a", np.zeros((kernel.shape[0], 1)))
    b = adapter.get("lora_b", np.zeros((1, kernel.shape[1])))
    return kernel, a, b, adapter.get("magnitude", reference.norm(kernel))


def expected_kernel(config, name, layer, adapter):
    """Returns the merged kernel for any setting, in float64."""
    spec = config.layer_settings((name,))
    kernel, a, b, m = without_arrays(adapter, layer)
    if not spec.decompose:
        return kernel + spec.scaling * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    divisor = None if spec.normalize else reference.norm(kernel)
    return reference.merged(kernel, a, b, m, spec.scaling, divisor)


def expected_output(config, params, adapters, x):
    (y,) = reference.wide(x)
    for i, name in enumerate(sorted(params)):
        kernel = expected_kernel(config, name, params[name], adapters.get(name, {}))
        y = (y if i == 0 else np.tanh(y)) @ kernel + np.asarray(params[name]["bias"], np.float64)
    return y


@functools.cache
def chain_with(front_end: str, switch: str = "default", dtypes: tuple = DTYPES[0]) -> Adapted:
    dtype, param_dtype = dtypes
    return adapted_chain(
        front_end, config(**SWITCHES[switch]), dtype=dtype, param_dtype=param_dtype
    )


@pytest.mark.rows(8)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapting_changes_no_bit_of_the_output(front_end, switch):
    chain, x = chain_with(front_end, switch), inputs(7, 24)
    before = chain_with(front_end).base(chain.params, x)
    assert same(chain.apply(chain.params, chain.adapters, x), before)


@pytest.mark.rows(3)
@pytest.mark.parametrize(("front_end", "dtypes"), BY_DTYPE)
def test_adapting_changes_no_bit_in_any_dtype(front_end, dtypes):
    chain, dtype = chain_with(front_end, dtypes=dtypes), dtypes[0] or dtypes[1]
    x = inputs(7, 24, dtype)
    before = chain.base(chain.params, x)
    assert before.dtype == dtype
    assert same(chain.apply(chain.params, chain.adapters, x), before)


@pytest.mark.full
@pytest.mark.parametrize(
    ("front_end", "dtypes"),
    table(FRONT_ENDS, DTYPES[:2], default=lambda _, dtypes: dtypes == DTYPES[0]),
)
def test_adapting_changes_no_bit_without_jit(front_end, dtypes):
    chain = chain_with(front_end, dtypes=dtypes)
    x = inputs(7, 24, dtypes[1])
    with jax.disable_jit():
        before = chain.base(chain.params, x)
        assert same(chain.apply(chain.params, chain.adapters, x), before)


@pytest.mark.rows(2)
@pytest.mark.parametrize("batch", [(), (1,)])
@pytest.mark.parametrize(
    ("front_end", "dtype"),
    table(FRONT_ENDS, [jnp.float32, jnp.bfloat16], default=lambda front_end, _: front_end == "nnx"),
)
def test_adapting_changes_no_bit_of_any_batch(front_end, dtype, batch):
    chain = wide_chain(front_end, dtype)
    x = inputs(1, 384, dtype).reshape(*batch, 384)
    before = chain.base(chain.params, x)
    assert same(chain.apply(chain.params, chain.adapters, x), before)


@functools.cache
def wide_chain(front_end, dtype=jnp.float32) -> Adapted:
    return adapted_chain(front_end, config(rank=16), (384, 1536), param_dtype=dtype)


@for_all(
    # One input feature and the bias make one multiply-add on a CPU, whose last bit is another.
    widths=st.tuples(st.integers(2, 70), st.integers(1, 70)),
    rank=st.integers(1, 8),
    alpha=st.floats(0.1, 64),
    dtypes=st.sampled_from(DTYPES),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    few=3,
)
def test_adapting_changes_no_bit_at_any_size(widths, rank, alpha, dtypes, batch, seed):
    dtype, param_dtype = dtypes
    chain = adapted_chain(
        "linen",
        config(rank=min(rank, *widths), alpha=alpha),
        widths,
        dtype=dtype,
        param_dtype=param_dtype,
        params=chain_params(widths, param_dtype, seed),
    )
    x = inputs(batch, widths[0], dtype or param_dtype, seed)
    before = chain.base(chain.params, x)
    assert same(chain.apply(chain.params, chain.adapters, x), before)


@pytest.mark.rows(8)
@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {"dropout"}))
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_output_and_merged_kernels_are_those_of_the_reference(front_end, switch):
    chain, x = chain_with(front_end, switch), inputs(7, 24)
    settings, adapters = config(**SWITCHES[switch]), random_adapters(chain.adapters)
    y = chain.apply(chain.params, adapters, x)
    assert reference.relative_error(y, expected_output(settings, chain.params, adapters, x)) <= 2e-6
    before = jax.tree.map(jnp.copy, (chain.params, adapters))
    merged = chain.merge(chain.params, adapters)
    assert same(before, (chain.params, adapters))
    assert structure(merged) == structure(chain.params)
    for name, layer in merged.items():
        plain = chain.params[name]
        expected = expected_kernel(settings, name, plain, adapters.get(name, {}))
        assert reference.relative_error(layer["kernel"], expected) <= 2e-6
        assert same(layer["bias"], plain["bias"])
    assert reference.relative_error(chain_with(front_end).base(merged, x), y) <= 1e-5


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_wide_layer_agrees_with_the_reference(front_end):
    chain = wide_chain(front_end)
    adapters, x = random_adapters(chain.adapters, spread=0.05), inputs(8, 384)
    y = chain.apply(chain.params, adapters, x)
    expected = expected_output(config(rank=16), chain.params, adapters, x)
    assert reference.relative_error(y, expected) <= 2e-6


@pytest.mark.rows(2)
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_gradients_are_those_of_the_reference(front_end, norm_gradient):
    settings = config(norm_gradient=norm_gradient)
    chain = adapted_chain(front_end, settings, (96, 40))
    adapters, x, dy = random_adapters(chain.adapters), inputs(16, 96), inputs(16, 40, seed=3)

    @quick_jit
    def gradient(params, adapters, x):
        return jax.grad(lambda a, x: jnp.sum(dy * chain.apply(params, a, x)), (0, 1))(adapters, x)

    found, found_x = gradient(chain.params, adapters, x)
    assert structure(found) == structure(adapters)
    expected = reference.gradients(
        x,
        chain.params["layer_0"]["kernel"],
        **adapters["layer_0"],
        scaling=settings.layer_settings(()).scaling,
        output_gradient=dy,
        detached=norm_gradient == "detached",
    )
    for name, value in found["layer_0"].items():
        assert reference.relative_error(value, getattr(expected, name)) <= 1e-5, name
    assert reference.relative_error(found_x, expected.inputs) <= 1e-5


@pytest.mark.rows(3)
@pytest.mark.parametrize("switch", ["not normalised", "magnitude frozen", "plain LoRA"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_gradients_of_the_ablations_are_finite_differences(front_end, switch):
    chain, settings = chain_with(front_end, switch), config(**SWITCHES[switch])
    adapters, x, dy = random_adapters(chain.adapters), inputs(7, 24), inputs(7, 17, seed=3)
    found = quick_jit(jax.grad(lambda a: jnp.sum(dy * chain.apply(chain.params, a, x))))(adapters)
    for name in settings.layer_settings(()).parameter_names:

        def loss(value, name=name):
            changed = {**adapters, "layer_1": {**adapters["layer_1"], name: value}}
            return np.sum(np.asarray(dy) * expected_output(settings, chain.params, changed, x))

        expected = reference.differences(loss, adapters["layer_1"][name])
        assert reference.relative_error(found["layer_1"][name], expected) <= 1e-5, name


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_plain_lora_is_lora_written_by_hand(front_end):
    chain = adapted_chain(front_end, config(decompose=False, alpha=6.0), (24, 17))
    adapters, x = random_adapters(chain.adapters), inputs(7, 24)
    layer, adapter = chain.params["layer_0"], adapters["layer_0"]
    by_hand = (
        x @ layer["kernel"] + 1.5 * (x @ adapter["lora_a"]) @ adapter["lora_b"] + layer["bias"]
    )
    assert reference.relative_error(chain.apply(chain.params, adapters, x), by_hand) <= 1e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_bias_is_not_scaled(front_end):
    chain = adapted_chain(front_end, config(rank=0), (24, 17))
    doubled = jax.tree.map(lambda m: 2 * m, chain.adapters)
    x, bias = inputs(7, 24), chain.params["layer_0"]["bias"]
    once = chain.apply(chain.params, chain.adapters, x) - bias
    twice = chain.apply(chain.params, doubled, x) - bias
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-5)


@pytest.mark.rows(2)
@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapters_of_any_dtype_change_no_bit(front_end, adapter_dtype):
    chain = adapted_chain(
        front_end, config(adapter_dtype=adapter_dtype), (24, 17), param_dtype=jnp.bfloat16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(chain.adapters)} == {jnp.dtype(adapter_dtype)}
    x = inputs(7, 24, jnp.bfloat16)
    assert same(chain.apply(chain.params, chain.adapters, x), chain.base(chain.params, x))
    assert same(chain.merge(chain.params, chain.adapters), chain.params)


@pytest.mark.rows(3)
@pytest.mark.parametrize(("front_end", "dtypes"), BY_DTYPE)
def test_a_trained_adapter_keeps_the_dtype_and_finite_gradients(front_end, dtypes):
    chain, dtype = chain_with(front_end, dtypes=dtypes), dtypes[0] or dtypes[1]
    adapters, x = random_adapters(chain.adapters), inputs(7, 24, dtype)

    def loss(adapters):
        y = chain.apply(chain.params, adapters, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), y

    (_, y), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    assert y.dtype == dtype
    expected = expected_output(config(), chain.params, adapters, x)
    tolerance = 2e-6 if dtype == jnp.float32 else 3e-2
    assert reference.relative_error(y, expected) <= tolerance
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) != 0)


@pytest.mark.filterwarnings("ignore:merging rounds")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_merging_keeps_dtypes_and_agrees_with_the_adapted_model(front_end, param_dtype):
    chain = chain_with(front_end, dtypes=(None, param_dtype))
    assert same(chain.merge(chain.params, chain.adapters), chain.params)
    adapters, x = random_adapters(chain.adapters), inputs(7, 24, param_dtype)
    merged = chain.merge(chain.params, adapters)
    assert jax.tree.map(lambda a: a.dtype, merged) == jax.tree.map(lambda a: a.dtype, chain.params)
    error = reference.relative_error(chain.base(merged, x), chain.apply(chain.params, adapters, x))
    assert error <= (1e-5 if param_dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_saved_modules_are_trained_with_the_adapters_and_restored_by_merge(front_end):
    settings = config(target_modules=["layer_0"], modules_to_save=["layer_1"])
    chain, x = adapted_chain(front_end, settings), inputs(7, 24)
    assert set(chain.adapters) == {"layer_0", "layer_1"}
    assert same(chain.adapters["layer_1"], chain.params["layer_1"])
    assert same(chain.apply(chain.params, chain.adapters, x), chain.base(chain.params, x))
    head = jax.tree.map(lambda leaf: leaf + 1, chain.params["layer_1"])
    adapters = {**random_adapters(chain.adapters), "layer_1": head}
    y = chain.apply(chain.params, adapters, x)
    expected = expected_output(settings, {**chain.params, "layer_1": head}, adapters, x)
    assert reference.relative_error(y, expected) <= 2e-6
    merged = chain.merge(chain.params, adapters)
    assert structure(merged) == structure(chain.params)
    assert same(merged["layer_1"], head)
    gradient = quick_jit(jax.grad(lambda a: jnp.sum(jnp.sin(chain.apply(chain.params, a, x)))))
    gradients = gradient(adapters)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients["layer_1"]))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_rank_above_the_smaller_side_is_computed_merged_and_warned_of_once(front_end):
    settings, widths = config(rank=6, rank_pattern={"layer_1": 5}), (8, 5, 3)
    with pytest.warns(UserWarning, match="the rank is above") as warned:
        chain = adapted_chain(front_end, settings, widths)
    (message,) = {str(w.message) for w in warned if "the rank is" in str(w.message)}
    assert "layer_0 (rank 6, 8 in, 5 out), layer_1 (rank 5, 5 in, 3 out)" in message
    assert all(f in message for f in ("modules_to_save", "exclude_modules", "rank_pattern"))
    x, adapters = inputs(7, 8), random_adapters(chain.adapters)
    assert same(chain.apply(chain.params, chain.adapters, x), chain.base(chain.params, x))
    y = chain.apply(chain.params, adapters, x)
    assert reference.relative_error(y, expected_output(settings, chain.params, adapters, x)) <= 2e-6
    merged = chain.merge(chain.params, adapters)
    assert reference.relative_error(y, chain.base(merged, x)) <= 2e-6


@pytest.mark.rows(2)
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_zero_columns_stay_zero_and_are_named(front_end, norm_gradient):
    params = chain_params((24, 17))
    params["layer_0"]["kernel"] = params["layer_0"]["kernel"].at[:, jnp.array([2, 9])].set(0)
    with pytest.warns(UserWarning, match=r"layer_0: 2 of 17 columns .* exactly zero"):
        chain = adapted_chain(
            front_end, config(norm_gradient=norm_gradient), (24, 17), params=params
        )
    x = inputs(7, 24)
    assert same(chain.apply(params, chain.adapters, x), chain.base(params, x))
    adapters = random_adapters(chain.adapters)
    y, columns = chain.apply(params, adapters, x), jnp.array([2, 9])
    assert same(y[:, columns], jnp.broadcast_to(params["layer_0"]["bias"][columns], (7, 2)))
    assert np.all(np.asarray(chain.merge(params, adapters)["layer_0"]["kernel"][:, columns]) == 0)
    gradients = quick_jit(jax.grad(lambda a: jnp.sum(jnp.sin(chain.apply(params, a, x)))))(adapters)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_model_without_zero_columns_gives_no_warning(front_end):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "apply_dora traced no call")
        adapted_chain(front_end, config())


@pytest.mark.parametrize("size", [1e-9, 1e-30])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_columns_below_eps_change_no_bit(front_end, size):
    params = chain_params((24, 17))
    params["layer_0"]["kernel"] = params["layer_0"]["kernel"].at[:, 3].multiply(size)
    chain, x = adapted_chain(front_end, config(), (24, 17), params=params), inputs(7, 24)
    assert same(chain.apply(params, chain.adapters, x), chain.base(params, x))
    assert same(chain.merge(params, chain.adapters), params)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_another_base_gives_nan_and_is_named(front_end):
    chain, x = chain_with(front_end, "default"), inputs(7, 24)
    other = {**chain.params, "layer_1": chain_params((24, 40, 17), seed=9)["layer_1"]}
    assert np.all(np.any(np.isnan(chain.apply(other, chain.adapters, x)), axis=-1))
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_1: the kernel changed since apply_dora"
    ):
        chain.merge(other, chain.adapters)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:merging rounds")
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_base_cast_to_bfloat16_is_still_the_base(front_end):
    chain, x = chain_with(front_end, "default"), inputs(7, 24)
    adapters = random_adapters(chain.adapters)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), chain.params)
    y = chain.apply(cast, adapters, x)
    expected = expected_output(config(), chain.params, adapters, x)
    assert reference.relative_error(y, expected) <= 5e-2
    assert jax.tree.leaves(chain.merge(cast, adapters))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_layer_starts_the_same_whatever_else_is_adapted(front_end):
    widths = (24, 24, 24)
    alone = adapted_chain(front_end, config(target_modules=["layer_1"]), widths).adapters
    beside = adapted_chain(front_end, config(), widths).adapters
    assert same(alone["layer_1"], beside["layer_1"])
    assert not same(beside["layer_0"]["lora_a"], beside["layer_1"]["lora_a"])


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapters_start_as_documented(front_end, init):
    chain = adapted_chain(front_end, config(rank=16, init=init), (400, 300))
    adapter = chain.adapters["layer_0"]
    a = np.asarray(adapter["lora_a"])
    assert a.shape == (400, 16)
    assert np.all(np.asarray(adapter["lora_b"]) == 0)
    np.testing.assert_allclose(
        adapter["magnitude"], reference.norm(chain.params["layer_0"]["kernel"]), rtol=5e-7
    )
    deviation = 1 / 16 if init == "gaussian" else 1 / np.sqrt(3 * 400)
    assert abs(a.mean()) < 4 * deviation / np.sqrt(a.size)
    assert abs(a.std() / deviation - 1) < 0.05
    if init == "kaiming_uniform":
        assert 0.99 / np.sqrt(400) < np.abs(a).max() <= 1 / np.sqrt(400)


@pytest.mark.rows(2)
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_first_step_moves_the_magnitude_three_times_as_far(front_end, param_dtype):
    """Also over a bfloat16 base: at |m| = 1, half an ulp of bfloat16 is 2e-3."""
    learning_rate = 1e-4
    chain = adapted_chain(front_end, config(), (96, 40), param_dtype=param_dtype)
    tx = dora.dora_optimizer(learning_rate, magnitude_lr_ratio=3.0, lora_b_lr_ratio=2.0)
    x, target = inputs(16, 96, param_dtype), inputs(16, 40, seed=3)

    @quick_jit
    def step(params, adapters, state):
        def loss(adapters):
            y = chain.apply(params, adapters, x).astype(jnp.float32)
            return jnp.mean(jnp.square(y - target))

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    adapters, state, first = step(chain.params, chain.adapters, tx.init(chain.adapters))
    moved = jax.tree.map(lambda new, old: np.abs(new - old), adapters, chain.adapters)["layer_0"]
    for name, ratio in (("magnitude", 3.0), ("lora_b", 2.0)):
        # The first step of Adam is the sign of the gradient. A magnitude near 1 is known to 6e-8.
        np.testing.assert_allclose(moved[name], ratio * learning_rate, rtol=5e-3)
    assert np.all(moved["lora_a"] == 0)  # lora_b is zero, and so is the gradient of lora_a
    for _ in range(5):
        adapters, state, last = step(chain.params, adapters, state)
    assert last < first
    assert np.all(np.asarray(adapters["layer_0"]["lora_a"] != chain.adapters["layer_0"]["lora_a"]))
