"""`y = h + d h`: the scale of a layer's output, and a gradient that keeps `y` alone.

With `g` the cotangent of `y`, those of `h` and `d` are `(1 + d) g` and the sum of `g h` over the
batch, with `h = y / (1 + d)`. What is best to sum differs: XLA for TPU makes both in one pass over
`g` and `y`. XLA on a CPU makes a pass for each, and the pass over `g` is saved where the sum is
taken from `(1 + d) g`, which the layer's own products need anyway; provided that both see the same
axes, those of a matrix, or `(1 + d) g` is made twice. Hence a primitive, which is lowered by
platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from dora_jax.ops.primitives import _define, has_mesh_in_type

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


def scaled(h: Float[Array, "..."], d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `(1 + d) h` as `h + d h`, or where that would cancel, near a scale of 0, as it is."""
    return jnp.where(d < -0.5, (1 + d) * h, h + d * h)


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or the dtype itself if it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def apply_scale(
    h: Float[Array, "*batch out"], d: Float[Array, "#*batch out"], name: str = "dora_scaled"
) -> Float[Array, "*batch out"]:
    """Returns `y = h + d h` in the dtype of `h`, multiplied in float32 or wider.

    A scale near 1 that is rounded to bfloat16 first would be lost; one near 0 is multiplied as
    `(1 + d) h`, whose terms do not cancel. The gradient of `d` takes `h` from `y`, as
    `y / (1 + d)`: `y` is what the next layer keeps for its own backward pass, so `h` need not be
    kept beside it.
    Both are off by a rounding to the dtype (in float16, whose numbers end at 6e-8, by more for
    scales as small). A scale of exactly 0 gets no gradient: `scale_minus_one` returns none, but of
    columns that are zero.

    Args:
      h: the output before the scale.
      d: the scale less 1, in float32 or wider.
      name: by which `jax.checkpoint` may save `y`.

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
    # Not by `apply_scale`, inside of which a policy would not see the name.
    y = checkpoint_name(apply_scale.fun(*primals, name), name)
    h_dot, d_dot = tangents
    d, d_dot = (v.reshape((1,) * (y.ndim - v.ndim) + v.shape) for v in (primals[1], d_dot))
    # In `jax.shard_map` and under explicit sharding JAX's own products know the rules of the types.
    tangent = _tangent if has_mesh_in_type(y) or has_mesh_in_type(d) else _scale_tangent.bind
    return y, tangent(h_dot, d_dot, y, d)


def _tangent(h_dot: Array, d_dot: Array, y: Array, d: Array) -> Array:
    """Returns `(1 + d) h' + d' h`, of `h = y / (1 + d)`."""
    wide = wide_dtype(y.dtype)
    scale = 1 + d.astype(wide)
    # Not left to `*`, whose transpose sums over none of the axes that are 1 in `y` as well.
    relative = jnp.broadcast_to(divide_or_zero(d_dot.astype(wide), scale), y.shape)
    return (scale * h_dot.astype(wide) + relative * y.astype(wide)).astype(y.dtype)


def _cotangents(g: Array, y: Array, d: Array) -> tuple[Array, Array]:
    """Returns the cotangents of `h` and `d`: the transpose of `_tangent`."""
    # XLA takes a cast to bfloat16 and back for nothing, and would keep the wide number that `y` was
    # rounded from: for a LLaMA-7B block on TPU v5e, 33 MB of each of q and k in place of 17.
    y = jax.lax.optimization_barrier(y)
    wide = wide_dtype(y.dtype)
    scale, g = 1 + d.astype(wide), g.astype(wide)
    batch = tuple(axis for axis, size in enumerate(d.shape) if size == 1)
    by_d = divide_or_zero(jnp.sum(g * y.astype(wide), batch, keepdims=True), scale)
    return (scale * g).astype(y.dtype), by_d.astype(d.dtype)


def _cotangents_of_rows(g: Array, y: Array, d: Array) -> tuple[Array, Array]:
    """The same, of one matrix with a row for each entry of the batch; the sum is of `(1 + d) g`."""
    features = _trailing_features(y.shape, d.shape)
    if features is None:
        return _cotangents(g, y, d)
    wide = wide_dtype(y.dtype)
    rows, y_rows = (v.reshape(-1, features).astype(wide) for v in (g, y))
    scale = 1 + d.reshape(features).astype(wide)
    by_h = scale * rows
    by_d = divide_or_zero(divide_or_zero(jnp.sum(by_h * y_rows, 0), scale), scale)
    return by_h.astype(y.dtype).reshape(y.shape), by_d.astype(d.dtype).reshape(d.shape)


def _trailing_features(shape: Sequence[int], of_scale: Sequence[int]) -> int | None:
    """Returns the number of entries of a scale that lies along the last axes; None if it does not.

    Example:
      >>> _trailing_features((32, 7, 4), (1, 1, 4)), _trailing_features((2, 7, 4), (2, 1, 4))
      (4, None)
    """
    batch = next((i for i, size in enumerate(of_scale) if size != 1), len(shape))
    features = math.prod(shape[batch:])
    return features if features and tuple(of_scale[batch:]) == tuple(shape[batch:]) else None


def divide_or_zero(x: Array, scale: Array) -> Array:
    """Returns `x / scale`, 0 where the scale is 0."""
    return jnp.where(scale == 0, 0, x / jnp.where(scale == 0, 1, scale))


def _abstract_tangent(h_dot: Any, d_dot: Any, y: Any, d: Any) -> Any:
    return jax.core.ShapedArray(y.shape, y.dtype)


def _abstract_cotangents(g: Any, y: Any, d: Any) -> list[Any]:
    return [jax.core.ShapedArray(v.shape, v.dtype) for v in (y, d)]


def _transpose(g: Any, h_dot: Any, d_dot: Any, y: Array, d: Array) -> list[Any]:
    if type(g) is ad.Zero:
        by_h, by_d = ad.Zero(h_dot.aval), ad.Zero(d_dot.aval)
    else:
        by_h, by_d = _scale_cotangents.bind(g, y, d)
    linear = [ad.is_undefined_primal(v) for v in (h_dot, d_dot)]
    return [by_h if linear[0] else None, by_d if linear[1] else None, None, None]


_scale_tangent = Primitive("dora_scale_tangent")
_define(_scale_tangent, _tangent, _abstract_tangent)
ad.primitive_transposes[_scale_tangent] = _transpose
_scale_cotangents = Primitive("dora_scale_cotangents")
_scale_cotangents.multiple_results = True
_define(_scale_cotangents, _cotangents, _abstract_cotangents)

mlir.register_lowering(
    _scale_cotangents, mlir.lower_fun(_cotangents_of_rows, multiple_results=True), platform="cpu"
)
