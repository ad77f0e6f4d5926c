"""Layers that cannot be adapted, and layouts that do not fit, are refused by name."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.layers import einsum_layout, find_layout
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


@pytest.mark.parametrize("row", [row for row in UNSUPPORTED if " own " in row.name], ids=str)
def test_a_class_with_a_method_of_its_own_has_no_layout(row):
    own = row.make.func
    known = own.__base__
    assert find_layout(own) is None
    assert find_layout(type("Renamed", (known,), {})) is find_layout(known) is not None


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


# More than one kernel.


class LinenGated(linen.Module):
    """Two weights, or one and a scale of its output features."""

    further: str = "gate"

    @linen.compact
    def __call__(self, x):
        draw = linen.initializers.normal()
        y = x @ self.param("w", draw, (4, 3))
        if self.further == "dense":
            return y * linen.Dense(3, name="dense")(x)
        if self.further == "gate":
            return y * (x @ self.param("gate", draw, (4, 3)))
        return y * self.param("scale", draw, (3,))


class LinenHolder(linen.Module):
    further: str

    @linen.compact
    def __call__(self, x):
        return LinenGated(self.further, name="layer")(x)


class NNXGated(nnx.Module):
    def __init__(self, further, rngs):
        self.w = nnx.Param(jnp.ones((4, 3)))
        if further == "dense":
            self.dense = nnx.Linear(4, 3, rngs=rngs)
        if further == "gate":
            self.gate = nnx.Param(jnp.ones((4, 3)))
        if further == "scale":
            self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x @ self.w[...]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
@pytest.mark.parametrize("stack", [0, 2])
@pytest.mark.parametrize(
    ("further", "named"), [("gate", "gate"), ("dense", "dense.kernel"), ("scale", None)]
)
def test_a_layer_of_two_kernels_is_refused(front_end, stack, further, named):
    layout = einsum_layout(lambda layer, call: "bi,io->bo", kernel="w", inputs="x")
    for layer_class in (LinenGated, NNXGated):
        dora.layers.register_layout(layer_class, layout)
    x, settings = jnp.ones((2, 4)), dora.DoRAConfig(rank=2, target_modules=r"layer|")

    def adapt():
        if front_end == "nnx":
            make = functools.partial(NNXGated, further)
            if stack:
                model = nnx.eval_shape(lambda: nnx.vmap(make)(nnx.Rngs(0).split(stack)))
            else:
                model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
            return dora.apply_dora(model, settings, rngs=nnx.Rngs(1))
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        vmapped = linen.vmap(LinenHolder, axis_size=stack, in_axes=None, **stacked)
        module = vmapped(further) if stack else LinenHolder(further)
        params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        return dora.apply_dora(module, settings, params=params, rng=jax.random.key(1), inputs=(x,))

    if named is None:
        adapt()
        return
    with pytest.raises(
        dora.errors.LayoutError, match=rf"cannot be adapted: it has {named} next to its kernel w,"
    ):
        adapt()


def test_a_layout_of_two_kernels_is_refused():
    layout = einsum_layout(lambda layer, call: "bi,io->bo", kernel=("w", "gate"), inputs="x")
    with pytest.raises(dora.errors.LayoutError, match=r"NNXGated names .* layer of one kernel"):
        dora.layers.register_layout(NNXGated, layout)


# A base that is quantised.


@flax.struct.dataclass
class QArray:
    """A stand-in for qwix's: a record of integers and scales with the attributes of an array."""

    qvalue: Any
    scale: Any
    shape = property(lambda self: self.qvalue.shape)
    ndim = property(lambda self: self.qvalue.ndim)
    dtype = property(lambda self: self.scale.dtype)


QArray.__module__ = "qwix._src.core.qarray"
nnx.register_data_type(QArray)


def quantised(kernel):
    return QArray(jnp.ones(kernel.shape, jnp.int8), jnp.ones((1, kernel.shape[1])))


def intercepted(layer_class):
    """Returns a class as qwix makes it in place of a model's."""
    return type(layer_class.__name__, (layer_class,), {"_unquantized_type": layer_class})


def test_a_quantised_linen_base_is_refused_by_name():
    module, x, config = (
        linen.Sequential([linen.Dense(4)]),
        jnp.ones((2, 3)),
        dora.DoRAConfig(rank=2),
    )
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    base = {**params["layers_0"], "kernel": quantised(params["layers_0"]["kernel"])}

    def adapt(module, params):
        return dora.apply_dora(module, config, params=params, rng=jax.random.key(0), inputs=(x,))

    with pytest.raises(
        dora.errors.LayoutError, match=r"^layers_0 cannot be adapted: its kernel is a QArray.*qwix"
    ):
        adapt(module, {"layers_0": base})
    with pytest.raises(dora.errors.LayoutError, match=r"^the model runs under qwix"):
        adapt(intercepted(linen.Sequential)([linen.Dense(4)]), params)
    model, adapters = adapt(module, params)
    for use in (
        lambda params: model.apply({"params": params, "dora": adapters}, x),
        lambda params: dora.merge(model, params, adapters),
    ):
        with pytest.raises(dora.errors.AdapterError, match=r"^layers_0: .* quantised after it was"):
            use({"layers_0": base})


@pytest.mark.parametrize("boxed", [False, True])
def test_a_quantised_nnx_base_is_refused_by_name(boxed):
    def model():
        return nnx.eval_shape(lambda: nnx.Dict(up=nnx.Linear(3, 4, rngs=nnx.Rngs(0))))

    def quantise(model):
        kernel = quantised(model.up.kernel)
        model.up.kernel = nnx.Param(kernel) if boxed else kernel
        return model

    config = dora.DoRAConfig(rank=2)
    with pytest.raises(
        dora.errors.LayoutError, match=r"^up cannot be adapted: its kernel is a QArray.*qwix"
    ):
        dora.apply_dora(quantise(model()), config, rngs=nnx.Rngs(1))
    with pytest.raises(dora.errors.LayoutError, match=r"^up runs under qwix"):
        plain = model()
        object.__setattr__(plain.up, "__class__", intercepted(nnx.Linear))
        dora.apply_dora(plain, config, rngs=nnx.Rngs(1))
    adapted = quantise(dora.apply_dora(model(), config, rngs=nnx.Rngs(1)))
    for use in (lambda: adapted.up(jnp.ones((2, 3))), lambda: dora.merge(adapted)):
        with pytest.raises(dora.errors.AdapterError, match=r"^up: .* quantised after it was"):
            use()


# Two uses of a kernel.


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
