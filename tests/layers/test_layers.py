"""Laws that hold for every layer type in both front ends; the numbers are in `layer_table`."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as errors_of_flax
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dora_jax as dora
from dora_jax.layers import einsum_layout
from dora_jax.linen import ExampleCall
from tests.support import reference
from tests.support.layer_models import TRANSFORMS, model
from tests.support.layer_rows import (
    ONE_ROW,
    ROWS,
    UNSUPPORTED,
    VARIANTS,
    LinenProjection,
    NNXProjection,
    Row,
    axes,
    einsum,
)
from tests.support.layer_table import (
    BOUNDS,
    COMPILER_OPTIONS,
    DTYPES,
    config,
    copies,
    draw_data,
    errors,
    refusal,
    tree,
)
from tests.support.models import random_adapters

PLAIN = ("plain",)
SINGLE = [row for row in ROWS if len(row.kernels) == 1]
COMPOSED = [row for row in ROWS if len(row.kernels) > 1]  # attention and recurrent cells

quick_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def numbers(row: Row, dtype: Any) -> tuple[Any, Any, Any]:
    """Returns parameters, random adapters and inputs of a row's model, run plainly."""
    data = draw_data(row, dtype)
    return tree(data.params, PLAIN), tree(data.adapters, PLAIN), copies(data.x, PLAIN)


def same(a: Any, b: Any) -> bool:
    """Whether trees are equal in structure, dtypes and values (`==`: no tolerance)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and bool(jnp.all(x == y)) for x, y in pairs)


def close(value: Any, expected: Any, bound: float = 5e-6) -> bool:
    """Whether the largest difference is small beside the largest value, leaf by leaf."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True)
    return all(reference.relative_error(x, y) <= bound for x, y in pairs)


def within(found: Any, dtype: str) -> None:
    for transform, error in found.items():
        for name, value in error._asdict().items():
            assert value <= getattr(BOUNDS[dtype], name), (transform, name)


@pytest.mark.parametrize("row", SINGLE, ids=str)
def test_every_layer_agrees_with_its_definition_under_every_transform(row):
    within(errors(row, jnp.float32), "float32")


@pytest.mark.parametrize("row", SINGLE, ids=str)
def test_every_layer_agrees_with_its_definition_in_bfloat16(row):
    within(errors(row, jnp.bfloat16, PLAIN), "bfloat16")


@pytest.mark.parametrize("row", COMPOSED, ids=str)
def test_layers_made_of_layers_agree_with_their_definition(row):
    within(errors(row, jnp.float32, PLAIN), "float32")


@pytest.mark.parametrize("row", VARIANTS, ids=str)
def test_every_form_of_a_layer_agrees_with_its_definition(row):
    within(errors(row, jnp.float32, PLAIN), "float32")


@pytest.mark.parametrize("row", ONE_ROW, ids=str)
def test_a_table_of_one_row_agrees_with_its_definition(row):
    found = errors(row, jnp.float32, PLAIN)
    within({t: error._replace(exact_gradient=0.0) for t, error in found.items()}, "float32")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("row", UNSUPPORTED, ids=str)
def test_what_cannot_be_adapted_is_refused_by_name(row, transform):
    message = refusal(row, jnp.float32, [transform])
    assert re.search(rf"^{transform}\.layer.* cannot be adapted: .*{row.refused}", message)


@pytest.mark.parametrize("row", UNSUPPORTED, ids=str)
def test_what_cannot_be_adapted_does_no_harm_beside_what_can(row):
    both = Row(
        "beside",
        row.front_end,
        functools.partial(_Beside[row.front_end], row),
        row.x,
        vocab=row.vocab,
    )
    x = jnp.zeros(row.x, jnp.int32 if row.vocab else jnp.float32)
    adapt = model(both, jnp.float32, jnp.float32, PLAIN).adapt
    adapted = adapt(config(both, rank=1, target_modules=["dense"]), None, {"plain": x})
    assert list(adapted.adapters["plain"]["layer"]) == ["dense"]
    with pytest.raises(dora.errors.LayoutError):
        adapt(config(both, rank=1, target_modules=["dense", "other"]), None, {"plain": x})


class LinenBeside(linen.Module):
    row: Row
    dtype: Any
    param_dtype: Any

    @linen.compact
    def __call__(self, x):
        y = self.row.call(self.row.make(name="other"), x)
        return linen.Dense(3, name="dense")(y)


class NNXBeside(nnx.Module):
    def __init__(self, row, dtype, param_dtype, rngs):
        self.row = row
        self.other = row.make(rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.row.call(self.other, x)


_Beside = {"linen": LinenBeside, "nnx": NNXBeside}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_adapting_changes_no_bit(row, dtype):
    params, _, xs = numbers(row, DTYPES[dtype])
    layers = model(row, DTYPES[dtype], DTYPES[dtype], PLAIN)
    adapted = layers.adapt(config(row), params, xs)
    for wrap in (jax.jit, lambda f: f):
        before = wrap(functools.partial(layers.base, params))(xs)
        assert before["plain"].dtype == DTYPES[dtype]
        assert same(wrap(adapted.apply)(adapted.adapters, xs), before)
    assert same(adapted.merge(adapted.adapters), params)


# Computed in one dtype, stored in another.
MIXED = [
    (jnp.bfloat16, jnp.float32),
    (jnp.float16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (None, jnp.bfloat16),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_adapting_changes_no_dtype(row):
    for dtype, param_dtype in MIXED:
        params, adapters, _ = numbers(row, param_dtype)
        layers = model(row, dtype, param_dtype, PLAIN)
        # Of inputs in float32, or in the dtype of the layer, as between the layers of a model.
        for x_dtype in {jnp.dtype(jnp.float32), jnp.dtype(dtype or param_dtype)}:
            x = jax.ShapeDtypeStruct(row.x, jnp.int32 if row.vocab else x_dtype)

            def both(params, adapters, xs, layers=layers):
                adapted = layers.adapt(config(row), params, xs)
                return layers.base(params, xs), adapted.apply(adapters, xs)

            before, after = jax.eval_shape(both, params, adapters, {"plain": x})
            assert before == after, (dtype, param_dtype, x_dtype)


@pytest.mark.parametrize(("dtype", "param_dtype"), MIXED)
@pytest.mark.parametrize("row", [SINGLE[0], *SINGLE[-6:-4]], ids=str)
def test_adapting_changes_no_bit_in_mixed_dtypes(row, dtype, param_dtype):
    params, _, xs = numbers(row, param_dtype)
    layers = model(row, dtype, param_dtype, PLAIN)
    adapted = layers.adapt(config(row), params, xs)
    before = jax.jit(functools.partial(layers.base, params))(xs)
    assert same(jax.jit(adapted.apply)(adapted.adapters, xs), before)


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


@pytest.mark.parametrize("row", [row for row in SINGLE if row.front_end == "nnx"], ids=str)
def test_an_adapted_nnx_layer_still_is_what_it_was(row):
    base = _Calls(row, row.make(rngs=nnx.Rngs(0)))
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


class _Calls(nnx.Module):
    def __init__(self, row, layer):
        self.row, self.layer = row, layer

    def __call__(self, x):
        return self.row.call(self.layer, x)


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


class LinenShifted(linen.Module):
    """A projection whose bias has another name."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        w = self.param("w", linen.initializers.normal(), (4, 3), self.param_dtype)
        shift = self.param("shift", linen.initializers.normal(), (3,), self.param_dtype)
        return x @ w + shift


class NNXShifted(nnx.Module):
    def __init__(self, dtype=None, param_dtype=jnp.float32, *, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 3), param_dtype))
        self.shift = nnx.Param(jnp.ones(3, param_dtype))

    def __call__(self, x):
        return x @ self.w[...] + self.shift[...]


@pytest.mark.parametrize(("front_end", "make"), [("linen", LinenShifted), ("nnx", NNXShifted)])
def test_a_layout_names_the_bias_which_is_not_scaled(front_end, make):
    layout = einsum_layout(
        lambda layer, call: "...i,io->...o", kernel="w", bias="shift", inputs="x"
    )
    dora.layers.register_layout(make, layout)
    row = Row(
        "shifted",
        front_end,
        make,
        x=(2, 4),
        params={"w": (4, 3), "shift": (3,)},
        kernels={"w": axes("0", "1")},
        layer=lambda params, x: x @ params["w"] + params["shift"],
    )
    within(errors(row, jnp.float32, PLAIN), "float32")


class LinenStack(linen.Module):
    """A layer under lifted transforms, the outermost first: `("scan", 1)` stacks at position 1."""

    make: Any
    lifts: tuple[tuple[str, int], ...]

    @linen.compact
    def __call__(self, x):
        if not self.lifts:
            return self.make(name="layer")(x)
        (kind, position), *inner = self.lifts
        lifted: dict[str, Any] = {
            "variable_axes": {"params": position},
            "split_rngs": {"params": True},
        }
        if kind == "vmap":
            return linen.vmap(LinenStack, **lifted)(self.make, tuple(inner), name="inner")(x)
        return linen.scan(_LinenStep, **lifted)(self.make, tuple(inner), name="inner")((), x)[1]


class _LinenStep(LinenStack):
    @linen.compact
    def __call__(self, carry, x):
        return carry, LinenStack(self.make, self.lifts, name="step")(x)


def _innermost(tree: Any) -> Any:
    """Follows the only key of nested dicts."""
    while set(tree) <= {"inner", "step", "layer"}:
        (tree,) = tree.values()
    return tree


DENSE = functools.partial(linen.Dense, 5)
CONV = functools.partial(linen.Conv, 4, (3,), use_bias=False)
# The layer, its inputs in one copy, and the axes of its kernel.
STACKS = {
    "dense": (DENSE, (2, 4), axes("0", "1")),
    "square dense": (functools.partial(linen.Dense, 3), (2, 3), axes("0", "1")),
    "conv": (CONV, (2, 5, 3), axes("01", "2")),
    "general": (
        functools.partial(linen.DenseGeneral, (2, 5), axis=(-2, -1), use_bias=False),
        (2, 3, 4),
        axes("01", "23"),
    ),
}
LIFTS = [
    *[(kind, lift) for kind in STACKS for lift in [(("scan", 1),), (("vmap", -1),)]],
    *[
        ("dense", (("scan", outer), ("vmap", inner)))
        for outer, inner in [(0, 0), (1, 0), (1, 1), (-1, 1)]
    ],
]


@pytest.mark.parametrize(("kind", "lifts"), LIFTS, ids=str)
def test_linen_stacks_have_adapters_wherever_the_stack_axes_are(kind, lifts):
    make, shape, call_axes = STACKS[kind]
    sizes = (3, 2)[: len(lifts)]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*sizes, *shape)), jnp.float32)
    module = LinenStack(make, lifts)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(module.init, jax.random.key(0), x)["params"],
    )
    settings = dora.DoRAConfig(rank=2, alpha=3.0, target_modules=["layer"])
    model, adapters = dora.apply_dora(
        module, settings, params=params, rng=jax.random.key(1), inputs=(x,)
    )

    @jax.jit
    def apply(params, adapters):
        return model.apply({"params": params, "dora": adapters}, x)

    base = jax.jit(lambda params: module.apply({"params": params}, x))
    assert same(apply(params, adapters), base(params))
    trained = random_adapters(adapters)
    merged = dora.merge(model, params, trained)
    assert close(apply(params, trained), base(merged))
    # The stack axes of an adapter are in the order in which the kernel has them.
    kernel_shape = _innermost(params)["kernel"].shape
    stack = tuple(n for n in kernel_shape if n in sizes) if kind == "dense" else sizes
    adapter = jax.tree.map(
        lambda leaf: leaf if stack == sizes else jnp.swapaxes(leaf, 0, 1), _innermost(trained)
    )
    shapes = call_axes.shapes(
        _one_copy(_innermost(params)["kernel"], lifts, (0,) * len(sizes)).shape, 2
    )
    assert jax.tree.map(jnp.shape, adapter) == {k: sizes + s for k, s in shapes.items()}
    for copy in itertools.product(*map(range, sizes)):
        kernel, found = (
            reference.as_stack_of_matrices(
                _one_copy(_innermost(p)["kernel"], lifts, copy), call_axes
            )[0]
            for p in (params, merged)
        )
        inputs, outputs = kernel.shape
        expected = reference.merged(
            kernel,
            adapter["lora_a"][copy].reshape(inputs, 2),
            adapter["lora_b"][copy].reshape(2, outputs),
            adapter["magnitude"][copy].reshape(outputs),
            1.5,
        )
        assert close(found, expected)


def _one_copy(kernel: jax.Array, lifts: Any, copy: tuple[int, ...]) -> np.ndarray:
    result = np.asarray(kernel)
    for (_, position), index in zip(lifts, copy, strict=True):
        result = np.take(result, index, axis=position)
    return result


def test_gradients_of_a_stack_do_not_depend_on_where_its_axis_is():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    found = []
    for position in (0, 1, 2):
        module = LinenStack(functools.partial(DENSE, use_bias=False), (("scan", position),))
        params = {"inner": {"step": {"layer": {"kernel": jnp.moveaxis(kernel, 0, position)}}}}
        model, adapters = dora.apply_dora(
            module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
        )

        def loss(adapters, model=model, params=params):
            return jnp.sum(model.apply({"params": params, "dora": adapters}, x) ** 2)

        found.append(quick_jit(jax.grad(loss))(random_adapters(adapters)))
    assert close(found[1], found[0])
    assert close(found[2], found[0])


def test_experts_and_stacks_of_experts_in_nnx():
    def expert(rngs):
        return nnx.Linear(4, 5, rngs=rngs)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def experts(rngs):
        return expert(rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layers(rngs):
        return experts(rngs)

    over_experts = nnx.vmap(lambda layer, x: layer(x))
    over_layers = nnx.scan(over_experts, in_axes=(0, 0), out_axes=0)
    rng = np.random.default_rng(0)
    for make, call, sizes in [(experts, over_experts, (2,)), (layers, over_layers, (3, 2))]:
        x = jnp.asarray(rng.normal(size=(*sizes, 3, 4)), jnp.float32)
        base = make(nnx.Rngs(0))
        adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2, alpha=3.0), rngs=nnx.Rngs(1))
        assert adapted.lora_a.shape == (*sizes, 4, 2)
        assert adapted.lora_b.shape == (*sizes, 2, 5)
        assert adapted.magnitude.shape == (*sizes, 5)
        assert same(call(adapted, x), call(base, x))
        adapter = random_adapters(dora.get_adapters(adapted))
        dora.set_adapters(adapted, adapter)
        merged = dora.merge(adapted)
        assert close(call(adapted, x), call(merged, x))
        expected = reference.merged(base.kernel[...], **adapter, scaling=1.5)
        assert close(merged.kernel[...], expected)


# Cells and wrappers that hold layers.
CELLS = {
    "linen": [
        lambda: linen.RNN(linen.SimpleCell(3)),
        lambda: linen.RNN(linen.MGUCell(3)),
        lambda: linen.Bidirectional(linen.RNN(linen.GRUCell(3)), linen.RNN(linen.LSTMCell(3))),
        lambda: linen.RNN(linen.ConvLSTMCell(3, (2,))),
    ],
    "nnx": [
        lambda rngs: nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs)),
        lambda rngs: nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs)),
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs)), nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs))
        ),
    ],
}


@pytest.mark.parametrize("index", range(len(CELLS["linen"])))
def test_linen_recurrent_layers_compute_what_merged_ones_do(index):
    module: Any = CELLS["linen"][index]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)[-4 + (index < 3) :]), float)
    params = module.init(jax.random.key(0), x)["params"]
    model, adapters = dora.apply_dora(
        module,
        dora.DoRAConfig(rank=2, target_modules=".*"),
        params=params,
        rng=jax.random.key(1),
        inputs=(x,),
    )
    base = quick_jit(lambda params: module.apply({"params": params}, x))
    apply = quick_jit(lambda adapters: model.apply({"params": params, "dora": adapters}, x))
    assert same(apply(adapters), base(params))
    trained = random_adapters(adapters)
    assert close(apply(trained), base(dora.merge(model, params, trained)))


@pytest.mark.parametrize("index", range(len(CELLS["nnx"])))
def test_nnx_recurrent_layers_compute_what_merged_ones_do(index):
    base: Any = CELLS["nnx"][index](nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2, target_modules=".*"), rngs=nnx.Rngs(1))
    run = nnx.jit(lambda model: model(x))
    assert same(run(adapted), run(base))
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    assert close(run(adapted), run(dora.merge(adapted)))


def test_linen_attention_decodes_step_by_step_what_it_computes_at_once():
    attention = functools.partial(linen.MultiHeadDotProductAttention, num_heads=2)
    whole, step = attention(), attention(decode=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    mask = linen.make_causal_mask(x[..., 0])
    variables = step.init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    settings = dora.DoRAConfig(rank=2)
    adapt = functools.partial(dora.apply_dora, params=params, rng=jax.random.key(1))
    at_once, adapters = adapt(whole, settings, inputs=ExampleCall((x,), kwargs={"mask": mask}))
    by_step, _ = adapt(step, settings, inputs=ExampleCall((x[:, :1],), variables={"cache": cache}))
    trained = random_adapters(adapters)
    merged = dora.merge(at_once, params, trained)

    def decode(model, variables):
        @quick_jit
        def one(cache, x_t):
            return model.apply({**variables, "cache": cache}, x_t, mutable=["cache"])

        state, outputs = cache, []
        for t in range(x.shape[1]):
            y, updated = one(state, x[:, t : t + 1])
            state = updated["cache"]
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    expected = at_once.apply({"params": params, "dora": trained}, x, mask=mask)
    assert close(decode(by_step, {"params": params, "dora": trained}), expected)
    assert close(decode(step, {"params": merged}), expected)


def test_nnx_attention_decodes_step_by_step_what_it_computes_at_once():
    base = nnx.MultiHeadAttention(num_heads=2, in_features=6, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    expected = adapted(x, mask=nnx.make_causal_mask(x[..., 0]), decode=False)
    one = nnx.jit(lambda model, x: model(x, decode=True))
    for attention in (adapted, dora.merge(adapted)):
        attention.init_cache(x.shape)
        steps = [one(attention, x[:, t : t + 1]) for t in range(x.shape[1])]
        assert close(jnp.concatenate(steps, axis=1), expected)


@st.composite
def einsum_rows(draw):
    """Draws an Einsum layer: its equation with any order of axes, sizes, rank and front end."""
    count = {"batch": (0, 2), "stack": (0, 1), "inputs": (1, 2), "outputs": (1, 2)}
    letters = iter("abcdefg")
    groups = {k: [next(letters) for _ in range(draw(st.integers(*n)))] for k, n in count.items()}
    batch, stack, inputs, outputs = groups.values()
    size = {c: draw(st.integers(2, 4)) for group in groups.values() for c in group}
    x, w, y = (
        "".join(draw(st.permutations(term)))
        for term in (batch + stack + inputs, stack + inputs + outputs, batch + stack + outputs)
    )
    kernel_axes = reference.KernelAxes(
        *(tuple(w.index(c) for c in group) for group in (stack, inputs, outputs))
    )
    dots = "..." if draw(st.booleans()) else ""
    bias = (1,) * bool(dots) + tuple(size[c] if c in w else 1 for c in y)
    rows = einsum(
        f"{dots}{x},{w}->{dots}{y}",
        (2,) * bool(dots) + tuple(size[c] for c in x),
        tuple(size[c] for c in w),
        kernel_axes,
        draw(st.sampled_from([bias, None])),
    )
    rank = draw(st.integers(1, min(np.prod([size[c] for c in g]) for g in (inputs, outputs))))
    return draw(st.sampled_from(rows)), int(rank)


@settings(max_examples=12, derandomize=True)
@given(
    einsum_rows(),
    st.floats(0.1, 16),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.booleans(),
)
def test_any_contraction_keeps_its_laws(row_and_rank, alpha, dtype, detached):
    row, rank = row_and_rank
    params, _, xs = numbers(row, dtype)
    settings = config(
        row, rank=rank, alpha=alpha, norm_gradient="detached" if detached else "exact"
    )
    layers = model(row, dtype, dtype, PLAIN)
    adapted = layers.adapt(settings, params, xs)
    trained = random_adapters(adapted.adapters)
    apply, base = (quick_jit(f) for f in (adapted.apply, layers.base))
    assert same(apply(adapted.adapters, xs), base(params, xs))
    assert same(adapted.merge(adapted.adapters), params)
    bound = 1e-5 if dtype == jnp.float32 else 4e-2
    assert close(apply(trained, xs), base(adapted.merge(trained), xs), bound)
    gradient = quick_jit(
        jax.grad(lambda a: jnp.sum(adapted.apply(a, xs)["plain"].astype(jnp.float32) ** 2))
    )(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    assert all(bool(jnp.isfinite(g).all() and jnp.any(g)) for g in jax.tree.leaves(gradient))


@settings(max_examples=10, derandomize=True)
@given(st.sampled_from([row for row in ROWS if row.front_end == "nnx"]), st.booleans())
def test_an_adapted_nnx_layer_survives_split_and_merge(row, detached):
    x = draw_data(row, jnp.float32).x[0]
    base = _Calls(row, row.make(rngs=nnx.Rngs(0)))
    settings = config(row, norm_gradient="detached" if detached else "exact")
    adapted = dora.apply_dora(base, settings, rngs=nnx.Rngs(1), inputs=(x,))
    again = nnx.merge(*nnx.split(adapted))
    assert same(nnx.state(again), nnx.state(adapted))
    assert type(again.layer) is type(adapted.layer)
    run = nnx.jit(lambda model: model(x))
    assert same(run(again), run(adapted))
    assert same(dora.get_adapters(again), dora.get_adapters(adapted))
