"""The products with A and B: the values and derivatives of JAX's product, in another order."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.test_util import check_grads

import dora_jax as dora
from dora_jax.ops import down_projection, up_projection
from tests.laws.test_compiled import equations
from tests.support import reference
from tests.support.models import adapted_chain, inputs, random_adapters

SHAPES = {  # the product, the shapes of its operands, and its number of stack axes
    "matrix, A": (down_projection, (7, 5), (5, 3), 0),
    "tokens, A": (down_projection, (2, 7, 5), (5, 3), 0),
    "vector, A": (down_projection, (5,), (5, 3), 0),
    "matrix": (up_projection, (7, 3), (3, 5), 0),
    "tokens": (up_projection, (2, 7, 3), (3, 5), 0),
    "vector": (up_projection, (3,), (3, 5), 0),
    "heads": (up_projection, (2, 7, 3), (3, 4, 5), 0),
    "experts": (functools.partial(up_projection, stack=1), (6, 2, 7, 3), (6, 3, 5), 1),
    "two stacks": (functools.partial(up_projection, stack=2), (6, 4, 7, 3), (6, 4, 3, 5), 2),
}
CASES = pytest.mark.parametrize(("f", "x_shape", "b_shape", "stack"), SHAPES.values(), ids=SHAPES)
BOTH = pytest.mark.parametrize("f", [down_projection, up_projection])


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def in_numpy(x, b, stack):
    s, n, o = "uv"[:stack], "mn"[: x.ndim - stack - 1], "op"[: b.ndim - stack - 1]
    return np.einsum(f"{s}{n}r,{s}r{o}->{s}{n}{o}", *reference.wide(x, b))


@pytest.mark.rows(9)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
@CASES
def test_it_is_the_product(f, x_shape, b_shape, stack, run):
    x, b = draw(x_shape, b_shape)
    y = run(f)(x, b)
    assert reference.relative_error(y, in_numpy(x, b, stack)) <= 1e-6


@pytest.mark.rows(4)
@CASES
def test_its_first_and_second_derivatives_in_both_modes_are_finite_differences(
    f, x_shape, b_shape, stack
):
    check_grads(f, draw(x_shape, b_shape), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.rows(15)
@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 0), (None, 2), (1, 1), (2, 0)])
@CASES
def test_vmap_of_it_and_of_its_gradient_equals_a_loop(f, x_shape, b_shape, stack, axes):
    def loss(x, b):
        return jnp.sum(jnp.sin(f(x, b)))

    def batched(shape, axis):
        axis = None if axis is None else min(axis, len(shape))
        return shape if axis is None else (*shape[:axis], 3, *shape[axis:]), axis

    (x_shape, x_axis), (b_shape, b_axis) = batched(x_shape, axes[0]), batched(b_shape, axes[1])
    x, b = draw(x_shape, b_shape)
    for function in (f, jax.grad(loss, (0, 1))):
        found = jax.jit(jax.vmap(function, (x_axis, b_axis)))(x, b)
        expected = [
            function(
                x if x_axis is None else jnp.take(x, i, x_axis),
                b if b_axis is None else jnp.take(b, i, b_axis),
            )
            for i in range(3)
        ]
        expected = jax.tree.map(lambda *parts: jnp.stack(parts), *expected)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_the_gradient_of_b_has_the_activation_as_left_operand_and_no_transpose():
    x, b = draw((2, 7, 3), (3, 5))

    def backward(g):
        return jax.vjp(functools.partial(up_projection, x), b)[1](g)[0]

    jaxpr = jax.make_jaxpr(backward)(jnp.ones((2, 7, 5)))
    (product,) = (e for e in equations(jaxpr) if str(e.primitive) == "dot_general")
    assert [v.aval.shape for v in product.invars] == [(2, 7, 3), (2, 7, 5)]
    assert "transpose" not in {str(e.primitive) for e in equations(jaxpr)}


@pytest.mark.parametrize("x_shape", [(40, 30), (4, 10, 30)])
def test_on_a_cpu_the_gradient_of_a_is_a_product_with_r_rows(x_shape):
    """A product with r columns is slow there."""
    x, a, g = draw(x_shape, (30, 2), (*x_shape[:-1], 2))

    def backward(x, a, g):
        return jax.vjp(functools.partial(down_projection, x), a)[1](g)[0]

    def products(platform):
        lowered = jax.jit(backward).trace(x, a, g).lower(lowering_platforms=(platform,))
        return lowered if platform != "cpu" else lowered.compile()

    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", products("cpu").as_text())
    assert shapes == ["2,30"]
    assert "optimization_barrier" not in products("tpu").as_text()
    expected = np.einsum("bi,br->ir", *(v.reshape(-1, v.shape[-1]) for v in reference.wide(x, g)))
    assert reference.relative_error(backward(x, a, g), expected) <= 1e-6
    assert reference.relative_error(jax.jit(backward)(x, a, g), expected) <= 1e-6


@pytest.mark.parametrize("outer", ["gradient", "vmap"])
def test_on_a_cpu_it_has_r_rows_for_every_copy_in_a_vmap(outer):
    x, a, g = draw((3, 40, 30), (3, 30, 2), (3, 40, 2))

    def backward(x, a, g):
        run = down_projection if outer == "vmap" else jax.vmap(down_projection)
        return jax.vjp(functools.partial(run, x), a)[1](g)[0]

    run = jax.jit(jax.vmap(backward) if outer == "vmap" else backward)
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", run.lower(x, a, g).compile().as_text())
    assert shapes == ["3,2,30"]
    expected = np.einsum("kbi,kbr->kir", *reference.wide(x, g))
    assert reference.relative_error(run(x, a, g), expected) <= 1e-6


@BOTH
@pytest.mark.parametrize("given", ["default", "high", "highest", lax.Precision.HIGHEST])
def test_a_precision_holds_for_the_product_and_its_gradients(f, given):
    x, b, g = draw((7, 3), (3, 5), (7, 5))

    @jax.jit
    def run(x, b, g):
        y, pull_back = jax.vjp(functools.partial(f, precision=given), x, b)
        return y, pull_back(g)

    name, text = lax.Precision(given).name, run.lower(x, b, g).as_text()
    assert text.count("stablehlo.dot_general") == 3
    assert text.count(f"precision = [{name}, {name}]") == 3


@BOTH
def test_the_default_precision_is_read_when_the_product_is_traced(f):
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(f)(*draw((7, 3), (3, 5)))
    (equation,) = jaxpr.eqns
    assert equation.params["precision"] == "highest"


@BOTH
def test_dtypes_promote_as_in_a_product(f):
    x, b = draw((7, 3), (3, 5))
    assert f(x.astype(jnp.bfloat16), b).dtype == jnp.float32
    assert f(x.astype(jnp.bfloat16), b.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.full
@pytest.mark.parametrize("decompose", [True, False])
def test_an_adapted_model_has_forward_mode_and_second_derivatives(decompose):
    config = dora.DoRAConfig(rank=2, decompose=decompose)
    chain = adapted_chain("linen", config, (4, 6, 3))
    x, adapters = inputs(5, 4), random_adapters(chain.adapters)

    def loss(adapters):
        return jnp.mean(jnp.sin(chain.apply(chain.params, adapters, x)))

    def slope(adapters, direction):
        return jax.jvp(loss, (adapters,), (direction,))[1]

    @jax.jit
    def derivatives(adapters, direction):
        gradient, twice = jax.jvp(jax.grad(loss), (adapters,), (direction,))
        return gradient, slope(adapters, direction), twice, jax.grad(slope)(adapters, direction)

    direction = random_adapters(adapters, seed=5)
    gradient, forward, twice, also_twice = derivatives(adapters, direction)
    assert reference.relative_error(forward, optax.tree.vdot(gradient, direction)) <= 1e-5
    there = jax.tree.map(lambda a, d: a + 1e-2 * d, adapters, direction)
    back = jax.tree.map(lambda a, d: a - 1e-2 * d, adapters, direction)
    plus, minus = (derivatives(a, direction)[0] for a in (there, back))
    difference = jax.tree.map(lambda p, m: (p - m) / 2e-2, plus, minus)
    leaves = (jax.tree.leaves(tree) for tree in (twice, also_twice, difference))
    for one, other, measured in zip(*leaves, strict=True):
        assert reference.relative_error(one, other) <= 1e-4
        assert reference.relative_error(one, measured) <= 1e-2
