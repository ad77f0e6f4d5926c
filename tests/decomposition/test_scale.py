"""The mathematics on arrays, against float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from dora_jax import DoRAConfig
from dora_jax.decomposition import (
    Factors,
    KernelAxes,
    KernelProduct,
    base_changed,
    describe_base,
    direction_norm,
    magnitude_over_norm,
    materialize,
    relative_square,
)
from dora_jax.ops import apply_scale
from tests.support import reference
from tests.support.properties import for_all
from tests.support.quick import quick_jit

DENSE = KernelAxes((), (0,), (1,))
STACKED = KernelAxes((0,), (1,), (2,))

WIDTHS = [(8, 5), (5, 8), (384, 1536), (1536, 384), (1536, 1536)]


describe = quick_jit(describe_base, static_argnums=(1, 2))
merge = quick_jit(materialize, static_argnums=(0, 4))


def spec(rank, alpha=16.0, **switches):
    return DoRAConfig(rank=rank, alpha=alpha, **switches).layer_settings(())


def draw(kernel_shape, rank, axes=DENSE, dtype=jnp.float32, seed=0):
    """Returns a kernel, an adapter far from its start, and what is kept of the kernel."""
    rng = np.random.default_rng(seed)
    fan_in = int(np.prod([kernel_shape[i] for i in axes.inputs]))
    shapes = axes.shapes(kernel_shape, rank)
    kernel = jnp.asarray(rng.normal(size=kernel_shape) / np.sqrt(fan_in), dtype)
    base = describe(kernel, axes)
    adapter = {
        "lora_a": rng.normal(size=shapes["lora_a"]) / np.sqrt(fan_in),
        "lora_b": rng.normal(size=shapes["lora_b"]) / rank,
        "magnitude": np.asarray(base.norm) * rng.uniform(0.5, 2, shapes["magnitude"]),
    }
    wide = jnp.promote_types(dtype, jnp.float32)
    return kernel, {k: jnp.asarray(v, wide) for k, v in adapter.items()}, base


def forward(spec, axes, x, kernel, adapter, base):
    """Returns `x W'` as an adapted layer computes it, for kernels (in, out) or stacks of them."""
    h = x @ kernel + spec.scaling * ((x @ adapter["lora_a"]) @ adapter["lora_b"])
    scale = magnitude_over_norm(spec, kernel, adapter, base, KernelProduct(axes))
    return apply_scale(h, scale[..., None, :])


@functools.partial(quick_jit, static_argnums=(3, 4))
def norm_of_direction(kernel, adapter, base, scaling, axes):
    square = relative_square(
        kernel,
        Factors(adapter["lora_a"], adapter["lora_b"]),
        base.norm,
        scaling,
        KernelProduct(axes),
    )
    return direction_norm(square, base.norm, 1e-8)


def as_matrices(kernel, adapter, axes):
    """Returns kernel, A, B, m of any layout as the reference takes them."""
    stack, inputs, outputs = (len(group) for group in axes)
    order = tuple(range(kernel.ndim + 1))
    a_axes = KernelAxes(order[:stack], order[stack : stack + inputs], (stack + inputs,))
    b_axes = KernelAxes(order[:stack], (stack,), order[stack + 1 : stack + 1 + outputs])
    a = reference.as_stack_of_matrices(adapter["lora_a"], a_axes)
    b = reference.as_stack_of_matrices(adapter["lora_b"], b_axes)
    w = reference.as_stack_of_matrices(kernel, axes)
    return w, a, b, np.reshape(adapter["magnitude"], (w.shape[0], w.shape[2]))


@st.composite
def layouts(draw):
    """Draws a kernel's shape, which of its axes are stack, in and out, and a rank."""
    kinds = draw(
        st.lists(st.sampled_from("sio"), max_size=3).flatmap(
            lambda more: st.permutations(["i", "o", *more])
        )
    )
    sizes = draw(st.lists(st.integers(1, 4), min_size=len(kinds), max_size=len(kinds)))
    axes = KernelAxes(*(tuple(i for i, k in enumerate(kinds) if k == g) for g in "sio"))
    return tuple(sizes), axes, draw(st.integers(1, 4))


@pytest.mark.parametrize("detached", [False, True])
def test_hand_derived_gradients_agree_with_finite_differences(detached):
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=s) for s in ((3, 6), (6, 4), (6, 2), (2, 4)))
    m, dy, s = rng.uniform(0.5, 2, 4), rng.normal(size=(3, 4)), 0.7
    held = reference.norm(w, a, b, s) if detached else None

    def loss(**changed):
        values = {"x": x, "a": a, "b": b, "m": m, **changed}
        kernel = reference.merged(w, values["a"], values["b"], values["m"], s, divisor=held)
        return float(np.sum(dy * (values["x"] @ kernel)))

    def along(name):
        return lambda value: loss(**{name: value})

    found = reference.gradients(x, w, a, b, m, s, dy, detached=detached)
    for name, at, gradient in zip("abmx", (a, b, m, x), found, strict=True):
        expected = reference.differences(along(name), at)
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.rows(6)
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factored_norm_is_that_of_the_sum(widths, rank, dtype):
    """Of the sum that the layer multiplies by: A and B as rounded to its dtype."""
    rank = min(rank, *widths)
    kernel, adapter, base = draw(widths, rank, dtype=dtype)
    n = norm_of_direction(kernel, adapter, base, 2.0, DENSE)
    a, b = (adapter[name].astype(dtype) for name in ("lora_a", "lora_b"))
    # XLA may leave out a rounding to bfloat16 and back: 1.2e-4 at rank 64, against 2e-7 without.
    tolerance = 5e-7 if dtype == jnp.float32 else 1e-3
    np.testing.assert_allclose(n, reference.norm(kernel, a, b, 2.0), rtol=tolerance)


@pytest.mark.rows(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_base_norm_is_that_of_the_kernel(widths, dtype):
    kernel, _, base = draw(widths, 1, dtype=dtype)
    np.testing.assert_allclose(base.norm, reference.norm(kernel), rtol=5e-7)


@for_all(layouts(), st.integers(0, 2**32 - 1), few=6)
def test_any_layout_is_a_stack_of_matrices(layout, seed):
    """In float64: where W0 and s A B nearly cancel, float32 has few digits of the norm left."""
    shape, axes, rank = layout
    settings = spec(rank, alpha=1.5 * rank)
    with jax.enable_x64(True):
        kernel, adapter, base = draw(shape, rank, axes, dtype=jnp.float64, seed=seed)
        n = norm_of_direction(kernel, adapter, base, settings.scaling, axes)
        merged = merge(settings, kernel, adapter, base, axes)
    w, a, b, m = as_matrices(kernel, adapter, axes)
    flat = functools.partial(np.reshape, shape=m.shape)
    np.testing.assert_allclose(flat(base.norm), reference.norm(w), rtol=1e-12)
    np.testing.assert_allclose(flat(n), reference.norm(w, a, b, settings.scaling), rtol=1e-8)
    expected = reference.merged(w, a, b, m, settings.scaling)
    np.testing.assert_allclose(
        reference.as_stack_of_matrices(merged, axes), expected, rtol=1e-8, atol=1e-10
    )


@pytest.mark.rows(6)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 1e-30])
def test_scale_is_exactly_one_at_the_start(jit, dtype, scale):
    """Also for columns below eps, whose norm is taken to be eps."""
    kernel, adapter, _ = draw((96, 40), 4, dtype=dtype)
    kernel = (kernel * scale).astype(dtype)
    base = describe(kernel, DENSE)
    adapter |= {"lora_b": jnp.zeros((4, 40)), "magnitude": base.norm}
    run = functools.partial(magnitude_over_norm, spec(4), product=KernelProduct(DENSE))
    scale = (jax.jit(run) if jit else run)(kernel, adapter, base)
    assert scale.shape == (40,)
    assert np.all(np.asarray(scale) == 1)


@pytest.mark.rows(4)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_gradients_are_those_of_the_reference(widths, detached):
    kernel, adapter, base = draw(widths, 4)
    settings = spec(4, norm_gradient="detached" if detached else "exact")
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(16, w)), jnp.float32) for w in widths)

    @quick_jit
    def loss(adapter, x):
        return jnp.sum(dy * forward(settings, DENSE, x, kernel, adapter, base))

    found, found_x = jax.grad(loss, (0, 1))(adapter, x)
    expected = reference.gradients(
        x, kernel, **adapter, scaling=settings.scaling, output_gradient=dy, detached=detached
    )
    for name, gradient in found.items():
        assert reference.relative_error(gradient, getattr(expected, name)) <= 1e-5, name
    assert reference.relative_error(found_x, expected.inputs) <= 1e-5


@pytest.mark.rows(1)
@pytest.mark.parametrize("detached", [False, True])
def test_the_formulas_are_exact(detached):
    """In float64 nothing is left of the differences that float32 allows."""
    with jax.enable_x64(True):
        kernel, adapter, base = draw((3, 20, 9), 4, STACKED, dtype=jnp.float64)
        settings = spec(4, norm_gradient="detached" if detached else "exact")
        rng = np.random.default_rng(1)
        x, dy = (jnp.asarray(rng.normal(size=(3, 5, w))) for w in (20, 9))

        def loss(adapter):
            return jnp.sum(dy * forward(settings, STACKED, x, kernel, adapter, base))

        found = jax.grad(loss)(adapter)
        merged = merge(settings, kernel, adapter, base, STACKED)
    expected = reference.gradients(
        x, kernel, **adapter, scaling=settings.scaling, output_gradient=dy, detached=detached
    )
    for name, gradient in found.items():
        assert gradient.dtype == np.float64
        assert reference.relative_error(gradient, getattr(expected, name)) <= 1e-12, name
    plain = reference.merged(kernel, **adapter, scaling=settings.scaling)
    assert reference.relative_error(merged, plain) <= 1e-12


@pytest.mark.rows(6)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("magnitude_trainable", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_merged_kernel_is_that_of_the_reference(widths, magnitude_trainable, normalize):
    kernel, adapter, base = draw(widths, 4)
    settings = spec(4, magnitude_trainable=magnitude_trainable, normalize=normalize)
    merged = merge(settings, kernel, adapter, base, DENSE)
    before = reference.norm(kernel)
    expected = reference.merged(
        kernel,
        adapter["lora_a"],
        adapter["lora_b"],
        adapter["magnitude"] if magnitude_trainable else before,
        settings.scaling,
        divisor=None if normalize else before,
    )
    assert reference.relative_error(merged, expected) <= 2e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merging_an_untrained_adapter_gives_back_the_kernel(dtype):
    kernel, adapter, base = draw((96, 40), 4, dtype=dtype)
    adapter |= {"lora_b": jnp.zeros((4, 40)), "magnitude": base.norm}
    run = jax.jit(materialize, static_argnums=(0, 4))
    merged = run(spec(4), kernel, adapter, base, DENSE)
    assert merged.dtype == dtype
    assert np.all(np.asarray(merged == kernel))


def test_a_stack_is_its_slices():
    kernel, adapter, base = draw((3, 20, 9), 4, STACKED)
    stacked = magnitude_over_norm(spec(4), kernel, adapter, base, KernelProduct(STACKED))
    for i in range(3):
        one, part = jax.tree.map(lambda leaf, i=i: leaf[i], (adapter, base))
        alone = magnitude_over_norm(spec(4), kernel[i], one, part, KernelProduct(DENSE))
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.rows(1)
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_zero_column_stays_zero_and_finite(norm_gradient, normalize):
    kernel, adapter, _ = draw((20, 9), 4)
    kernel = kernel.at[:, jnp.array([0, 5])].set(0)
    base = describe(kernel, DENSE)
    settings = spec(4, norm_gradient=norm_gradient, normalize=normalize)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 20)), jnp.float32)

    def output(adapter):
        return forward(settings, DENSE, x, kernel, adapter, base)

    y = output(adapter)
    assert np.all(np.asarray(y[:, [0, 5]]) == 0)
    assert np.all(np.abs(np.asarray(y[:, 1])) > 0)
    assert np.all(np.asarray(materialize(settings, kernel, adapter, base, DENSE)[:, [0, 5]]) == 0)
    gradients = jax.grad(lambda adapter: jnp.sum(jnp.sin(output(adapter))))(adapter)
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name
    assert np.all(np.asarray(gradients["magnitude"][jnp.array([0, 5])]) == 0)
    assert np.all(np.asarray(gradients["lora_b"][:, jnp.array([0, 5])]) == 0)


def test_a_direction_that_vanishes_gives_no_nan():
    """W0 + s A B = 0: the norm is eps, not 0."""
    kernel, adapter, base = draw((20, 9), 4)
    settings = spec(4, alpha=4.0)
    kernel = kernel.at[:, 3].set(-adapter["lora_a"] @ adapter["lora_b"][:, 3])
    base = describe(kernel, DENSE)

    def total(adapter):
        return jnp.sum(
            magnitude_over_norm(settings, kernel, adapter, base, KernelProduct(DENSE))[:3]
        )

    for leaf in jax.tree.leaves((total(adapter), jax.grad(total)(adapter))):
        assert np.all(np.isfinite(leaf))
    n = norm_of_direction(kernel, adapter, base, settings.scaling, DENSE)
    assert 0.99e-8 <= n[3] <= 1e-3 * base.norm[3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scale_far_from_one_is_as_exact_as_any(dtype):
    """Output, gradients and merged kernel, of scales from 1e-8 to 1e8 and of either sign."""
    kernel, adapter, base = draw((20, 18), 4, dtype=dtype)
    far = np.geomspace(1e-8, 1e8, 9)
    adapter |= {"magnitude": base.norm * np.concatenate([far, -far]).astype(np.float32)}
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(7, width)), dtype) for width in (20, 18))
    a, b = (adapter[name].astype(dtype) for name in ("lora_a", "lora_b"))
    m, s = adapter["magnitude"], spec(4).scaling

    @quick_jit
    def run(adapter, x):
        def output(adapter, x):
            return forward(spec(4), DENSE, x, kernel, adapter, base)

        y, pull_back = jax.vjp(output, adapter, x)
        return y, *pull_back(dy), materialize(spec(4), kernel, adapter, base, DENSE)

    y, found, found_x, merged = run({**adapter, "lora_a": a, "lora_b": b}, x)
    bound = 1e-5 if dtype == jnp.float32 else 5e-2
    expected = reference.gradients(x, kernel, a, b, m, s, dy, detached=False)
    plain = reference.merged(kernel, a, b, m, s)
    w_x = reference.wide(x)[0] @ plain
    pairs = [(y, w_x), (merged, plain), (found["lora_b"], expected.lora_b)]
    for column in range(18):  # each against its own size
        for value, wanted in pairs:
            assert reference.relative_error(value[:, column], wanted[:, column]) <= bound
    for name in ("lora_a", "magnitude"):
        assert reference.relative_error(found[name], getattr(expected, name)) <= bound, name
    assert reference.relative_error(found_x, expected.inputs) <= bound


@pytest.mark.rows(2)
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, -1e-12, 1e-4])
def test_a_magnitude_at_zero_has_the_gradient_of_any_other(magnitude):
    """Taken from an output that is 0 it would be 0, and the magnitude never move again."""
    kernel, adapter, base = draw((20, 9), 4)
    adapter |= {"magnitude": adapter["magnitude"].at[2].set(magnitude)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 20)), jnp.float32)

    @quick_jit
    def output(adapter):
        return forward(spec(4), DENSE, x, kernel, adapter, base)

    by_m = jax.grad(lambda adapter: jnp.sum(output(adapter)[:, 2]))(adapter)["magnitude"]
    wide_x, w, a, b = reference.wide(x, kernel, adapter["lora_a"], adapter["lora_b"])
    v = w + spec(4).scaling * a @ b
    expected = np.sum((wide_x @ v)[:, 2]) / np.linalg.norm(v, axis=0)[2]
    assert reference.relative_error(by_m[2], expected) <= 1e-5
    largest = np.max(np.abs(wide_x @ v)[:, 2]) / np.linalg.norm(v, axis=0)[2]
    n = np.linalg.norm(v, axis=0)[2]
    assert (
        np.max(np.abs(output(adapter)[:, 2])) <= largest * (abs(magnitude) + 2.0**-23 * n) * 1.001
    )


def test_a_slice_that_is_switched_off_has_scale_one_also_where_it_is_zero():
    kernel, adapter, _ = draw((2, 20, 9), 4, STACKED)
    kernel = kernel.at[0, :, 3].set(0)
    base = dataclasses.replace(describe(kernel, STACKED), mask=jnp.array([False, True]))

    @quick_jit
    def scale(adapter):
        return magnitude_over_norm(spec(4), kernel, adapter, base, KernelProduct(STACKED))

    assert np.all(np.asarray(scale(adapter)[0] == 1))
    assert np.all(np.asarray(scale(adapter)[1] != 1))
    for leaf in jax.tree.leaves(jax.grad(lambda adapter: jnp.sum(scale(adapter)))(adapter)):
        assert np.all(np.asarray(leaf[0] == 0)) and np.all(np.isfinite(leaf))


def test_the_gradient_of_the_norm_makes_no_product_twice():
    """Six: A^T W0, A^T A and its product with B; for A, those of its gradient with W0, B and A.

    Four more are in the ways by V itself, two for the norm and two for the gradient of A.
    """
    kernel, adapter, base = draw((20, 9), 4)

    def total(adapter):
        return jnp.sum(norm_of_direction(kernel, adapter, base, 2.0, DENSE))

    program = jax.jit(jax.grad(total)).lower(adapter).as_text()
    assert program.count("stablehlo.case") == 2
    assert program.count("stablehlo.dot_general") == 6 + 2 * 2


@pytest.mark.rows(1)
@pytest.mark.parametrize("argument", ["kernel", "lora_a", "lora_b"])
def test_the_square_is_differentiated_by_each_of_its_arguments(argument):
    kernel, adapter, base = draw((20, 9), 4)
    arguments = {"kernel": kernel, "lora_a": adapter["lora_a"], "lora_b": adapter["lora_b"]}

    @quick_jit
    def change(value):
        given = {**arguments, argument: value}
        factors = Factors(given["lora_a"], given["lora_b"])
        product = KernelProduct(DENSE, precision="highest")
        return relative_square(given["kernel"], factors, base.norm, 2.0, product)

    check_grads(change, (arguments[argument],), 2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_a_cast_is_no_change_of_the_base(dtype):
    kernel = 8 * draw((96, 40), 4)[0]  # in the range that float8 holds without underflow
    base = describe(kernel, DENSE)
    assert not np.any(base_changed(kernel.astype(dtype), base, DENSE))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25, -1.0])
def test_another_kernel_is_noticed_column_by_column(factor):
    kernel, adapter, base = draw((96, 40), 4)
    other = kernel.at[:, 7].multiply(factor)
    changed = np.arange(40) == 7
    assert np.array_equal(base_changed(other, base, DENSE), changed)
    scale = magnitude_over_norm(spec(4), other, adapter, base, KernelProduct(DENSE))
    assert np.array_equal(np.isnan(scale), changed)


def test_axes_group_the_shapes():
    axes = KernelAxes(stack=(0, 3), inputs=(2,), outputs=(1, 4))
    assert axes.ndim == 5
    assert axes.shapes((2, 3, 4, 5, 6), rank=7) == {
        "lora_a": (2, 5, 4, 7),
        "lora_b": (2, 5, 7, 3, 6),
        "magnitude": (2, 5, 3, 6),
    }
