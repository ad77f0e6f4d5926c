"""Results computed a cheap way, and anew in an exact way where some of them need it, which is rare.

`jax.lax.cond` alone would not do. Under `vmap` it runs both ways for every batch, and its gradient
keeps what either way may need. Here the choice is made once for a whole batch, and a linear map has
its derivatives and its transpose, each with an exact way of its own.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

Function = Callable[..., Any]

_only_cheap = False


@contextlib.contextmanager
def cheap_ways_alone() -> Iterator[None]:
    """Within it, programs are traced and lowered without their exact ways.

    For counting what a step costs as a rule: XLA's count of a conditional is that of the costlier
    way, whichever runs.
    """
    global _only_cheap
    before, _only_cheap = _only_cheap, True
    try:
        yield
    finally:
        _only_cheap = before


def choose(
    is_rare: Bool[Array, "..."],
    exact: Function,
    cheap: Function,
    *operands: Any,
    on_gpu: Function | None = None,
) -> Any:
    """Returns `exact(*operands)` if any of `is_rare` is true, else `cheap(*operands)`.

    A conditional, also under `vmap`: there the choice is one for the whole batch. It has no
    derivative: call it in functions that have rules of their own.

    Args:
      is_rare: which entries need to be computed exactly.
      exact: returns arrays like those of `cheap`. Both close over no traced array.
      cheap: what is computed as a rule.
      *operands: arrays, or trees of them.
      on_gpu: `(is_rare, *operands)`, the same in a program for a GPU, where XLA's conditional waits
        until the host has read its condition.

    Example:
      >>> choose(jnp.array([False, True]), lambda x: x, lambda x: 0 * x, jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    # With a mesh in the types, as inside `shard_map`, blocks would need a sharding too.
    if _only_cheap or has_mesh_in_type(is_rare, *jax.tree.leaves(operands)):
        return cheap(*operands)
    if not isinstance(is_rare, jax.core.Tracer):  # op by op, a conditional would be compiled
        return (exact if bool(jnp.any(is_rare)) else cheap)(*operands)

    @custom_vmap
    def run(is_rare: Array, *operands: Any) -> Any:
        if on_gpu is None or jax.default_backend() != "gpu":
            return lax.cond(jnp.any(is_rare), exact, cheap, *operands)
        given, structure = jax.tree.flatten((is_rare, *operands))
        like = jax.tree.structure(jax.eval_shape(cheap, *operands))
        ways = {"exact": exact, "cheap": cheap, "on_gpu": on_gpu}
        return jax.tree.unflatten(like, _choice.bind(*given, structure=structure, **ways))

    @run.def_vmap
    def run_batch(size: int, batched: Any, is_rare: Array, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda has_batch: 0 if has_batch else None, tuple(batched[1:]))
        each = (jax.vmap(way, axes, axis_size=size) for way in (exact, cheap))
        of_all = on_gpu and jax.vmap(on_gpu, (0 if batched[0] else None, *axes), axis_size=size)
        result = choose(is_rare, *each, *operands, on_gpu=of_all)
        return result, jax.tree.map(lambda _: True, result)

    return run(is_rare, *operands)


def _by_condition(
    *given: Array, structure: Any, exact: Function, cheap: Function, on_gpu: Function
) -> list[Array]:
    is_rare, *operands = jax.tree.unflatten(structure, given)
    return jax.tree.leaves(lax.cond(jnp.any(is_rare), exact, cheap, *operands))


def _by_kernels(*given: Array, structure: Any, on_gpu: Function, **_: Function) -> list[Array]:
    return jax.tree.leaves(on_gpu(*jax.tree.unflatten(structure, given)))


def _lower_for_cuda(ctx: Any, *given: Any, **params: Any) -> Any:
    """Kernels of our own on one GPU; among several, XLA has to divide the work."""
    one = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
    run = _by_kernels if one else _by_condition
    with warnings.catch_warnings():  # that Pallas will compile by other means than Triton
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *given, **params)


def _shapes(*given: Any, structure: Any, cheap: Function, **_: Function) -> list[Any]:
    _, *operands = jax.tree.unflatten(structure, given)
    found = jax.tree.leaves(jax.eval_shape(cheap, *operands))
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in found]


_choice = Primitive("dora_choice")
_choice.multiple_results = True
_choice.def_impl(_by_condition)
_choice.def_abstract_eval(_shapes)
mlir.register_lowering(_choice, mlir.lower_fun(_by_condition, multiple_results=True))
mlir.register_lowering(_choice, _lower_for_cuda, platform="cuda")


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
        return lambda *operands, like, **params: function(*operands, **params)

    by_kernels = [without_shape(way) for way in on_gpu]
    forward = _define(name, without_shape(cheap), without_shape(exact), by_kernels[0])
    backward = _define(
        f"{name}_transpose", cheap_transpose, without_shape(exact_transpose), by_kernels[1]
    )
    forward.transpose, backward.transpose = backward, forward

    def call(is_rare: Array, x: Array, *others: Array, **params: Any) -> Array:
        if has_mesh_in_type(is_rare, x, *others):
            return cheap(x, *others, **params)
        like = (x.shape, x.dtype)
        return forward.bind(is_rare, x, *others, levels=(), like=like, **params)

    return call


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
