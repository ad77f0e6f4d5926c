"""The mathematics of DoRA, on arrays.

A kernel's axes are of three kinds: *stack* (scan-stacked layers, vmapped copies, experts), *in*
(contracted with the input) and *out*. For each stack index and output feature, DoRA
(arXiv 2402.09353, eq. 5) rebuilds the frozen kernel `W0` as

    W' = m * V / n,   V = W0 + s A B,   n = ||V|| over the in axes,

with a trainable magnitude `m (*stack, *out)` and a trainable low-rank direction
`A (*stack, *in, r)`, `B (*stack, r, *out)`. Nothing here but `materialize` forms an array as large
as the kernel.

Shapes are written `stack`, `in`, `out` for possibly several axes each.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dora_jax.decomposition.axes import Adapter, KernelAxes, expand_trailing
from dora_jax.decomposition.base import same_base
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from dora_jax.config import LayerSettings


def relative_square_change(
    kernel: Float[Array, "..."],
    lora_a: Float[Array, "*stack *in r"],
    lora_b: Float[Array, "*stack r *out"],
    base_norm: Float[Array, "*stack *out"],
    scaling: float,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*stack *out"]:
    """Returns `(||W0 + s A B||^2 - ||W0||^2) / ||W0||^2`, without forming `W0 + s A B`.

    From `||W0 + s A B||^2 = ||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T (A^T A) B)`, accumulated in
    float32 or wider. It is exactly 0 where `lora_b` is 0. Costs `2 r in out` operations.

    Args:
      base_norm: `||W0||`, zero where a column is zero.
      dtype: the dtype in which the layer multiplies; defaults to the kernel's.
      precision: of the product with the kernel, as for `jax.lax.dot_general`.
    """
    dtype = kernel.dtype if dtype is None else dtype
    product = _FactoredProduct(axes, jnp.dtype(dtype), precision)
    change = _square_change(product, scaling, kernel.astype(dtype), lora_a, lora_b)
    return change / jnp.square(jnp.where(base_norm == 0, 1, base_norm))


class _FactoredProduct(NamedTuple):
    """How `_square_change` multiplies; hashable, for `jax.custom_jvp`."""

    axes: KernelAxes
    dtype: jnp.dtype
    precision: jax.lax.PrecisionLike

    def rounded(self, factor: Array) -> Array:
        """A factor as the layer itself multiplies it: rounded to its dtype, then wide again."""
        return factor.astype(self.dtype).astype(wide_dtype(self.dtype))

    def with_kernel(self, a: Array, kernel: Array) -> Float[Array, "*stack r *out"]:
        """Returns `A^T W`."""
        letters, stack, inputs, outputs = self.axes.letters()
        return jnp.einsum(
            f"{stack}{inputs}y,{letters}->{stack}y{outputs}",
            a.astype(self.dtype),
            kernel,
            precision=self.precision,
            preferred_element_type=wide_dtype(self.dtype),
        )

    def with_factors(self, a: Array, other: Array, b: Array) -> Float[Array, "*stack r *out"]:
        """Returns `(A^T A') B`."""
        _, stack, inputs, outputs = self.axes.letters()
        gram = jnp.einsum(f"{stack}{inputs}y,{stack}{inputs}z->{stack}yz", a, other)
        return jnp.einsum(f"{stack}yz,{stack}z{outputs}->{stack}y{outputs}", gram, b)

    def sum_over_rank(self, x: Float[Array, "*stack r *out"]) -> Float[Array, "*stack *out"]:
        """Sums over r."""
        return jnp.sum(x, axis=len(self.axes.stack))


# With `V = W0 + s A B` the differential of `||V||^2` is `2 s <A^T V, dB> + 2 s <dA^T V, B>`. So
# written, each part is one product; JAX's own rules take the symmetric `A^T A` for two.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _square_change(
    product: _FactoredProduct, scaling: float, kernel: Array, lora_a: Array, lora_b: Array
) -> Float[Array, "*stack *out"]:
    """Returns `||W0 + s A B||^2 - ||W0||^2`."""
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    rows = 2 * product.with_kernel(lora_a, kernel) + scaling * product.with_factors(a, a, b)
    return scaling * product.sum_over_rank(rows * b)


def _square_change_jvp(
    product: _FactoredProduct,
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


def effective_factors(adapter: Adapter, base: Adapter, axes: KernelAxes) -> tuple[Array, Array]:
    """Returns the factors `A (*stack, *in, k)` and `B (*stack, k, *out)` as they act on the kernel.

    A `mask (*stack,)` in `base` switches slices of a stack off. Factors that did not start at a
    product of zero (`init_a`, `init_b` in `base`) act by what they changed, `A B - A0 B0`, as one
    product of twice the rank: the frozen kernel stays the pretrained one.
    """
    a, b = adapter["lora_a"], adapter["lora_b"]
    if "init_a" in base:
        a = jnp.concatenate([a, base["init_a"]], axis=-1)
        b = jnp.concatenate([b, -base["init_b"]], axis=len(axes.stack))
    if "mask" in base:
        b = b * expand_trailing(base["mask"], b.ndim).astype(b.dtype)
    return a, b


def scale_minus_one(
    settings: LayerSettings,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*stack *out"]:
    """Returns `d = (m - n) / n`, so that the adapted output is `h + d h` with `h = x V`.

    At initialisation `m` and `n` are the same stored number and `d` is exactly 0; `m / n - 1` need
    not be. Depends on parameters alone. A zero column keeps scale 0 (`d = -1`); of any other, a
    magnitude of exactly 0 gives the next number above -1, so that it still has a gradient. Where
    the kernel is not the one that `base` describes, `d` is NaN: a wrong norm must not pass
    unnoticed.

    Args:
      settings: the layer's settings.
      kernel: the frozen kernel `W0`.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them; or `scale`, `d`
        itself, where it was hoisted.
      base: `norm` and `row` from `describe_base`; `mask`, `init_a`, `init_b` where there are
        any, see `effective_factors`.
      axes: the kernel's axes.
      dtype: the dtype in which the layer multiplies.
      precision: of the product with the kernel.
    """
    if "scale" in adapter:
        return adapter["scale"]
    norm = base["norm"]
    magnitude = _magnitude(adapter["magnitude"], norm) if settings.has_magnitude else norm
    n = norm
    if settings.normalize and settings.rank:
        factors = effective_factors(adapter, base, axes)
        if settings.norm_gradient == "detached":
            factors = jax.lax.stop_gradient(factors)
        change = relative_square_change(
            kernel, *factors, norm, settings.scaling, axes, dtype=dtype, precision=precision
        )
        n = direction_norm(change, norm, settings.eps)
    # What is selected is selected before the division, after which XLA on a CPU would put it into
    # the loops over activations and do it once for each token.
    zero = norm == 0
    magnitude, n = jnp.where(zero, 0, _keep_off_zero_scale(magnitude, n)), jnp.where(zero, 1, n)
    if "mask" in base:
        on = expand_trailing(base["mask"], n.ndim)
        magnitude, n = jnp.where(on, magnitude, 1), jnp.where(on, n, 1)
    n = jnp.where(same_base(kernel, base, axes), n, jnp.nan)
    return (magnitude - n) / n


def _keep_off_zero_scale(magnitude: Array, n: Array) -> Array:
    """Moves a magnitude that is 0 beside `n` to where `(m - n) / n` is just not -1.

    At -1 the output is 0, and says nothing of `h`, from which the magnitude's gradient is taken:
    it would stay there for ever. Moves by less than `n` is rounded by.
    """
    least = jax.lax.stop_gradient(n) * jnp.finfo(n.dtype).epsneg
    move = least - jax.lax.stop_gradient(magnitude)
    return magnitude + jnp.where(jnp.abs(magnitude) < least, move, 0)


def _magnitude(
    magnitude: Float[Array, "*stack *out"], norm: Float[Array, "*stack *out"]
) -> Float[Array, "*stack *out"]:
    """Returns the magnitude in the dtype of the norm.

    A narrower one that still is the norm, rounded, stands for the norm itself, so that an untrained
    adapter is an identity in any dtype. (XLA may leave out a cast to and fro, not this rounding.)
    """
    if magnitude.dtype == norm.dtype:
        return magnitude
    narrow = jnp.finfo(magnitude.dtype)
    rounded = jax.lax.reduce_precision(norm, narrow.nexp, narrow.nmant)
    magnitude = magnitude.astype(norm.dtype)
    return magnitude + jnp.where(magnitude == rounded, norm - rounded, 0)
