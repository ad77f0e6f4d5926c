"""A fork: one input for both terms of a sum, whose gradient is exact where the two terms cancel.

Of `h = x W0 + s (x A) B` the gradient of `x` is the sum of one cotangent for each term, which
cancels where `h` does. A fork hands `x` to both, and a zero to be added to `h`. So its transpose
sees the cotangent of `h` as well, and can compute the gradient of `x` from that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dora_jax.ops.choice import choose
from dora_jax.ops.output_scale import Exact
from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jaxtyping import Array


def fork(x: Array, shape: tuple[int, ...], exact: Exact) -> tuple[Array, Array, Array]:
    """Returns `x`, `x`, and zeros of the shape of `h`, in the dtype of `x`.

    Use the first for one term of `h`, the second for the other, and add the third. Then the
    gradient of `x` is that of the two terms, or else `exact.output(cotangent of h, *operands)`.
    """
    leaves, structure = jax.tree.flatten(exact.operands)

    def of_leaves(g: Array, *leaves: Array) -> Array:
        return exact.output(g, *jax.tree.unflatten(structure, leaves))

    if has_mesh_in_type(x, exact.is_short, *leaves):
        return x, x, jnp.zeros(shape, x.dtype)
    return _fork.bind(x, exact.is_short, *leaves, of=of_leaves, shape=shape)


def sum_of_terms(one: Array, other: Array, zeros: Array, exact: Exact) -> Array:
    """Returns `h = one + other + zeros`, or `exact.output(*operands)` where the terms cancel.

    Its derivatives are those of the sum.
    """
    return _sum_or_exact(exact.output)((one, other), (zeros,), exact.is_short, exact.operands)


def _sum_or_exact(output: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `(terms, zeros, is_short, operands) -> sum of the terms, or output(*operands)`."""

    def add(terms: Any, _: Any) -> Array:
        return terms[0] + terms[1]

    def anew(terms: Any, operands: Any) -> Array:
        return output(*operands).astype(terms[0].dtype)

    @jax.custom_jvp
    def run(terms: Any, zeros: Any, is_short: Array, operands: Any) -> Array:
        return choose(is_short, anew, add, terms, operands)

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        result = run(*primals)
        moved = [t for t in (*tangents[0], *tangents[1]) if not isinstance(t, SymbolicZero)]
        return result, sum(moved, jnp.zeros_like(result))

    run.defjvp(derivative, symbolic_zeros=True)
    return run


def _run(x: Array, *_: Array, of: Any, shape: tuple[int, ...]) -> list[Array]:
    return [x, x, jnp.zeros(shape, x.dtype)]


def _shapes(x: Any, *_: Any, of: Any, shape: tuple[int, ...]) -> list[Any]:
    return [x, x, jax.core.ShapedArray(shape, x.dtype)]


def _derivative(primals: Any, tangents: Any, **params: Any) -> Any:
    return _fork.bind(*primals, **params), _fork.bind(tangents[0], *primals[1:], **params)


def _transpose(given: Any, x: Any, *constants: Array, of: Any, shape: tuple[int, ...]) -> Any:
    nothing = [None] * len(constants)
    if all(type(g) is ad.Zero for g in given):
        return [ad.Zero(x.aval), *nothing]
    one, other, by_h = map(ad.instantiate_zeros, given)
    is_short, *operands = constants
    return [_sum_or_exact(of)((one, other), (), is_short, (by_h, *operands)), *nothing]


def _batch(operands: Any, positions: Any, *, of: Any, shape: tuple[int, ...]) -> Any:
    size = next(x.shape[i] for x, i in zip(operands, positions, strict=True) if i is not None)
    x, *constants = (
        v if i is None else jnp.moveaxis(v, i, 0) for v, i in zip(operands, positions, strict=True)
    )
    if positions[0] is None:
        x = jnp.broadcast_to(x, (size, *x.shape))
    axes = (0, *(None if i is None else 0 for i in positions[2:]))
    each = jax.vmap(of, axes, axis_size=size)
    return _fork.bind(x, *constants, of=each, shape=(size, *shape)), (0, 0, 0)


_fork = Primitive("dora_fork")
_fork.multiple_results = True
_fork.def_impl(_run)
_fork.def_abstract_eval(_shapes)
ad.primitive_jvps[_fork] = _derivative
ad.primitive_transposes[_fork] = _transpose
batching.primitive_batchers[_fork] = _batch
mlir.register_lowering(_fork, mlir.lower_fun(_run, multiple_results=True))
