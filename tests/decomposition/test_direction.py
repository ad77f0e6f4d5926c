"""Columns that an adapter shrinks: the sums from the factors cancel, `V` itself does not."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dora_jax.decomposition import Factors, KernelAxes, KernelProduct, relative_square
from dora_jax.decomposition.direction import SMALL_SQUARE
from tests.support import reference
from tests.support.quick import compiled_anew, quick_jit

DENSE = KernelAxes((), (0,), (1,))
SIZES = (48, 40, 8)  # in, out, rank


def draw(deltas, seed=0, shape=SIZES):
    """Returns a kernel, whose column j the factors shrink to `deltas[j]` of its length.

    All numbers are small multiples of powers of two, so that `s A B` is exact in float32.
    """
    rng = np.random.default_rng(seed)
    inputs, outputs, rank = shape
    a, b = (rng.integers(-8, 9, s) / 8.0 for s in ((inputs, rank), (rank, outputs)))
    left = rng.normal(size=(inputs, outputs))
    low = a @ b
    left *= np.linalg.norm(low, axis=0) / np.linalg.norm(left, axis=0)
    kernel = (np.asarray(deltas) * left - 2.0 * low).astype(np.float32)
    norm = np.linalg.norm(kernel.astype(np.float64), axis=0)
    arrays = (kernel, a, b, norm)
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def square(kernel, a, b, norm):
    product = KernelProduct(DENSE, precision="highest")
    return relative_square(kernel, Factors(a, b), norm, 2.0, product)


def expected_square(kernel, a, b, norm):
    v = np.square(reference.norm(kernel, a, b, 2.0))
    return v / np.square(np.asarray(norm, np.float64))


def expected_gradients(kernel, a, b, norm, weights):
    w, a, b, norm, weights = reference.wide(kernel, a, b, norm, weights)
    dv = 2 * (w + 2.0 * a @ b) * weights / np.square(norm)
    return 2.0 * dv @ b.T, 2.0 * a.T @ dv


ONE = np.where(np.arange(SIZES[1]) == 17, 1e-4, 1.0)


@pytest.mark.parametrize("deltas", [ONE, 1e-4, 1e-2, 0.25], ids=["one", "1e-4", "1e-2", "0.25"])
def test_the_square_of_a_short_direction_and_its_gradients_are_exact(deltas):
    given = draw(deltas)
    truth = expected_square(*given)
    weights = jnp.asarray(1 / truth, jnp.float32)
    found, pull_back = jax.vjp(quick_jit(square), *given)
    assert np.max(np.abs(found / truth - 1)) <= 1e-5
    _, by_a, by_b, _ = pull_back(weights)
    for value, wanted in zip((by_a, by_b), expected_gradients(*given, weights), strict=True):
        assert reference.relative_error(value, wanted) <= 1e-5
    kernel, *others = given
    tangents = (jnp.zeros_like(kernel), *(jnp.ones_like(x) for x in others[:2]))
    along = quick_jit(lambda *args: jax.jvp(lambda *x: square(*x, others[-1]), given[:3], args)[1])
    forward = along(*tangents)
    by_all = sum(np.sum(x) for x in expected_gradients(*given, weights))
    assert abs(np.sum(reference.wide(weights * forward)[0]) / by_all - 1) <= 1e-4


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("kernels", [None, 0], ids=["one kernel", "a kernel each"])
def test_under_vmap_the_choice_is_one_for_the_batch(kernels, order):
    """A conditional and no selection, which would run both ways; also with one kernel for all."""
    draws = [draw(deltas, seed) for seed, deltas in enumerate([0.9, 1e-3, ONE])]
    if kernels is None:
        kernel, *_, norm = draws[1]
        draws = [(kernel, a, b, norm) for _, a, b, _ in draws]
    axes = (kernels, 0, 0, kernels)
    given = [
        jnp.stack(values) if axis == 0 else values[0]
        for axis, values in zip(axes, zip(*draws, strict=True), strict=True)
    ]

    def loss(kernel, a, b, norm):
        return jnp.sum(jnp.log(square(kernel, a, b, norm)))

    alone = quick_jit(jax.grad(loss, (1, 2)))
    if order == "vmap of grad":
        run = jax.vmap(alone, axes)
    else:
        run = jax.grad(lambda *args: jnp.sum(jax.vmap(loss, axes)(*args)), (1, 2))
    program = jax.jit(run).lower(*given).as_text()
    assert program.count("stablehlo.case") == 2
    found = quick_jit(run)(*given)
    for i, one in enumerate(draws):
        for value, wanted in zip(found, alone(*one), strict=True):
            assert reference.relative_error(value[i], wanted) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("argument", [1, 2])
def test_a_short_direction_has_second_derivatives_in_both_modes(argument):
    with jax.enable_x64(True):
        given = [x.astype(jnp.float64) for x in draw(0.2, shape=(6, 5, 2))]
        assert np.all(np.asarray(square(*given)) < SMALL_SQUARE)

        @jax.jit
        def run(x):
            return square(*given[:argument], x, *given[argument + 1 :])

        check_grads(run, (given[argument],), 2, modes=("fwd", "rev"))


def test_no_array_of_either_way_is_as_large_as_the_kernel():
    sizes = (1056, 1024, 8)  # above 2^20 weights: V of a smaller kernel is formed whole
    given = draw(1e-3, shape=sizes)

    def loss(a, b):
        return jnp.sum(jnp.log(square(given[0], a, b, given[3])))

    with compiled_anew():
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*given[1:3]).compile().as_text()
    assert program.count("conditional(") == 2
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?!constant|get-tuple-element|parameter)", program)
    largest = max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)
    assert largest <= sizes[0] * max(sizes[2], sizes[1] // 8)
