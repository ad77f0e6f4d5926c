"""Linear maps computed a cheap way, and anew in an exact way where that is needed, which is rare.

`jax.lax.cond` alone would not do: its gradient keeps what either way may need. Here a linear map
has its derivatives and its transpose, each with an exact way of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dora_jax.ops.choice import choose
from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jaxtyping import Array

Function = Callable[..., Any]


class _Level(NamedTuple):
    """A `vmap` around a linear map: which of its arrays have a leading axis of the batch.

    Attributes:
      size: of the batch.
      x: whether the operand in which the map is linear has the axis.
      y: whether the result has it. If not, the map sums over the batch.
      others: whether each other operand has it.
    """

    size: int
    x: bool
    y: bool
    others: tuple[bool, ...]

    def transposed(self) -> _Level:
        return self._replace(x=self.y, y=self.x)


def define_linear_map(
    name: str,
    cheap: Function,
    exact: Function,
    exact_transpose: Function,
    on_gpu: tuple[Function, Function],
) -> Function:
    """Returns `(is_rare, x, *others, **params) -> y`, a map linear in `x`, as a JAX primitive.

    The other operands are arrays, or trees of them.

    It is computed as `cheap(x, *others)`, and as `exact` where any of `is_rare` is true; its
    transpose in `x` likewise. Its derivatives in the other operands are those of `cheap`.

    Args:
      name: of the primitive.
      cheap: a function of arrays, made of JAX operations. Its keyword arguments are hashable.
      exact: computes the same.
      exact_transpose: `(y, *others, **params) -> x`, the transpose of `exact`.
      on_gpu: for both, `(x, *others, **params)` to a function `(is_rare, result, x, *others)` for
        `choose`, where `result` is what the cheap way gave; or to None.
    """

    def cheap_transpose(y: Array, *others: Array, like: Any, **params: Any) -> Array:
        x = jax.ShapeDtypeStruct(*like)
        (result,) = jax.linear_transpose(lambda x: cheap(x, *others, **params), x)(y)
        return result

    def without_shape(function: Function) -> Function:
        return _of_leaves(lambda *operands, like, **params: function(*operands, **params))

    by_kernels = [_on_gpu_of_leaves(way) for way in on_gpu]
    forward = _define(name, without_shape(cheap), without_shape(exact), by_kernels[0])
    backward = _define(
        f"{name}_transpose",
        _of_leaves(cheap_transpose),
        without_shape(exact_transpose),
        by_kernels[1],
    )
    forward.transpose, backward.transpose = backward, forward

    def call(is_rare: Array, x: Array, *others: Any, **params: Any) -> Array:
        leaves, structure = jax.tree.flatten(others)
        if has_mesh_in_type(is_rare, x, *leaves):
            return cheap(x, *others, **params)
        own = {"structure": structure, "like": (x.shape, x.dtype), "levels": ()}
        return forward.bind(is_rare, x, *leaves, **own, **params)

    return call


def _of_leaves(function: Function) -> Function:
    """Returns a function of `x` and the leaves of the others, as a primitive's operands are."""

    def run(x: Array, *leaves: Array, structure: Any, **params: Any) -> Any:
        return function(x, *jax.tree.unflatten(structure, leaves), **params)

    return run


def _on_gpu_of_leaves(way: Function) -> Function:
    """Returns the same of an entry of `on_gpu`."""

    def run(x: Array, *leaves: Array, structure: Any, like: Any, **params: Any) -> Any:
        found = way(x, *jax.tree.unflatten(structure, leaves), **params)
        if found is None:
            return None

        def anew(is_rare: Array, result: Array, x: Array, *leaves: Array) -> Array:
            return cast("Array", found(is_rare, result, x, *jax.tree.unflatten(structure, leaves)))

        return anew

    return run


class _LinearMap:
    """One of a pair of primitives that are each other's transpose."""

    bind: Function
    transpose: _LinearMap


def _define(name: str, cheap: Function, exact: Function, on_gpu: Function) -> _LinearMap:
    this = _LinearMap()

    def run(is_rare: Array, x: Array, *others: Array, levels: Any, **params: Any) -> Array:
        # The cheap way stands outside of the conditional, where XLA fuses and lays out its products
        # as in a program without one. Inside, a step of a 4-layer MLP on a CPU took 1.2 as long.
        result = _batched(functools.partial(cheap, **params), levels)(x, *others)
        anew = _batched(functools.partial(exact, **params), levels)
        return choose(
            is_rare,
            lambda _, *given: anew(*given),
            lambda result, *_: result,
            result,
            x,
            *others,
            on_gpu=None if levels else on_gpu(x, *others, **params),
        )

    def derivative(primals: Any, tangents: Any, *, levels: Any, **params: Any) -> Any:
        is_rare, x, *others = primals
        x_dot, *dots = tangents[1:]
        found = (
            [] if _is_zero(x_dot) else [this.bind(is_rare, x_dot, *others, levels=levels, **params)]
        )
        moved = [i for i, dot in enumerate(dots) if not _is_zero(dot)]
        if moved:
            run = _derivative_in(moved, functools.partial(cheap, **params), len(others))
            every = [
                level._replace(others=(*level.others, *(level.others[i] for i in moved)))
                for level in levels
            ]
            found.append(_batched(run, every)(x, *others, *(dots[i] for i in moved)))
        return this.bind(*primals, levels=levels, **params), sum(found[1:], found[0])

    def transpose(g: Any, is_rare: Array, x: Any, *others: Array, **params: Any) -> Any:
        if type(g) is ad.Zero:
            return [None] * (2 + len(others))
        params["levels"] = tuple(level.transposed() for level in params["levels"])
        return [None, this.transpose.bind(is_rare, g, *others, **params), *[None] * len(others)]

    def batch(operands: Any, positions: Any, *, levels: Any, **params: Any) -> tuple[Array, int]:
        placed = list(zip(operands, positions, strict=True))
        size = next(x.shape[i] for x, i in placed if i is not None)
        operands = [x if i is None else jnp.moveaxis(x, i, 0) for x, i in placed]
        _, x, *others = (i is not None for i in positions)
        levels = (*levels, _Level(size, x, True, tuple(others)))
        return this.bind(*operands, levels=levels, **params), 0

    def shape(_: Any, *operands: Any, levels: Any, **params: Any) -> Any:
        result = jax.eval_shape(_batched(functools.partial(cheap, **params), levels), *operands)
        return jax.core.ShapedArray(result.shape, result.dtype)

    primitive = Primitive(name)
    primitive.def_impl(run)
    primitive.def_abstract_eval(shape)
    ad.primitive_jvps[primitive], ad.primitive_transposes[primitive] = derivative, transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    this.bind = primitive.bind
    return this


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _derivative_in(moved: Sequence[int], function: Function, number: int) -> Function:
    """Returns `(x, *others, *dots) -> y'`, the derivative in some of the other operands."""

    def run(x: Array, *given: Array) -> Array:
        others, dots = given[:number], given[number:]

        def of_moved(*values: Array) -> Array:
            all_others = list(others)
            for i, value in zip(moved, values, strict=True):
                all_others[i] = value
            return function(x, *all_others)

        return jax.jvp(of_moved, tuple(others[i] for i in moved), dots)[1]

    return run


def _batched(function: Function, levels: Sequence[_Level]) -> Function:
    """Returns a function under `vmap` once for each level, the first one innermost."""
    for level in levels:
        axes = [0 if has_batch else None for has_batch in (level.x, *level.others)]
        function = jax.vmap(function, axes, axis_size=level.size)
        if not level.y:
            function = _summed(function)
    return function


def _summed(function: Function) -> Function:
    return lambda *operands: jnp.sum(function(*operands), 0)
