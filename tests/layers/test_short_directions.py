"""Layers whose adapter shrinks the columns of `W0 + s A B`: as exact as any other.

The output and the gradients from the factors lose `eps / delta` there, the norm `eps / delta^2`.
"""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import pytest

from tests.support.blocks import in_blocks
from tests.support.layers.errors import Errors, errors, shrunk
from tests.support.layers.table import SINGLE, VARIANTS

BOUNDS = Errors(forward=1e-5, exact_gradient=1e-5, detached_gradient=1e-5, merge=1e-6)
WHOLE, BLOCKS = contextlib.nullcontext, in_blocks
DEFAULT = [
    ("Dense / Linear (nnx)", 1e-4, ("plain", "vmap"), WHOLE),
    ("Dense / Linear (linen)", 1e-4, ("plain", "vmap"), BLOCKS),
    ("Embed, lookup and attend tied (linen)", 1e-3, ("plain",), WHOLE),
]


def assert_exact(row, delta, every, transforms):
    row, data = shrunk(row, jnp.float32, delta, every)
    for transform, found in errors(row, jnp.float32, transforms, transforms, data).items():
        for name, value in found._asdict().items():
            assert value <= getattr(BOUNDS, name), (transform, name)


@pytest.mark.parametrize(("name", "delta", "transforms", "ways"), DEFAULT)
def test_a_layer_with_short_columns_is_exact(name, delta, transforms, ways):
    (row,) = (row for row in SINGLE if str(row) == name)
    with ways():
        assert_exact(row, delta, True, transforms)


EVERY = [*SINGLE, *VARIANTS]


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(EVERY)), ids=map(str, EVERY))
@pytest.mark.parametrize(("delta", "every"), [(1e-4, True), (1e-3, False)], ids=["all", "one"])
@pytest.mark.parametrize("ways", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_every_layer_with_short_columns_is_exact(number, delta, every, ways):
    if (number % 2 == 0) == (every == (ways is WHOLE)):
        pytest.skip("each row has both ways, with either delta")
    # Of the transforms each row has one: a row with all takes four times as long to compile.
    transforms = ("plain", ("remat", "vmap", "scan")[number % 3]) if every else ("plain",)
    with ways():
        assert_exact(EVERY[number], delta, every, transforms)
