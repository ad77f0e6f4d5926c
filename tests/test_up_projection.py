"""The product with B: JAX's own in value and every derivative, in an order of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.test_util import check_grads

import dora_jax as dora
from dora_jax.up_projection import up_projection
from tests import reference
from tests.models import adapted_chain, inputs, random_adapters
from tests.test_compiled import equations

SHAPES = {  # of x and b, and how many leading axes are stack
    "matrix": ((7, 3), (3, 5), 0),
    "tokens": ((2, 7, 3), (3, 5), 0),
    "vector": ((3,), (3, 5), 0),
    "heads": ((2, 7, 3), (3, 4, 5), 0),
    "experts": ((6, 2, 7, 3), (6, 3, 5), 1),
    "two stacks": ((6, 4, 7, 3), (6, 4, 3, 5), 2),
}
CASES = pytest.mark.parametrize(("x_shape", "b_shape", "stack"), SHAPES.values(), ids=SHAPES)


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def in_numpy(x, b, stack):
    s, n, o = "uv"[:stack], "mn"[: x.ndim - stack - 1], "op"[: b.ndim - stack - 1]
    return np.einsum(f"{s}{n}r,{s}r{o}->{s}{n}{o}", *reference.wide(x, b))


@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
@CASES
def test_it_is_the_product_over_r(x_shape, b_shape, stack, run):
    x, b = draw(x_shape, b_shape)
    y = run(functools.partial(up_projection, stack=stack))(x, b)
    assert reference.relative_error(y, in_numpy(x, b, stack)) <= 1e-6


@CASES
def test_its_derivatives_are_those_of_differences_forward_reverse_and_twice(
    x_shape, b_shape, stack
):
    f = functools.partial(up_projection, stack=stack)
    check_grads(f, draw(x_shape, b_shape), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 0), (None, 2), (1, 1), (2, 0)])
@CASES
def test_vmap_is_a_loop_also_of_its_gradient(x_shape, b_shape, stack, axes):
    f = functools.partial(up_projection, stack=stack)

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


def test_the_gradient_of_b_takes_the_activation_first_and_transposes_nothing():
    x, b = draw((2, 7, 3), (3, 5))

    def backward(g):
        return jax.vjp(functools.partial(up_projection, x), b)[1](g)[0]

    jaxpr = jax.make_jaxpr(backward)(jnp.ones((2, 7, 5)))
    (product,) = (e for e in equations(jaxpr) if str(e.primitive) == "dot_general")
    assert [v.aval.shape for v in product.invars] == [(2, 7, 3), (2, 7, 5)]
    assert "transpose" not in {str(e.primitive) for e in equations(jaxpr)}


@pytest.mark.parametrize("given", ["default", "high", "highest", lax.Precision.HIGHEST])
def test_a_precision_is_handed_on(given):
    run = jax.jit(functools.partial(up_projection, precision=given))
    name = lax.Precision(given).name
    assert f"precision = [{name}, {name}]" in run.lower(*draw((7, 3), (3, 5))).as_text()


def test_the_default_precision_is_that_of_where_it_is_traced():
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(up_projection)(*draw((7, 3), (3, 5)))
    (equation,) = jaxpr.eqns
    assert equation.params["precision"] == "highest"


def test_dtypes_promote_as_in_a_product():
    x, b = draw((7, 3), (3, 5))
    assert up_projection(x.astype(jnp.bfloat16), b).dtype == jnp.float32
    assert up_projection(x.astype(jnp.bfloat16), b.astype(jnp.bfloat16)).dtype == jnp.bfloat16


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
