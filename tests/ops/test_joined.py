"""`x W` and `A^T W` in one product: the same numbers and gradients as of two."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.decomposition import KernelAxes, dense, quantize_kernel
from dora_jax.ops.joined import Dense, _Given, joined_product, multiply
from tests.support.layers.laws import close
from tests.support.quick import quick_jit

TOKENS, IN, OUT, RANK = (2, 5), 24, 7, 3


def operands():
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = quantize_kernel(
        jax.random.normal(keys[0], (IN, OUT)), "nf4", KernelAxes((), (0,), (1,))
    )
    leaves, structure = jax.tree.flatten(kernel)
    how = Dense(structure, dense, jnp.dtype("float32"), jnp.dtype("float32"), "highest")
    x, a = (jax.random.normal(k, s) for k, s in zip(keys[1:], [(*TOKENS, IN), (IN, RANK)]))  # noqa: B905
    g, rho = (jax.random.normal(k, s) for k, s in zip(keys[3:], [(*TOKENS, OUT), (RANK, OUT)]))  # noqa: B905
    return how, leaves, np.asarray(dense(kernel), np.float64), (x, a), (g, rho)


@pytest.mark.parametrize("join", [False, True])
def test_both_ways_give_numpys_products(join):
    how, leaves, w, (x, a), (g, rho) = operands()
    run = functools.partial(multiply, dense=how, given=_Given(True, True), join=join)
    forward, backward = quick_jit(
        lambda: (run(x, a, *leaves, transpose=False), run(g, rho, *leaves, transpose=True))
    )()
    assert close(forward, [x @ w, a.T @ w], 1e-6)
    assert close(backward, [g @ w.T, w @ np.asarray(rho).T], 1e-6)


def test_derivatives_are_those_of_two_products_also_where_one_is_not_needed():
    how, leaves, _, (x, a), _ = operands()
    w = how.kernel(leaves)

    def loss(product, x, a):
        y, rows = product(x, a)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(rows))

    def ours(x, a):
        return joined_product(x, a, leaves, how)

    def plain(x, a):
        multiply = functools.partial(jnp.matmul, precision="highest")
        return multiply(x, w), multiply(a.T, w)

    @quick_jit
    def everything(x, a):
        return [
            [
                jax.value_and_grad(functools.partial(loss, way), (0, 1))(x, a),
                jax.grad(lambda x, way=way: loss(way, x, a))(x),
                jax.grad(lambda a, way=way: loss(way, x, a))(a),
                jax.grad(lambda x, way=way: jnp.sum(way(x, a)[0]))(x),
                jax.vmap(jax.grad(functools.partial(loss, way), 1))(x, jnp.stack([a, 2 * a])),
                jax.jvp(way, (x, a), (x, a))[1],
            ]
            for way in (ours, plain)
        ]

    assert close(*everything(x, a), 1e-6)


def test_in_a_program_for_one_tpu_the_kernel_has_one_product_a_pass():
    how, leaves, _, (x, a), _ = operands()

    def loss(x, a):
        y, rows = joined_product(x, a, leaves, how)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(rows))

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, a)
    rows = 10 + RANK
    for platform, count in (("tpu", {(rows, OUT): 1, (rows, IN): 1}), ("cpu", {})):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"dot_general.*-> tensor<(\d+)x(\d+)xf32>", text)
        shapes = [(int(m), int(n)) for m, n in found]
        assert {shape: shapes.count(shape) for shape in shapes if shape[0] == rows} == count


def test_short_columns_are_as_exact_as_of_the_dequantised_kernel():
    """The direction is 1e-4 of the kernel in some columns: what is summed from factors cancels."""
    plain = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    quantized = dora.quantize(plain, "nf4")
    whole = nnx.clone(plain)
    whole.kernel.set_value(quantized.kernel[...])
    x, config = operands()[3][0], dora.DoRAConfig(rank=IN, alpha=IN)
    found = []
    for base in (quantized, whole):
        with pytest.warns(UserWarning, match="rank is above"):
            model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
        share = jnp.where(jnp.arange(OUT) < 3, -0.9999, 0.1)
        model.lora_a.set_value(jnp.eye(IN))
        model.lora_b.set_value(share * base.kernel[...])
        graph, adapters, rest = nnx.split(model, dora.DoRAParam, ...)

        def loss(adapters, rest, x, graph=graph):
            return jnp.mean(jnp.sin(nnx.merge(graph, adapters, rest)(x)))

        found.append(quick_jit(jax.value_and_grad(loss, (0, 2)))(adapters, rest, x))
    (one, (adapters, by_x)), (other, (expected, expected_by_x)) = found
    assert close(*map(jax.tree.leaves, ((one, adapters), (other, expected))), 2e-6)
    # The gradient of the input is the sum of two that are 1e4 times as large.
    assert close([by_x], [expected_by_x], 2e-3)
