"""What the tests of layers share: numbers of a row's model, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from tests.support import reference
from tests.support.layers.errors import BOUNDS, Errors, copies, draw_data, tree
from tests.support.layers.rows import Row

PLAIN = ("plain",)


def numbers(row: Row, dtype: Any, transforms: Sequence[str] = PLAIN) -> tuple[Any, Any, Any]:
    """Returns parameters, random adapters and inputs of a row's model."""
    data = draw_data(row, dtype)
    return (
        tree(data.params, transforms),
        tree(data.adapters, transforms),
        copies(data.x, transforms),
    )


def close(value: Any, expected: Any, bound: float = 5e-6) -> bool:
    """Whether the largest difference is small against the largest value, leaf by leaf."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True)
    return all(reference.relative_error(x, y) <= bound for x, y in pairs)


def assert_within(found: dict[str, Errors], dtype: str) -> None:
    """Asserts that errors under each transform are within the bounds of a dtype."""
    for transform, error in found.items():
        for name, value in error._asdict().items():
            bound = getattr(BOUNDS[dtype], name)
            assert value is None or value <= bound, (transform, name)
