"""GELU against its definition in float64, and its derivative."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.activations import gelu

X = np.linspace(-6, 6, 241)
DENSITY = np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
DISTRIBUTION = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in X])


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 5e-7), (jnp.bfloat16, 8e-3)])
def test_gelu_is_x_times_the_normal_distribution(dtype, bound):
    x = jnp.asarray(X, dtype)
    y = gelu(x)
    assert y.dtype == dtype
    exact = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in np.asarray(x, np.float64)])
    # Absolute where the result is small: the terms of `1 + erf` cancel, in torch too.
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert np.all(error <= bound * np.maximum(np.abs(exact), 1.0))


def test_its_derivative_is_that_of_the_definition():
    found = jax.vmap(jax.grad(gelu))(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(found, DISTRIBUTION + X * DENSITY, atol=5e-7)
