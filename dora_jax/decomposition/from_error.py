"""Factors that start from what quantising lost (LoftQ, arXiv 2310.08659, with one step).

Of a kernel that was quantised without its principal part (QPiSSA, arXiv 2404.02948) that
is the principal part, and the error of the rest as far as the rank has room for it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import kernel_norm
from dora_jax.decomposition.initializers import as_matrices, singular_vectors, with_rank
from dora_jax.decomposition.quantized import QuantizedKernel, dense

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from dora_jax.config import LayerSettings


class ErrorStart(NamedTuple):
    """How a layer starts from its quantisation error, float32.

    Attributes:
      lora_a: `A (*stack, *in, r)`.
      lora_b: `B (*stack, r, *out)`.
      magnitude: `||W0 + s A B||`, `(*stack, *out)`.
      before: `||W0 - W|| / ||W||`, the distance of the quantised kernel from the original.
      after: `||W0 + s A B - W|| / ||W||`, that of the start.
    """

    lora_a: Float[Array, "*stack *in r"]
    lora_b: Float[Array, "*stack r *out"]
    magnitude: Float[Array, "*stack *out"]
    before: Float[Array, ""]
    after: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("axes", "rank"))
def without_principal(
    kernel: Float[Array, "..."], axes: KernelAxes, rank: int
) -> Float[Array, "..."]:
    """Returns a kernel without its directions of the largest singular values, in its dtype.

    Args:
      kernel: the kernel, in any dtype.
      axes: of the kernel; each matrix of a stack loses its own.
      rank: how many directions.

    Example:
      >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> without_principal(kernel, KernelAxes((), (0,), (1,)), 2).round(5).diagonal()
      Array([0., 0., 1.], dtype=float32)
    """
    product = _nearest(kernel, axes, rank)[2]
    return (kernel.astype(jnp.float32) - product).astype(kernel.dtype)


def _nearest(kernel: Array, axes: KernelAxes, rank: int) -> tuple[Array, Array, Array]:
    """Returns the factors whose product is the nearest of a rank, and that product; float32."""
    vectors = singular_vectors(as_matrices(kernel, axes), rank)
    a, b = with_rank(vectors, rank, jax.random.key(0))
    shapes = axes.shapes(kernel.shape, rank)
    a, b = a.reshape(shapes["lora_a"]), b.reshape(shapes["lora_b"])
    letters, stack, inputs, outputs = axes.letters()
    product = jnp.einsum(
        f"{stack}{inputs}y,{stack}y{outputs}->{letters}", a, b, precision="highest"
    )
    return a, b, product


@functools.partial(jax.jit, static_argnames=("settings", "axes"))
def start_of_error(
    settings: LayerSettings,
    kernel: QuantizedKernel,
    original: Float[Array, "..."],
    axes: KernelAxes,
) -> ErrorStart:
    """Returns the factors nearest to `(W - W0) / s` of the layer's rank, by singular values.

    Args:
      settings: the layer's settings.
      kernel: the quantised kernel `W0`.
      original: the kernel `W` that was quantised.
      axes: of both.
    """
    whole, wide = dense(kernel).astype(jnp.float32), original.astype(jnp.float32)
    a, b, product = _nearest(wide - whole, axes, settings.rank)
    root = math.sqrt(settings.scaling)
    lora_a, lora_b = a / root, b / root
    start, length = whole + product, jnp.linalg.norm(wide.ravel())
    before, after = (jnp.linalg.norm((x - wide).ravel()) / length for x in (whole, start))
    magnitude = kernel_norm(start, axes, settings.eps)
    return ErrorStart(lora_a, lora_b, magnitude, before, after)
