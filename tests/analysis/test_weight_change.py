"""The change of a kernel against its definition in float64 NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import dora_jax as dora

KernelAxes = dora.decomposition.KernelAxes


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7, 5), KernelAxes((), (0,), (1,))),
        ((5, 7), KernelAxes((), (1,), (0,))),
        ((3, 4, 2, 5), KernelAxes((0,), (1,), (2, 3))),
        ((3, 3, 4, 2), KernelAxes((), (0, 1, 2), (3,))),
    ],
)
def test_the_change_is_that_of_the_papers_equations(shape, axes):
    rng = np.random.default_rng(0)
    before = rng.normal(size=shape).astype(np.float32)
    after = (before + 0.5 * rng.normal(size=shape)).astype(np.float32)
    one, other = (
        np.transpose(w.astype(np.float64), axes.stack + axes.outputs + axes.inputs)
        for w in (before, after)
    )
    stack = tuple(shape[i] for i in axes.stack)
    inputs = np.prod([shape[i] for i in axes.inputs])
    one, other = (w.reshape(*stack, -1, inputs) for w in (one, other))
    norm, new_norm = (np.linalg.norm(w, axis=-1) for w in (one, other))
    cosine = np.sum(one * other, -1) / (norm * new_norm)
    found = dora.weight_change(jnp.asarray(before), jnp.asarray(after), axes)
    for value, expected in zip(
        found,
        (abs(new_norm - norm), abs(new_norm - norm) / norm, 1 - cosine),
        strict=True,
    ):
        assert value.shape == stack and value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected.mean(-1), rtol=2e-6)


def test_small_angles_do_not_cancel():
    """In float32, `1 - cos` of an angle of 1e-4 is 0 or 6e-8; half its square is 5e-9."""
    before = jnp.array([[1.0], [0.0]])
    after = jnp.array([[1.0], [1e-4]])
    change = dora.weight_change(before, after, KernelAxes((), (0,), (1,)))
    np.testing.assert_allclose(change.direction, 5e-9, rtol=1e-3)


def test_columns_of_zeros_are_left_out():
    before = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    after = jnp.array([[6.0, 5.0, 0.0], [8.0, 1.0, 0.0]])
    change = dora.weight_change(before, after, KernelAxes((), (0,), (1,)))
    np.testing.assert_allclose(change, (5.0, 1.0, 0.0), atol=1e-7)
