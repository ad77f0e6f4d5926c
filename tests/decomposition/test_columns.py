"""Blocks of columns: each column is in one of them, whatever their number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.decomposition import KernelAxes, KernelProduct
from dora_jax.decomposition.columns import Columns
from tests.support.blocks import in_blocks

SIZES = [1, 5, 37, 40, 150, 192, 5000]


def blocks_of(size, rank=4):
    # Above 2^20 weights: a smaller kernel is one block.
    kernel, b = jnp.ones((2**20 // size + 1, size)), jnp.ones((rank, size))
    return Columns.of(KernelProduct(KernelAxes((), (0,), (1,))), 1.0, kernel, b)


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_over_blocks_has_every_column_once_and_what_is_put_is_whole(size):
    columns, x = blocks_of(size), jnp.arange(1.0, size + 1)

    def step(block, carry):
        total, count, copy = carry
        taken = columns.take_along(x, block, 0, new=True)
        count = count + jnp.sum(columns.selection(block, (size,)), 0)
        copy = columns.put_along(copy, columns.take_along(x, block, 0), block, 0)
        return total + jnp.sum(taken), count, copy

    start = (0.0, jnp.zeros(size), jnp.zeros(size))
    total, count, copy = jax.jit(lambda: columns.each(step, start))()
    assert total == size * (size + 1) / 2
    assert np.all(np.asarray(count) == 1)
    np.testing.assert_array_equal(copy, x)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_about_as_wide_as_the_rank_but_at_least_eight(size):
    columns = blocks_of(size, rank=48)
    assert 1 <= columns.length <= max(-(-size // 8), 1)
    assert columns.length <= 48
    assert size % columns.parts == 0


def test_a_small_kernel_is_one_block():
    kernel, b = jnp.ones((3, 5000)), jnp.ones((4, 5000))
    columns = Columns.of(KernelProduct(KernelAxes((), (0,), (1,))), 1.0, kernel, b)
    x = jnp.arange(5000.0)
    (taken,) = columns.each(lambda block, _: (columns.take_along(x, block, 0, new=True),), (x,))
    np.testing.assert_array_equal(taken, x)


@pytest.mark.parametrize("size", [37, 150])
def test_a_layer_whose_blocks_overlap_is_as_exact_as_any(size):
    layer = nnx.Linear(20, size, use_bias=False, rngs=nnx.Rngs(0))
    layer = dora.apply_dora(layer, dora.DoRAConfig(rank=3, alpha=3.0), rngs=nnx.Rngs(1))
    w = np.asarray(layer.kernel[...], np.float64)
    short = [size // 2, size - 3, size - 1]
    left, lengths, right = np.linalg.svd(w[:, short], full_matrices=False)
    layer.lora_a[...] = jnp.asarray(left * lengths, jnp.float32)
    layer.lora_b[...] = jnp.zeros((3, size)).at[:, np.array(short)].set(-0.99 * right)
    a, b, m = (
        np.asarray(getattr(layer, k)[...], np.float64) for k in ("lora_a", "lora_b", "magnitude")
    )
    x = np.float32(np.random.default_rng(0).standard_normal((4, 20)))
    v = w + a @ b
    with in_blocks():
        y, vjp = jax.vjp(nnx.jit(lambda x: layer(x)), x)
        g = np.float32(np.random.default_rng(1).standard_normal(y.shape))
        (by_x,) = vjp(g)
    scaled = v * (m / np.linalg.norm(v, axis=0))
    np.testing.assert_allclose(y, x @ scaled, atol=2e-5)
    np.testing.assert_allclose(by_x, g @ scaled.T, atol=1e-3)
