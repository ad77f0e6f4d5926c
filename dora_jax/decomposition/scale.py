"""The scale of an adapted layer: `c = m / n`, with the norm `n = ||W0 + s A B||`.

The norm comes from the factors, so no array as large as the kernel is formed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dora_jax.decomposition.axes import Adapter, KernelAxes, expand_trailing
from dora_jax.decomposition.base import FrozenBase, same_base
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from dora_jax.config import LayerSettings


class Factors(NamedTuple):
    """The low-rank factors with which a layer computes, see `effective_factors`."""

    a: Float[Array, "*stack *in k"]
    b: Float[Array, "*stack k *out"]


class KernelProduct(NamedTuple):
    """How the norm multiplies the factors with a kernel; hashable.

    Attributes:
      axes: the kernel's axes.
      dtype: the dtype in which the layer multiplies; None is the kernel's.
      precision: of the product with the kernel, as for `jax.lax.dot_general`.
    """

    axes: KernelAxes
    dtype: DTypeLike | None = None
    precision: jax.lax.PrecisionLike = None

    @property
    def wide(self) -> jnp.dtype:
        """Float32, or the layer's dtype if that is wider."""
        return wide_dtype(jnp.float32 if self.dtype is None else self.dtype)

    def rounded(self, factor: Array) -> Array:
        """Returns a factor rounded to the layer's dtype, as the layer multiplies it, then wide."""
        return factor.astype(self.dtype).astype(self.wide)

    def with_kernel(self, a: Array, kernel: Array) -> Float[Array, "*stack r *out"]:
        """Returns `A^T W`."""
        letters, stack, inputs, outputs = self.axes.letters()
        return jnp.einsum(
            f"{stack}{inputs}y,{letters}->{stack}y{outputs}",
            a.astype(self.dtype),
            kernel,
            precision=self.precision,
            preferred_element_type=self.wide,
        )

    def with_factors(self, a: Array, other: Array, b: Array) -> Float[Array, "*stack r *out"]:
        """Returns `(A^T A') B`."""
        _, stack, inputs, outputs = self.axes.letters()
        gram = jnp.einsum(f"{stack}{inputs}y,{stack}{inputs}z->{stack}yz", a, other)
        return jnp.einsum(f"{stack}yz,{stack}z{outputs}->{stack}y{outputs}", gram, b)

    def sum_over_rank(self, x: Float[Array, "*stack r *out"]) -> Float[Array, "*stack *out"]:
        """Sums over r."""
        return jnp.sum(x, axis=len(self.axes.stack))


def relative_square_change(
    kernel: Float[Array, "..."],
    factors: Factors,
    base_norm: Float[Array, "*stack *out"],
    scaling: float,
    product: KernelProduct,
) -> Float[Array, "*stack *out"]:
    """Returns `(||W0 + s A B||^2 - ||W0||^2) / ||W0||^2`, without forming `W0 + s A B`.

    From `||W0 + s A B||^2 = ||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T (A^T A) B)`, accumulated in
    float32 or wider. It is exactly 0 where `B` is 0. Costs `2 r in out` operations.

    Args:
      kernel: the frozen kernel `W0`.
      factors: `A` and `B`.
      base_norm: `||W0||`, zero where a column is zero.
      scaling: `s`.
      product: how the layer multiplies.
    """
    product = product._replace(dtype=jnp.dtype(product.dtype or kernel.dtype))
    change = _square_change(product, scaling, kernel.astype(product.dtype), *factors)
    return change / jnp.square(jnp.where(base_norm == 0, 1, base_norm))


# With `V = W0 + s A B` the differential of `||V||^2` is `2 s <A^T V, dB> + 2 s <dA^T V, B>`. This
# form needs one product for each tangent; JAX would differentiate the symmetric `A^T A` twice.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _square_change(
    product: KernelProduct, scaling: float, kernel: Array, lora_a: Array, lora_b: Array
) -> Float[Array, "*stack *out"]:
    """Returns `||W0 + s A B||^2 - ||W0||^2`."""
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    rows = 2 * product.with_kernel(lora_a, kernel) + scaling * product.with_factors(a, a, b)
    return scaling * product.sum_over_rank(rows * b)


def _square_change_jvp(
    product: KernelProduct,
    scaling: float,
    primals: tuple[Array, Array, Array],
    tangents: tuple[Any, Any, Any],
) -> tuple[Array, Array]:
    kernel, lora_a, lora_b = primals
    kernel_dot, a_dot, b_dot = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    from_kernel = product.with_kernel(lora_a, kernel)
    from_factors = scaling * product.with_factors(a, a, b)
    half = jnp.zeros_like(from_kernel)
    if b_dot is not None:
        half += product.rounded(b_dot) * (from_kernel + from_factors)
    if a_dot is not None:
        rows = product.with_kernel(a_dot, kernel)
        half += b * (rows + scaling * product.with_factors(product.rounded(a_dot), a, b))
    if kernel_dot is not None:
        half += b * product.with_kernel(lora_a, kernel_dot)
    change = scaling * product.sum_over_rank((2 * from_kernel + from_factors) * b)
    return change, 2 * scaling * product.sum_over_rank(half)


_square_change.defjvp(_square_change_jvp, symbolic_zeros=True)


def direction_norm(
    relative_change: Float[Array, "*stack *out"], base_norm: Float[Array, "*stack *out"], eps: float
) -> Float[Array, "*stack *out"]:
    """Returns `n = ||W0 + s A B||` from `relative_square_change`, at least `eps`.

    `||W0|| sqrt(1 + change)` is exactly `||W0||` for a change of 0, on every backend and in every
    fusion, which a sum of squares computed anew is not.
    """
    safe = jnp.where(base_norm == 0, 1, base_norm)
    least = jnp.square(eps / safe)
    return safe * jnp.sqrt(jnp.maximum(1 + relative_change, least))


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


def magnitude_over_norm(
    settings: LayerSettings,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: FrozenBase,
    product: KernelProduct,
    factors: Factors | None = None,
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
      factors: `effective_factors`, if they are at hand already.
    """
    if "scale" in adapter:
        return adapter["scale"]
    norm = base.norm
    magnitude = _magnitude(adapter["magnitude"], norm) if settings.has_magnitude else norm
    n = norm
    if settings.normalize and settings.rank:
        factors = factors or effective_factors(adapter, base, product.axes)
        if settings.norm_gradient == "detached":
            factors = jax.lax.stop_gradient(factors)
        change = relative_square_change(kernel, factors, norm, settings.scaling, product)
        n = direction_norm(change, norm, settings.eps)
    # Apply `where` before dividing: XLA on a CPU would otherwise fuse it into the loop over tokens.
    zero = norm == 0
    dtype = kernel.dtype if product.dtype is None else product.dtype
    magnitude = jnp.where(zero, 0, _keep_off_zero(magnitude, n, dtype))
    n = jnp.where(zero, 1, n)
    if base.mask is not None:
        adapted = expand_trailing(base.mask, n.ndim)
        magnitude, n = jnp.where(adapted, magnitude, 1), jnp.where(adapted, n, 1)
    return _ratio(magnitude, jnp.where(same_base(kernel, base, product.axes), n, jnp.nan))


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
