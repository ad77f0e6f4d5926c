"""Results computed a cheap way, and anew in an exact way where some of them need it, which is rare.

`jax.lax.cond` alone would not do: under `vmap` it runs both ways for every batch, and on a GPU it
waits until the host has read the condition.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

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


def cheap_alone() -> bool:
    """Whether programs are traced without their exact ways now."""
    return _only_cheap


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


def _has_triton() -> bool:
    """Whether this release of JAX compiles kernels by Triton; a later one may not."""
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _lower_for_cuda(ctx: Any, *given: Any, **params: Any) -> Any:
    """Kernels of our own on one GPU; among several, XLA has to divide the work."""
    one = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
    run = _by_kernels if one and _has_triton() else _by_condition
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
