"""Layers that cannot be adapted, and layouts that do not fit, are refused by name."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.layers import einsum_layout
from tests.support.layers.errors import config, refusal
from tests.support.layers.laws import PLAIN
from tests.support.layers.models import TRANSFORMS, model
from tests.support.layers.rows import Row
from tests.support.layers.table import UNSUPPORTED, LinenProjection, NNXProjection


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("row", UNSUPPORTED, ids=str)
def test_what_cannot_be_adapted_is_refused_by_name(row, transform):
    message = refusal(row, jnp.float32, [transform])
    assert re.search(rf"^{transform}\.layer.* cannot be adapted: .*{row.refused}", message)


@pytest.mark.parametrize("row", UNSUPPORTED, ids=str)
def test_what_cannot_be_adapted_leaves_its_neighbours_adaptable(row):
    both = Row(
        "pair",
        row.front_end,
        functools.partial(PAIRS[row.front_end], row),
        row.x,
        vocab=row.vocab,
    )
    x = jnp.zeros(row.x, jnp.int32 if row.vocab else jnp.float32)
    adapt = model(both, jnp.float32, jnp.float32, PLAIN).adapt
    adapted = adapt(config(both, rank=1, target_modules=["dense"]), None, {"plain": x})
    assert list(adapted.adapters["plain"]["layer"]) == ["dense"]
    with pytest.raises(dora.errors.LayoutError):
        adapt(config(both, rank=1, target_modules=["dense", "other"]), None, {"plain": x})


class LinenPair(linen.Module):
    row: Row
    dtype: Any
    param_dtype: Any

    @linen.compact
    def __call__(self, x):
        y = self.row.call(self.row.make(name="other"), x)
        return linen.Dense(3, name="dense")(y)


class NNXPair(nnx.Module):
    def __init__(self, row, dtype, param_dtype, rngs):
        self.row = row
        self.other = row.make(rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.row.call(self.other, x)


PAIRS = {"linen": LinenPair, "nnx": NNXPair}


def test_a_layout_must_name_an_argument_of_the_call():
    with pytest.raises(
        dora.errors.LayoutError,
        match=r"NNXProjection.__call__ takes \['equation', 'x'\], not 'inputs'",
    ):
        dora.layers.register_layout(NNXProjection, einsum_layout(lambda layer, call: "bi,io->bo"))


def test_an_equation_that_comes_with_the_call_needs_a_traced_call():
    layer = NNXProjection((4, 3), rngs=nnx.Rngs(0))
    with pytest.raises(
        dora.errors.LayoutError, match=r"given with each call.* pass inputs=\(\.\.\.\)"
    ):
        dora.apply_dora(layer, dora.DoRAConfig(rank=2, target_modules=".*"), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("equation", ["bi,io", "bi,...o->b...o", "bi,ii->bi"])
def test_an_equation_that_is_not_understood_is_refused(equation):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            try:
                return LinenProjection((4, 4), name="layer")(equation, x)
            except ValueError:
                return x

    x = jnp.ones((2, 4))
    params = {"layer": {"w": jnp.ones((4, 4))}}
    with pytest.raises(
        dora.errors.LayoutError, match=r"^layer cannot be adapted: .*must be explicit"
    ):
        dora.apply_dora(
            Model(),
            dora.DoRAConfig(rank=2, target_modules=["layer"]),
            params=params,
            rng=jax.random.key(0),
            inputs=(x,),
        )


class LinenBothWays(linen.Module):
    """One square weight, used from either side: two different sets of output features."""

    @linen.compact
    def __call__(self, x):
        layer = LinenProjection((4, 4), name="layer")
        return layer("bo,io->bi", layer("bi,io->bo", x))


class NNXBothWays(nnx.Module):
    def __init__(self, rngs):
        self.layer = NNXProjection((4, 4), rngs=rngs)

    def __call__(self, x):
        return self.layer("bo,io->bi", self.layer("bi,io->bo", x))


def test_one_adapter_cannot_serve_two_uses_of_a_kernel():
    x, settings = jnp.ones((2, 4)), dora.DoRAConfig(rank=2, target_modules=["layer"])
    module = LinenBothWays()
    params = module.init(jax.random.key(0), x)["params"]
    model, adapters = dora.apply_dora(
        module, settings, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    with pytest.raises(dora.errors.LayoutError, match="one adapter cannot serve both"):
        model.apply({"params": params, "dora": adapters}, x)
    adapted = dora.apply_dora(NNXBothWays(nnx.Rngs(0)), settings, rngs=nnx.Rngs(1), inputs=(x,))
    with pytest.raises(dora.errors.LayoutError, match="one adapter cannot serve both"):
        adapted(x)
