"""`y = h + d h`: the scale of a layer's output, with a gradient for which only `y` is kept.

With `g` the cotangent of `y`, those of `h` and `d` are `(1 + d) g` and the sum of `g h` over the
batch, where `h = y / (1 + d)`. The fastest order of that sum depends on the platform. XLA for TPU
computes both cotangents in one pass over `g` and `y`. XLA for CPU makes one pass for each. Since
the layer's own products need `(1 + d) g` anyway, the sum there reads `(1 + d) g` and not `g`. Both
uses must see `(1 + d) g` in the same shape, that of a matrix, or XLA computes it twice. A primitive
can be lowered in its own way on each platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from dora_jax.ops.primitives import define_primitive

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


def scaled(h: Float[Array, "..."], d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `(1 + d) h`, computed as `h + d h` except near a scale of 0, where that cancels."""
    return jnp.where(d < -0.5, (1 + d) * h, h + d * h)


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or the dtype itself if it is wider."""
    narrow = jnp.dtype(dtype).itemsize < 4  # float8 has no promotion of its own
    return jnp.dtype(jnp.float32) if narrow else jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def apply_scale(
    h: Float[Array, "*batch out"], d: Float[Array, "#*batch out"], name: str = "dora_scaled"
) -> Float[Array, "*batch out"]:
    """Returns `y = h + d h` in the dtype of `h`, multiplied in float32 or wider.

    In bfloat16 a scale near 1 would be rounded to 1.

    The gradient of `d` needs `h`, which it computes as `y / (1 + d)`. The next layer keeps `y` for
    its own backward pass, so that `h` need not be kept as well. The computed `h` differs by the
    rounding of `y` to its dtype; in float16 by more, for scales near its smallest number, 6e-8.
    A scale of exactly 0 gets a gradient of 0. `scale_minus_one` returns such a scale only for
    columns of the kernel that are zero.

    Args:
      h: the output before the scale.
      d: the scale minus 1, in float32 or wider.
      name: under which `jax.checkpoint` may save `y`.

    Example:
      >>> apply_scale(jnp.ones(2, jnp.bfloat16), jnp.array([0.0, 0.5]))
      Array([1, 1.5], dtype=bfloat16)
    """
    wide = h.astype(wide_dtype(h.dtype))
    return scaled(wide, d.astype(wide.dtype)).astype(h.dtype)


@apply_scale.defjvp
def _apply_scale_jvp(
    name: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # A checkpoint policy sees the name here, but not inside `apply_scale`, a `custom_jvp`.
    y = checkpoint_name(apply_scale.fun(*primals, name), name)
    h_dot, d_dot = tangents
    d, d_dot = (v.reshape((1,) * (y.ndim - v.ndim) + v.shape) for v in (primals[1], d_dot))
    return y, _scale_tangent(h_dot, d_dot, y, d)


def _tangent(h_dot: Array, d_dot: Array, y: Array, d: Array) -> Array:
    """Returns `(1 + d) h' + d' h`, where `h = y / (1 + d)`."""
    wide = wide_dtype(y.dtype)
    scale = 1 + d.astype(wide)
    # Broadcast here: the transpose then sums over every axis of the batch, also one of length 1.
    relative = jnp.broadcast_to(divide_or_zero(d_dot.astype(wide), scale), y.shape)
    return (scale * h_dot.astype(wide) + relative * y.astype(wide)).astype(y.dtype)


def _cotangents(g: Array, y: Array, d: Array) -> tuple[Array, Array]:
    """Returns the cotangents of `h` and `d`: the transpose of `_tangent`."""
    # XLA drops a cast to bfloat16 and back. Without the barrier it keeps the float32 array that `y`
    # was rounded from: in a LLaMA-7B block on TPU v5e 33 MB for each of q and k, instead of 17.
    y = jax.lax.optimization_barrier(y)
    wide = wide_dtype(y.dtype)
    scale, g = 1 + d.astype(wide), g.astype(wide)
    batch = tuple(axis for axis, size in enumerate(d.shape) if size == 1)
    by_d = divide_or_zero(jnp.sum(g * y.astype(wide), batch, keepdims=True), scale)
    return (scale * g).astype(y.dtype), by_d.astype(d.dtype)


def _cotangents_on_cpu(g: Array, y: Array, d: Array) -> tuple[Array, Array]:
    """Returns the same, from `(1 + d) g` as a matrix with one row for each entry of the batch."""
    features = _trailing_features(y.shape, d.shape)
    if features is None:
        return _cotangents(g, y, d)
    wide = wide_dtype(y.dtype)
    rows, y_rows = (v.reshape(-1, features).astype(wide) for v in (g, y))
    scale = 1 + d.reshape(features).astype(wide)
    by_h = scale * rows
    # Divided twice: once for `h = y / (1 + d)`, once for the factor that `by_h` has already.
    by_d = divide_or_zero(divide_or_zero(jnp.sum(by_h * y_rows, 0), scale), scale)
    return by_h.astype(y.dtype).reshape(y.shape), by_d.astype(d.dtype).reshape(d.shape)


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


def _transpose_tangent(g: Any, h_dot: Any, d_dot: Any, y: Array, d: Array) -> list[Any]:
    if type(g) is ad.Zero:
        by_h, by_d = ad.Zero(h_dot.aval), ad.Zero(d_dot.aval)
    else:
        by_h, by_d = _scale_cotangents(g, y, d)
    is_linear = [ad.is_undefined_primal(v) for v in (h_dot, d_dot)]
    return [by_h if is_linear[0] else None, by_d if is_linear[1] else None, None, None]


_scale_tangent = define_primitive("dora_scale_tangent", _tangent, transpose=_transpose_tangent)

_scale_cotangents = define_primitive(
    "dora_scale_cotangents", _cotangents, multiple_results=True, on_cpu=_cotangents_on_cpu
)
