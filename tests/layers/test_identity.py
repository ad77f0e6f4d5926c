"""Adapting a layer changes no bit, no dtype and none of its attributes."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as errors_of_flax
from flax import nnx
from hypothesis import strategies as st

import dora_jax as dora
from tests.support.layers.errors import DTYPES, config, draw_data
from tests.support.layers.laws import PLAIN, numbers
from tests.support.layers.models import model
from tests.support.layers.rows import Row
from tests.support.layers.table import ROWS, SINGLE
from tests.support.models import nnx_model, same
from tests.support.properties import for_all
from tests.support.selection import table

EAGER = SINGLE[:2]


NNX = [row for row in ROWS if row.front_end == "nnx"]
ATTENTION = [row for row in ROWS if row.name == "MultiHeadAttention"]


def in_default_set(row, dtype):
    """One front end's layer of each class, of them every other one in bfloat16; attention."""
    if row in ATTENTION:
        return dtype == "float32"
    return row in SINGLE and (SINGLE.index(row) % 4, dtype) in {(0, "float32"), (3, "bfloat16")}


def adapt(row, dtype):
    """Returns `base: xs -> ys`, the adapted model, its parameters and inputs."""
    params, _, xs = numbers(row, DTYPES[dtype])
    layers = model(row, DTYPES[dtype], DTYPES[dtype], PLAIN)
    adapted = layers.adapt(config(row), params, xs)
    return functools.partial(layers.base, params), adapted, params, xs


@pytest.mark.parametrize(("row", "dtype"), table(ROWS, DTYPES, default=in_default_set), ids=str)
def test_adapting_changes_no_bit(row, dtype):
    base, adapted, params, xs = adapt(row, dtype)
    before = jax.jit(base)(xs)
    assert before["plain"].dtype == DTYPES[dtype]
    assert same(jax.jit(adapted.apply)(adapted.adapters, xs), before)
    assert same(adapted.merge(adapted.adapters), params)


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    ("row", "dtype"), table(ROWS, DTYPES, default=lambda row, dtype: row in EAGER), ids=str
)
def test_adapting_changes_no_bit_op_by_op(row, dtype):
    base, adapted, _, xs = adapt(row, dtype)
    assert same(adapted.apply(adapted.adapters, xs), base(xs))


# Computed in one dtype, stored in another.
MIXED = [
    (jnp.bfloat16, jnp.float32),
    (None, jnp.bfloat16),
    pytest.param(jnp.float16, jnp.float32, marks=pytest.mark.full),
    pytest.param(jnp.float32, jnp.bfloat16, marks=pytest.mark.full),
]


@pytest.mark.rows(24)
@pytest.mark.parametrize(("dtype", "param_dtype"), MIXED)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_adapting_changes_no_dtype(row, dtype, param_dtype):
    params, adapters, _ = numbers(row, param_dtype)
    layers = model(row, dtype, param_dtype, PLAIN)

    def both(params, adapters, xs):
        adapted = layers.adapt(config(row), params, xs)
        return layers.base(params, xs), adapted.apply(adapters, xs)

    # Of inputs in float32, or in the dtype of the layer, as between the layers of a model.
    for x_dtype in {jnp.dtype(jnp.float32), jnp.dtype(dtype or param_dtype)}:
        x = jax.ShapeDtypeStruct(row.x, jnp.int32 if row.vocab else x_dtype)
        before, after = jax.eval_shape(both, params, adapters, {"plain": x})
        assert before == after, x_dtype


@pytest.mark.rows(3)
@pytest.mark.parametrize(("dtype", "param_dtype"), MIXED)
@pytest.mark.parametrize("row", [SINGLE[0], *SINGLE[-6:-4]], ids=str)
def test_adapting_changes_no_bit_in_mixed_dtypes(row, dtype, param_dtype):
    params, _, xs = numbers(row, param_dtype)
    layers = model(row, dtype, param_dtype, PLAIN)
    adapted = layers.adapt(config(row), params, xs)
    before = jax.jit(functools.partial(layers.base, params))(xs)
    assert same(jax.jit(adapted.apply)(adapted.adapters, xs), before)


@pytest.mark.parametrize(
    ("row", "kind"),
    table(
        SINGLE, ("e4m3fn", "e5m2"), default=lambda row, kind: row is SINGLE[0] and kind[1] == "4"
    ),
)
def test_a_float8_kernel_is_adapted_and_merged(row, kind):
    dtype = getattr(jnp, f"float8_{kind}")
    params, trained, xs = numbers(row, dtype)
    adapted = model(row, jnp.float32, dtype, PLAIN).adapt(config(row), params, xs)
    merged = adapted.merge(trained)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(merged))
    before = jax.jit(functools.partial(model(row, jnp.float32, dtype, PLAIN).base, params))(xs)
    assert same(jax.jit(adapted.apply)(adapted.adapters, xs), before)


@pytest.mark.rows(11)
@pytest.mark.parametrize("row", SINGLE, ids=str)
def test_the_backward_pass_of_a_bfloat16_layer_keeps_no_float32_activation(row):
    params, adapters, xs = numbers(row, jnp.bfloat16)
    layers = model(row, jnp.bfloat16, jnp.bfloat16, PLAIN)
    kernel = sum(np.size(leaf) for leaf in jax.tree.leaves(params))

    def kept(params, adapters, xs):
        adapted = layers.adapt(config(row), params, xs)
        return jax.vjp(adapted.apply, adapters, xs)[1]

    # What depends on parameters alone may be float32. An activation would grow with the inputs.
    wide = {"plain": jnp.repeat(xs["plain"], 50, axis=_batch_axis(row, layers, params))}
    residuals = jax.eval_shape(kept, params, adapters, wide)
    sizes = [leaf.size for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float32]
    assert max(sizes) <= kernel < wide["plain"].size


def _batch_axis(row: Row, layers: Any, params: Any) -> int:
    """Returns an axis of a row's inputs that the layer takes at any length."""
    for axis in range(len(row.x)):
        shape = [n * (2 if i == axis else 1) for i, n in enumerate(row.x)]
        x = jax.ShapeDtypeStruct(shape, jnp.int32 if row.vocab else jnp.bfloat16)
        try:
            jax.eval_shape(layers.base, params, {"plain": x})
        except (TypeError, ValueError, errors_of_flax.FlaxError):
            continue
        return axis
    raise AssertionError(f"{row}: no axis of the inputs can be longer")


class Calls(nnx.Module):
    def __init__(self, row, rngs):
        self.row, self.layer = row, row.make(rngs=rngs)

    def __call__(self, x):
        return self.row.call(self.layer, x)


@pytest.mark.parametrize("row", [row for row in NNX if row in SINGLE], ids=str)
def test_an_adapted_nnx_layer_still_is_what_it_was(row):
    base = nnx_model(functools.partial(Calls, row))
    x = draw_data(row, jnp.float32).x[0]
    adapted = dora.apply_dora(base, config(row), rngs=nnx.Rngs(1), inputs=(x,))
    assert isinstance(adapted.layer, type(base.layer))
    for name, value in vars(base.layer).items():
        if isinstance(value, nnx.Variable):
            assert type(getattr(adapted.layer, name)) is type(value)
            assert same(getattr(adapted.layer, name)[...], value[...])
        elif not name.startswith("_"):
            assert getattr(adapted.layer, name) == value
    assert same(nnx.state(adapted, nnx.Param), nnx.state(base, nnx.Param))
    for again in (pickle.loads(pickle.dumps(adapted.layer)), copy.deepcopy(adapted.layer)):
        (graphdef, state), (wanted, expected) = nnx.split(again), nnx.split(adapted.layer)
        assert graphdef == wanted
        assert same(state, expected)


class OfOwnClass(type(nnx.Module)):
    """A metaclass of a user's own."""


class OwnLinear(nnx.Linear, metaclass=OfOwnClass):
    """A layer of that metaclass."""


def test_an_adapted_layer_of_a_metaclass_of_its_own_is_pickled():
    model = nnx.eval_shape(lambda: OwnLinear(4, 3, rngs=nnx.Rngs(0)))
    adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    assert type(pickle.loads(pickle.dumps(adapted))) is type(adapted)
    assert isinstance(adapted, OwnLinear)


@for_all(st.sampled_from(NNX), st.booleans(), few=4, many=40)
def test_an_adapted_nnx_layer_survives_split_and_merge(row, detached):
    x = draw_data(row, jnp.float32).x[0]
    base = nnx_model(functools.partial(Calls, row))
    chosen = config(row, norm_gradient="detached" if detached else "exact")
    adapted = dora.apply_dora(base, chosen, rngs=nnx.Rngs(1), inputs=(x,))
    again = nnx.merge(*nnx.split(adapted))
    assert same(nnx.state(again), nnx.state(adapted))
    assert type(again.layer) is type(adapted.layer)
    run = nnx.jit(lambda model: model(x))
    assert same(run(again), run(adapted))
    assert same(dora.get_adapters(again), dora.get_adapters(adapted))
