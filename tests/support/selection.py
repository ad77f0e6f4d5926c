"""Which rows of a table of tests the default set has; `make test-full` has all.

`table` names them one by one. `@pytest.mark.rows(n)` leaves the choice to `spread`: at most n rows,
in which as many values of every parameter occur as n rows can hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def spread(rows: Sequence[Mapping[str, int]], count: int) -> list[int]:
    """Returns which rows of a table to keep, so that few rows hold many values.

    Each choice is the first row that has the most values not seen in those chosen before.

    Args:
      rows: for each row, the position of its value among those of each parameter.
      count: how many to choose.

    Example:
      >>> spread([{"x": 0, "y": 0}, {"x": 0, "y": 1}, {"x": 1, "y": 0}, {"x": 1, "y": 1}], 2)
      [0, 3]
    """
    chosen: list[int] = []
    seen: set[tuple[str, int]] = set()
    left = list(range(len(rows)))
    while left and len(chosen) < count:
        best = max(left, key=lambda i: len(set(rows[i].items()) - seen))
        left.remove(best)
        chosen.append(best)
        seen |= rows[best].items()
    return sorted(chosen)


def mark_rows_left_out(items: Iterable[pytest.Item]) -> None:
    """Marks as `full` the rows of a table beyond those that its mark `rows` asks for."""
    tables: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("rows") and not item.get_closest_marker("full"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for rows in tables.values():
        (count,) = rows[0].get_closest_marker("rows").args
        kept = spread([row.callspec.indices for row in rows], count)
        for i in set(range(len(rows))) - set(kept):
            rows[i].add_marker(pytest.mark.full)
