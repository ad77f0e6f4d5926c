"""`y = c h`: the scale of a layer's output, with a gradient for which only `y` is kept.

With `g` the cotangent of `y`, those of `h` and `c` are `c g` and the sum of `g h` over the batch,
where `h = y / c`. The fastest order of that sum depends on the platform. XLA for TPU computes both
cotangents in one pass over `g` and `y`. XLA for CPU makes one pass for each. Since the layer's own
products need `c g` anyway, the sum there reads `c g` and not `g`. Both uses must see `c g` in the
same shape, that of a matrix, or XLA computes it twice. A primitive can be lowered in its own way on
each platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from dora_jax.ops.choice import choose
from dora_jax.ops.primitives import define_primitive

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or the dtype itself if it is wider."""
    narrow = jnp.dtype(dtype).itemsize < 4  # float8 has no promotion of its own
    return jnp.dtype(jnp.float32) if narrow else jnp.promote_types(dtype, jnp.float32)


def _product(h: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    return scale * h


def _product_on_cpu(h: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `c h`, written as `h + (c - 1) h` where that is as exact.

    XLA for CPU repeats a plain product in each of its uses, and there reads what `h` is the sum of:
    a step of a 4-layer MLP took 1.2 times as long.
    """
    return jnp.where(scale < 0.5, scale * h, h + (scale - 1) * h)


scaled = define_primitive("dora_scaled", _product, on_cpu=_product_on_cpu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def apply_scale(
    h: Float[Array, "*batch out"], scale: Float[Array, "#*batch out"], name: str = "dora_scaled"
) -> Float[Array, "*batch out"]:
    """Returns `y = c h` in the dtype of `h`, multiplied in float32 or wider.

    In bfloat16 a scale near 1 would be rounded to 1.

    The gradient of the scale needs `h`, which it computes as `y / c`. The next layer keeps `y` for
    its own backward pass, so that `h` need not be kept as well. The computed `h` differs by the
    rounding of `y` to its dtype; in float16 by more, for scales near its smallest number, 6e-8.
    A scale of exactly 0 gets a gradient of 0. `magnitude_over_norm` returns such a scale only for
    columns of the kernel that are zero.

    Args:
      h: the output before the scale.
      scale: `c`, in float32 or wider.
      name: under which `jax.checkpoint` may save `y`.

    Example:
      >>> apply_scale(jnp.ones(2, jnp.bfloat16), jnp.array([1.0, 1.5]))
      Array([1, 1.5], dtype=bfloat16)
    """
    wide = wide_dtype(h.dtype)
    return scaled(h.astype(wide), scale.astype(wide)).astype(h.dtype)


class Exact(NamedTuple):
    """How a result is computed where the sum that it is made of cancels.

    Attributes:
      is_short: where it cancels, as booleans of any shape.
      output: `(*operands) -> result`. It closes over no traced array.
      operands: arrays, or trees of them, constants in every derivative.
    """

    is_short: Bool[Array, "..."]
    output: Callable[..., Array]
    operands: tuple[Any, ...]


def apply_scale_to_sum(
    plain: Float[Array, "*batch out"],
    added: Float[Array, "*batch out"],
    scale: Float[Array, "#*batch out"],
    exact: Exact,
    name: str = "dora_scaled",
) -> Float[Array, "*batch out"]:
    """Returns `apply_scale(plain + added, scale, name)`, of another `h` where the sum cancels.

    The derivatives are those of the sum, at the exact `y`.
    """

    @jax.custom_jvp
    def run(plain: Array, added: Array, scale: Array, is_short: Array, *operands: Array) -> Array:
        def sum_of_both(plain: Array, added: Array, scale: Array, *_: Array) -> Array:
            return apply_scale.fun(plain + added, scale, name)

        def anew(plain: Array, added: Array, scale: Array, *operands: Array) -> Array:
            return apply_scale.fun(exact.output(*operands), scale, name)

        return choose(is_short, anew, sum_of_both, plain, added, scale, *operands)

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        y = checkpoint_name(run(*primals), name)
        plain_dot, added_dot, scale_dot = (
            jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t
            for x, t in zip(primals[:3], tangents[:3], strict=True)
        )
        return y, _scaled_tangent(plain_dot + added_dot, scale_dot, y, primals[2])

    run.defjvp(derivative, symbolic_zeros=True)
    return run(plain, added, scale, exact.is_short, *exact.operands)


@apply_scale.defjvp
def _apply_scale_jvp(
    name: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # A checkpoint policy sees the name here, but not inside `apply_scale`, a `custom_jvp`.
    y = checkpoint_name(apply_scale.fun(*primals, name), name)
    return y, _scaled_tangent(*tangents, y, primals[1])


def _scaled_tangent(h_dot: Array, scale_dot: Array, y: Array, scale: Array) -> Array:
    scale, scale_dot = (v.reshape((1,) * (y.ndim - v.ndim) + v.shape) for v in (scale, scale_dot))
    return _scale_tangent(h_dot, scale_dot, y, scale)


def _tangent(h_dot: Array, scale_dot: Array, y: Array, scale: Array) -> Array:
    """Returns `c h' + c' h`, where `h = y / c`."""
    wide = wide_dtype(y.dtype)
    scale = scale.astype(wide)
    # Broadcast here: the transpose then sums over every axis of the batch, also one of length 1.
    relative = jnp.broadcast_to(divide_or_zero(scale_dot.astype(wide), scale), y.shape)
    return (scale * h_dot.astype(wide) + relative * y.astype(wide)).astype(y.dtype)


def _cotangents(g: Array, y: Array, scale: Array) -> tuple[Array, Array]:
    """Returns the cotangents of `h` and `c`: the transpose of `_tangent`."""
    # XLA drops a cast to bfloat16 and back. Without the barrier it keeps the float32 array that `y`
    # was rounded from: in a LLaMA-7B block on TPU v5e 33 MB for each of q and k, instead of 17.
    y = jax.lax.optimization_barrier(y)
    wide = wide_dtype(y.dtype)
    factor, g = scale.astype(wide), g.astype(wide)
    batch = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    by_scale = divide_or_zero(jnp.sum(g * y.astype(wide), batch, keepdims=True), factor)
    return (factor * g).astype(y.dtype), by_scale.astype(scale.dtype)


def _cotangents_on_cpu(g: Array, y: Array, scale: Array) -> tuple[Array, Array]:
    """Returns the same, from `c g` as a matrix with one row for each entry of the batch."""
    features = _trailing_features(y.shape, scale.shape)
    if features is None:
        return _cotangents(g, y, scale)
    wide = wide_dtype(y.dtype)
    rows, y_rows = (v.reshape(-1, features).astype(wide) for v in (g, y))
    factor = scale.reshape(features).astype(wide)
    by_h = factor * rows
    # Divided twice: once for `h = y / c`, once for the factor that `by_h` has already.
    safe = jnp.where(factor == 0, 1, factor)
    by_scale = jnp.where(factor == 0, 0, jnp.sum(by_h * y_rows, 0) / safe / safe)
    by_scale = by_scale.astype(scale.dtype).reshape(scale.shape)
    return by_h.astype(y.dtype).reshape(y.shape), by_scale


def _trailing_features(shape: Sequence[int], scale_shape: Sequence[int]) -> int | None:
    """Returns the number of scales if they lie along the last axes of an output, else None.

    Example:
      >>> _trailing_features((32, 7, 4), (1, 1, 4)), _trailing_features((2, 7, 4), (2, 1, 4))
      (4, None)
    """
    batch = next((i for i, size in enumerate(scale_shape) if size != 1), len(shape))
    features = math.prod(shape[batch:])
    return features if features and tuple(scale_shape[batch:]) == tuple(shape[batch:]) else None


def divide_or_zero(x: Array, scale: Array) -> Array:
    """Returns `x / scale`, 0 where the scale is 0."""
    return jnp.where(scale == 0, 0, x / jnp.where(scale == 0, 1, scale))


def _transpose_tangent(g: Any, h_dot: Any, scale_dot: Any, y: Array, scale: Array) -> list[Any]:
    if type(g) is ad.Zero:
        by_h, by_scale = ad.Zero(h_dot.aval), ad.Zero(scale_dot.aval)
    else:
        by_h, by_scale = _scale_cotangents(g, y, scale)
    is_linear = [ad.is_undefined_primal(v) for v in (h_dot, scale_dot)]
    return [by_h if is_linear[0] else None, by_scale if is_linear[1] else None, None, None]


_scale_tangent = define_primitive("dora_scale_tangent", _tangent, transpose=_transpose_tangent)

_scale_cotangents = define_primitive(
    "dora_scale_cotangents", _cotangents, multiple_results=True, on_cpu=_cotangents_on_cpu
)
