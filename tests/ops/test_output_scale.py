"""`y = c h`: its value, and its gradient computed from `y`, as lowered for each platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dora_jax.ops import apply_scale
from tests.support import reference

SHAPES = {  # of h and c
    "matrix": ((7, 4), (1, 4)),
    "features alone": ((3, 5, 4), (4,)),
    "tokens": ((3, 5, 4), (1, 1, 4)),
    "one text": ((1, 5, 4), (1, 1, 4)),
    "heads": ((3, 5, 2, 4), (1, 1, 2, 4)),
    "experts": ((3, 5, 4), (3, 1, 4)),
    "features first": ((4, 5), (4, 1)),
    "heads of one": ((3, 1, 4), (1, 1, 4)),
    "one feature": ((3, 5, 1), (1, 1, 1)),
    "vector": ((4,), (4,)),
}
CASES = pytest.mark.parametrize(("h_shape", "c_shape"), SHAPES.values(), ids=SHAPES)


def draw(h_shape, c_shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    h, g = (jnp.asarray(rng.normal(size=h_shape), dtype) for _ in range(2))
    return h, jnp.asarray(rng.uniform(0.1, 3, c_shape), jnp.float32), g


def sum_to(x, shape):
    """Sums over the axes that a broadcast from `shape` made."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def pull_back(h, c, g):
    return jax.vjp(apply_scale, h, c)[1](g)


@pytest.mark.rows(12)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["op by op", "compiled"])
@CASES
def test_the_gradients_are_those_of_the_definition(h_shape, c_shape, run, dtype, bound):
    """Compiled for a CPU, the gradient is computed in another order than op by op."""
    h, c, g = draw(h_shape, c_shape, dtype)
    by_h, by_c = run(pull_back)(h, c, g)
    wide_h, wide_c, wide_g = reference.wide(h, c, g)
    assert by_h.dtype == dtype and by_c.dtype == jnp.float32
    assert by_h.shape == h_shape and by_c.shape == c_shape
    assert reference.relative_error(by_h, wide_g * wide_c) <= bound
    assert reference.relative_error(by_c, sum_to(wide_g * wide_h, c_shape)) <= bound


@pytest.mark.rows(2)
@pytest.mark.parametrize("shapes", ["tokens", "experts", "features first", "vector"])
def test_it_has_second_derivatives_in_both_modes(shapes):
    h, c, _ = draw(*SHAPES[shapes])
    check_grads(jax.jit(apply_scale), (h, c), 2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.rows(10)
@pytest.mark.parametrize("axes", [(0, None, 0), (None, 1, None)])
@CASES
def test_vmap_of_its_gradient_equals_a_loop(h_shape, c_shape, axes):
    h, c, g = draw(h_shape, c_shape)
    given = [
        v if axis is None else jnp.stack([v, 2 * v, -v], min(axis, v.ndim))
        for v, axis in zip((h, c, g), axes, strict=True)
    ]
    axes = [
        axis if axis is None else min(axis, v.ndim - 1) for v, axis in zip(given, axes, strict=True)
    ]
    found = jax.jit(jax.vmap(pull_back, axes))(*given)
    for i in range(3):
        one = [
            v if axis is None else jnp.take(v, i, axis) for v, axis in zip(given, axes, strict=True)
        ]
        for got, expected in zip(found, pull_back(*one), strict=True):
            assert reference.relative_error(got[i], expected) <= 1e-5


def test_one_of_two_arguments_may_be_constant():
    h, c, g = draw((7, 4), (1, 4))
    by_h, by_c = jax.jit(pull_back)(h, c, g)
    alone = jax.jit(lambda h: jax.vjp(lambda h: apply_scale(h, c), h)[1](g))(h)[0]
    assert np.array_equal(alone, by_h)
    alone = jax.jit(lambda c: jax.vjp(lambda c: apply_scale(h, c), c)[1](g))(c)[0]
    assert reference.relative_error(alone, by_c) <= 1e-6


def test_a_cotangent_may_be_constant():
    """A sum of `y` is linear in `c`: its second derivative is 0, up to rounding."""
    h, c, g = draw((7, 4), (1, 4))
    slope = jax.jit(
        lambda c: jax.jvp(jax.grad(lambda c: jnp.sum(g * apply_scale(h, c))), (c,), (c,))
    )
    first, second = slope(c)
    assert np.max(np.abs(second)) <= 1e-5 * np.max(np.abs(first))


def test_on_a_cpu_the_sum_is_over_the_rows_of_one_matrix():
    """The layer's own products use the scaled cotangent as that matrix: XLA computes it once."""
    h, c, g = draw((3, 5, 4), (1, 1, 4))
    text = jax.jit(pull_back).lower(h, c, g).as_text()
    assert "stablehlo.reduce" in text and "across dimensions = [0]" in text
    assert "tensor<15x4xf32>" in text


def test_a_scale_near_one_is_not_rounded_away():
    """1.003 is 1 in bfloat16. The result is rounded once, to the bfloat16 nearest to c h."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=4000), jnp.bfloat16)
    c = jnp.asarray(rng.uniform(0.98, 1.02, 4000), jnp.float32)
    y = apply_scale(h, c)
    assert y.dtype == jnp.bfloat16
    exact = jnp.asarray(np.multiply(*reference.wide(h, c)), jnp.float32)
    # The few others lie in float32 halfway between two bfloat16 numbers.
    assert np.mean(np.asarray(y == exact.astype(jnp.bfloat16))) > 0.999
    assert np.mean(np.asarray(y != h)) > 0.5


@pytest.mark.rows(8)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [-3.0, -0.1, 1e-6, 1e-4, 0.1, 0.9, 1.0, 1e3])
def test_the_gradient_of_a_scale_is_that_of_the_definition(scale, dtype, bound):
    rng = np.random.default_rng(0)
    h, weight = (jnp.asarray(rng.normal(size=(50, 4)), dtype) for _ in range(2))
    c = jnp.float32(scale) * jnp.array([1.0, 0.5, 2.0, 1.5])

    def loss(h, c):
        return jnp.sum(weight.astype(jnp.float32) * apply_scale(h, c).astype(jnp.float32))

    by_h, by_c = jax.grad(loss, (0, 1))(h, c)
    wide_h, wide_weight, wide_c = reference.wide(h, weight, c)
    assert by_h.dtype == dtype and by_c.dtype == jnp.float32
    assert reference.relative_error(by_h, wide_weight * wide_c) <= bound
    assert reference.relative_error(by_c, np.sum(wide_weight * wide_h, axis=0)) <= bound
    forward = jax.jvp(loss, (h, c), (jnp.ones_like(h), jnp.zeros_like(c)))[1]
    assert reference.relative_error(forward, np.sum(wide_weight * wide_c)) <= bound


def test_a_scale_of_zero_has_a_finite_gradient():
    c = jnp.array([0.0, 1.0])
    by_h, by_c = jax.grad(lambda h, c: jnp.sum(apply_scale(h, c)), (0, 1))(jnp.ones((3, 2)), c)
    assert np.array_equal(by_c, [0, 3])
    assert np.array_equal(by_h, [[0, 1]] * 3)


def test_the_backward_pass_keeps_the_output_of_a_scale_and_not_its_input():
    """The next layer keeps that output as well, so that both share one array."""
    h, c = jnp.ones((50, 4)), jnp.ones(4)

    def backward(h, c):
        return jax.vjp(lambda h, c: apply_scale(h, c) ** 2, h, c)[1]

    program = jax.make_jaxpr(backward)(h, c).jaxpr
    kept = {v for v in program.outvars if v.aval.shape == h.shape}
    # Two: `y`, and the `2 y` of the square.
    assert program.invars[0] not in kept
    assert len(kept) <= 2


def test_the_output_of_a_scale_is_kept_in_its_own_dtype():
    """XLA drops a cast to bfloat16 and back unless a barrier stands between the two casts."""
    h, c = jnp.ones((50, 4), jnp.bfloat16), jnp.ones(4)
    run = jax.jit(jax.grad(lambda c: jnp.sum(apply_scale(h, c).astype(jnp.float32))))
    program = run.trace(c).lower(lowering_platforms=("tpu",))
    barriers = [line for line in program.as_text().splitlines() if "optimization_barrier" in line]
    assert len(barriers) == 1 and "tensor<50x4xbf16>" in barriers[0]


@pytest.mark.rows(3)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("batch", [(1, 50), (5, 1), (3, 50)])
def test_the_gradient_of_a_scale_sums_over_each_axis_of_the_batch(batch, platform):
    """Also over one of length 1: XLA on a CPU is slow if it keeps a leading axis of length 1."""
    h, c = jnp.ones((*batch, 4)), jnp.ones((1, 1, 4))
    run = jax.jit(jax.grad(lambda c: jnp.sum(apply_scale(h, c))))
    text = run.trace(c).lower(lowering_platforms=(platform,)).as_text()
    expected = "across dimensions = [0]" if platform == "cpu" else "across dimensions = [0, 1]"
    assert text.count("across dimensions") == text.count(expected) == 1
