"""The kernels for a GPU, interpreted on other platforms, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dora_jax.ops.short_columns import Direction, columns_anew, transpose_anew

SCALING = 0.5
SIZES = {"in": 100, "out": 150, "r": 5, "k": 3}
ON_GPU = jax.default_backend() == "gpu"


def arrays(*axes, seed=0):
    shape = tuple(SIZES[axis] for axis in axes)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kernel_and_factors(dtype=jnp.float32):
    a, b = arrays("in", "r", seed=1), arrays("r", "out", seed=2)
    w = np.asarray(jnp.asarray(-SCALING * a @ b, dtype))  # V is what the rounding leaves
    return (
        w,
        Direction(w, a, b, SCALING, dtype),
        w.astype(np.float64) + SCALING * a.astype(np.float64) @ b,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_blocks_with_a_short_column_are_computed_anew_from_the_direction(dtype):
    w, direction, v = kernel_and_factors(dtype)
    x = arrays("in", "k", seed=3)
    is_short = np.zeros(SIZES["out"], bool)
    is_short[70] = True
    run = jax.jit(lambda *given: columns_anew(*given, interpret=not ON_GPU))
    square, rows = run(
        -np.ones(SIZES["out"], np.float32), -np.ones((3, 150), np.float32), is_short, direction, x
    )
    anew = np.arange(SIZES["out"]) // 64 == 1
    largest = np.abs(w.astype(np.float64)).max()  # what float32 rounds V by
    bound = 1e-6 * largest
    assert np.all(np.asarray(square)[~anew] == -1) and np.all(np.asarray(rows)[:, ~anew] == -1)
    exact = np.sum(v**2, 0)[anew]
    np.testing.assert_allclose(
        np.sqrt(np.asarray(square)[anew]), np.sqrt(exact), atol=bound * np.sqrt(SIZES["in"])
    )
    np.testing.assert_allclose(rows[:, anew], (x.T @ v)[:, anew], atol=bound * SIZES["in"])


@pytest.mark.parametrize("short", [False, True])
def test_the_transpose_is_computed_anew_if_any_column_is_short(short):
    w, direction, v = kernel_and_factors()
    rows = arrays("k", "out", seed=3)
    is_short = np.zeros(SIZES["out"], bool)
    is_short[-1] = short
    run = jax.jit(lambda *given: transpose_anew(*given, interpret=not ON_GPU))
    total = run(-np.ones((SIZES["in"], 3), np.float32), is_short, direction, rows)
    if not short:
        assert np.all(np.asarray(total) == -1)
    else:
        bound = 1e-6 * np.abs(w).max() * SIZES["out"]
        np.testing.assert_allclose(total, v @ rows.T, atol=bound)
