"""Layers whose adapter shrinks the columns of `W0 + s A B`: as exact as any other.

The output and the gradients from the factors lose `eps / delta` there, the norm `eps / delta^2`.
"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests.support.layers.errors import Errors, errors, shrunk
from tests.support.layers.table import SINGLE, VARIANTS

BOUNDS = Errors(forward=1e-5, exact_gradient=1e-5, detached_gradient=1e-5, merge=1e-6)
DEFAULT = [
    ("Dense / Linear (nnx)", 1e-4, ("plain", "vmap")),
    ("Embed, lookup and attend tied (linen)", 1e-3, ("plain",)),
]


def assert_exact(row, delta, every, transforms):
    row, data = shrunk(row, jnp.float32, delta, every)
    for transform, found in errors(row, jnp.float32, transforms, transforms, data).items():
        for name, value in found._asdict().items():
            assert value <= getattr(BOUNDS, name), (transform, name)


@pytest.mark.parametrize(("name", "delta", "transforms"), DEFAULT)
def test_a_layer_with_short_columns_is_exact(name, delta, transforms):
    (row,) = (row for row in SINGLE if str(row) == name)
    assert_exact(row, delta, True, transforms)


@pytest.mark.full
@pytest.mark.parametrize("row", [*SINGLE, *VARIANTS], ids=str)
@pytest.mark.parametrize(
    ("delta", "every", "transforms"),
    [(1e-4, True, ("plain", "remat", "vmap", "scan")), (1e-3, False, ("plain",))],
    ids=["all", "one"],
)
def test_every_layer_with_short_columns_is_exact(row, delta, every, transforms):
    assert_exact(row, delta, every, transforms)
