"""Ranks of a kernel's change against their definitions in float64 NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import dora_jax as dora
from dora_jax.analysis import change_rank

KernelAxes = dora.decomposition.KernelAxes


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7, 5), KernelAxes((), (0,), (1,))),
        ((3, 4, 2, 5), KernelAxes((0,), (1,), (2, 3))),
    ],
)
def test_the_ranks_are_those_of_their_definitions(shape, axes):
    rng = np.random.default_rng(0)
    before = rng.normal(size=shape).astype(np.float32)
    after = (before + 0.5 * rng.normal(size=shape)).astype(np.float32)
    after[..., 0] = before[..., 0]  # not of full rank
    if axes.stack:
        after[1] = before[1]  # one kernel of the stack did not change
    found = change_rank(jnp.asarray(before), jnp.asarray(after), axes)
    inputs = int(np.prod([shape[i] for i in axes.inputs]))
    order = axes.stack + axes.outputs + axes.inputs
    old, new = (
        w.astype(np.float64).transpose(order).reshape(-1, w.size // inputs, inputs)
        if not axes.stack
        else w.astype(np.float64).transpose(order).reshape(shape[0], -1, inputs)
        for w in (before, after)
    )
    expected = []
    for w, changed in zip(old, new, strict=True):
        sigma = np.linalg.svd(changed - w, compute_uv=False)
        p = sigma[sigma > 1e-12] / sigma.sum() if sigma.any() else np.zeros(0)
        effective = np.exp(-np.sum(p * np.log(p))) if len(p) else 0.0
        stable = np.sum(sigma**2) / sigma[0] ** 2 if sigma.any() else 0.0
        expected.append((effective, stable, np.linalg.norm(sigma) / np.linalg.norm(w)))
    for value, column in zip(found, np.transpose(expected), strict=True):
        assert value.shape == tuple(shape[i] for i in axes.stack) and value.dtype == jnp.float32
        np.testing.assert_allclose(np.ravel(value), column, rtol=2e-5)


def test_a_change_by_orthogonal_columns_has_as_many_directions():
    """Ranks do not depend on the size of the change, however small, nor on rotations."""
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.normal(size=(12, 3)))
    v, _ = np.linalg.qr(rng.normal(size=(9, 3)))
    for size in (1e-30, 1.0):
        change = jnp.asarray(size * u @ v.T, jnp.float32)
        rank = change_rank(jnp.zeros_like(change), change, KernelAxes((), (0,), (1,)))
        np.testing.assert_allclose([rank.effective, rank.stable], 3, rtol=1e-4)
