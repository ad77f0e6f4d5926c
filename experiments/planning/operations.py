"""Floating point operations of the products of a program, from its jaxpr.

XLA's cost analysis counts the body of a loop once, and nothing of a kernel written by hand. Other
operations than products are left out: on a TPU they run beside them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax


def product_operations(jaxpr: Any, *, visited: float = 1.0) -> float:
    """Returns the operations of all devices together.

    Args:
        jaxpr: A `jax.core.Jaxpr` or `ClosedJaxpr`.
        visited: The share of its blocks that a kernel written by hand does not skip.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loop = lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ x, x)
        >>> product_operations(jax.make_jaxpr(loop)(jnp.ones((4, 4))))  # 3 of 2 * 4 * 4 * 4
        384.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
            continue
        inner = [product_operations(one, visited=visited) for one in _jaxprs(equation)]
        if not any(inner):
            continue
        times = 1.0
        if name == "scan":
            times = params["length"]
        elif name == "shard_map":
            sizes = params["mesh"].shape
            older = params.get("manual_axes", ())
            times = math.prod(sizes[axis] for axis in params.get("newly_manual_axes", older))
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid) * visited
        total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _jaxprs(equation: Any) -> Iterator[Any]:
    if equation.primitive.name.startswith("dora_joined_product"):  # has no program of its own
        run = functools.partial(equation.primitive.impl, **equation.params)
        yield jax.make_jaxpr(run)(*(x.aval for x in equation.invars))
        return
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    sizes = (*equation.outvars[0].aval.shape, *(left[axis] for axis in contracted))
    return 2.0 * math.prod(sizes)
