"""The scale of an adapted layer: `c = m / n`, with the norm `n = ||W0 + s A B||`.

The norm comes from the factors, so no array as large as the kernel is formed as a rule.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import Adapter, KernelAxes, expand_trailing
from dora_jax.decomposition.base import FrozenBase, same_base
from dora_jax.decomposition.direction import SMALL_SQUARE, relative_square
from dora_jax.decomposition.direction_from_rows import relative_square_from_rows
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.decomposition.quantized import Kernel
from dora_jax.decomposition.sharding import explicit_shardings
from dora_jax.ops.choice import cheap_alone
from dora_jax.ops.mesh_types import automatically
from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float

    from dora_jax.config import LayerSettings


def direction_norm(
    square: Float[Array, "*stack *out"], base_norm: Float[Array, "*stack *out"], eps: float
) -> Float[Array, "*stack *out"]:
    """Returns `n = ||W0 + s A B||` from `relative_square`, at least `eps`.

    `||W0|| sqrt(square)` is exactly `||W0||` for a square of 1, on every backend and in every
    fusion, which a sum of squares computed anew is not.
    """
    safe = jnp.where(base_norm == 0, 1, base_norm)
    least = jnp.square(eps / safe)
    # Not `maximum`, whose derivative has more operations, to share equal arguments out.
    return safe * jnp.sqrt(jnp.where(square < least, least, square))


def effective_factors(adapter: Adapter, base: FrozenBase, axes: KernelAxes) -> Factors:
    """Returns the factors `A (*stack, *in, k)` and `B (*stack, k, *out)` that change the kernel.

    The mask of the base switches slices of a stack off. Factors whose product did not start at zero
    count by their change, `A B - A0 B0`, written as one product of twice the rank: so the frozen
    kernel stays the pretrained one.
    """
    a, b = adapter["lora_a"], adapter["lora_b"]
    if base.init_a is not None and base.init_b is not None:
        a = jnp.concatenate([a, base.init_a], axis=-1)
        b = jnp.concatenate([b, -base.init_b], axis=len(axes.stack))
    if base.mask is not None:
        b = b * expand_trailing(base.mask, b.ndim).astype(b.dtype)
    return Factors(a, b)


def divides_by_norm(settings: LayerSettings, adapter: Adapter) -> bool:
    """Returns whether a layer divides by `n` now, which changes as its factors do."""
    return (
        settings.decompose and settings.normalize and settings.rank > 0 and "scale" not in adapter
    )


def norm_of_layer(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    product: KernelProduct,
    factors: Factors | None = None,
    rows: Float[Array, "r out"] | None = None,
) -> Float[Array, "*stack *out"] | None:
    """Returns the norm `n` of `W0 + s A B`; None if the layer does not divide by it now.

    Arguments as in `magnitude_over_norm`; `factors` are `effective_factors`, and `rows`
    is `A^T W0`, if at hand already.
    """
    if not divides_by_norm(settings, adapter):
        return None
    factors = factors or effective_factors(adapter, base, product.axes)
    if settings.norm_gradient == "detached":
        factors, rows = jax.lax.stop_gradient((factors, rows))
    if rows is not None:
        square = relative_square_from_rows(
            rows, kernel, factors, base.norm, settings.scaling, product
        )
        return direction_norm(square, base.norm, settings.eps)
    square = relative_square(kernel, factors, base.norm, settings.scaling, product)
    return direction_norm(square, base.norm, settings.eps)


def is_short(norm: Float[Array, "*stack *out"], base: FrozenBase) -> Bool[Array, "*stack *out"]:
    """Whether `V` is so much shorter than `W0` that what is summed from the factors cancels."""
    return norm < SMALL_SQUARE**0.5 * base.norm


def stored_scale(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    product: KernelProduct,
) -> Float[Array, "*stack *out"]:
    """Returns `magnitude_over_norm` of a stored kernel, also where its mesh axes are explicit.

    It is traced once for all layers of a kind, and is one program outside of `jax.jit`.
    """
    out = explicit_shardings(kernel, product.axes).get("norm")
    arrays = (kernel, dict(adapter), base)
    if has_mesh_in_type(*jax.tree.leaves(arrays)) and not out:
        return magnitude_over_norm(settings, *arrays, product)

    def run(*arrays: Any) -> Array:
        return _of_kind(settings, product, cheap_alone(), *arrays)

    return cast("Array", automatically(run, out, *arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_kind(
    settings: LayerSettings,
    product: KernelProduct,
    cheap: bool,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
) -> Array:
    """Returns `magnitude_over_norm`; `cheap` is that of `cheap_ways_alone`."""
    return magnitude_over_norm(settings, kernel, adapter, base, product)


def magnitude_over_norm(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    product: KernelProduct,
    norm: Float[Array, "*stack *out"] | None = None,
) -> Float[Array, "*stack *out"]:
    """Returns the scale `c = m / n`, so that the adapted output is `c h` with `h = x V`.

    At initialisation `m` and `n` are the same stored number and `c` is exactly 1. Depends on
    parameters alone. A zero column keeps scale 0; of any other, a magnitude of exactly 0 gives a
    scale of 2^-32, so that it still has a gradient. Where the kernel is not the one that `base`
    describes, `c` is NaN: a wrong norm must not pass unnoticed.

    Args:
      settings: the layer's settings.
      kernel: the frozen kernel `W0`.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them; or `scale`, `c`
        itself, where it was precomputed.
      base: what is kept of the kernel.
      product: the kernel's axes, and how the layer multiplies.
      norm: `n`, if it is at hand already.
    """
    if "scale" in adapter:
        return adapter["scale"]
    n = norm_of_layer(settings, kernel, adapter, base, product) if norm is None else norm
    n, norm = base.norm if n is None else n, base.norm
    magnitude = _magnitude(adapter["magnitude"], norm) if settings.has_magnitude else norm
    # Apply `where` before dividing: XLA on a CPU would otherwise fuse it into the loop over tokens.
    zero = norm == 0
    dtype = kernel.dtype if product.dtype is None else product.dtype
    magnitude = jnp.where(zero, 0, _keep_off_zero(magnitude, n, dtype))
    n = jnp.where(zero, 1, n)
    if base.mask is not None:
        adapted = expand_trailing(base.mask, n.ndim)
        magnitude, n = jnp.where(adapted, magnitude, 1), jnp.where(adapted, n, 1)
    return _ratio(
        magnitude, jnp.where(same_base(kernel, base, product.axes, product.cut), n, jnp.nan)
    )


@jax.custom_jvp
def _ratio(m: Array, n: Array) -> Array:
    """Returns `m / n`, exactly 1 where both are equal, on every backend."""
    move = m - n
    far = jnp.abs(move) > 0.5 * n
    return jnp.where(far, m, move) / n + jnp.where(far, 0, 1).astype(n.dtype)


@_ratio.defjvp
def _ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """The derivative of `1 + (m - n) / n` would be a difference, and lose a scale near 0."""
    (m, n), (m_dot, n_dot) = primals, tangents
    ratio = _ratio(m, n)
    return ratio, (m_dot - ratio * n_dot) / n


def _keep_off_zero(magnitude: Array, n: Array, dtype: DTypeLike) -> Array:
    """Keeps `m / n` away from 0, so that a magnitude of 0 still receives a gradient.

    At 0 the output is 0. The magnitude's gradient is computed from the output, so it would be 0
    there for ever. Float16 has no number as small as 2^-32: there it is the smallest it has, 2^-24.
    """
    smallest = 2.0**-24 if dtype == jnp.float16 else 2.0**-32
    least = smallest * jax.lax.stop_gradient(n)
    move = least - jax.lax.stop_gradient(magnitude)
    return magnitude + jnp.where(jnp.abs(magnitude) < least, move, 0)


def _magnitude(
    magnitude: Float[Array, "*stack *out"], norm: Float[Array, "*stack *out"]
) -> Float[Array, "*stack *out"]:
    """Returns the magnitude in the dtype of the norm.

    A narrower magnitude that equals the rounded norm counts as the norm itself, so that an
    untrained adapter is an identity in any dtype. XLA may drop a cast to and fro, so the rounding
    is spelt out with `reduce_precision`.
    """
    if magnitude.dtype == norm.dtype:
        return magnitude
    narrow = jnp.finfo(magnitude.dtype)
    rounded = jax.lax.reduce_precision(norm, narrow.nexp, narrow.nmant)
    magnitude = magnitude.astype(norm.dtype)
    return magnitude + jnp.where(magnitude == rounded, norm - rounded, 0)
