"""Which cells of a table of tests the default set has; `make test-full` has all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def table(*axes: Iterable[Any], default: Callable[..., bool]) -> list[Any]:
    """Returns the parameters of a table's cells; those that are not of the default set are `full`.

    Example:
      >>> [len(p.marks) for p in table("ab", [1, 2], default=lambda name, n: n == 1)]
      [0, 1, 0, 1]
    """
    return [
        pytest.param(*cell, marks=() if default(*cell) else pytest.mark.full)
        for cell in itertools.product(*axes)
    ]
