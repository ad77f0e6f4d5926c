"""Factors that start from what quantising lost (LoftQ, arXiv 2310.08659, with one step)."""

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
    error = as_matrices(wide - whole, axes)
    a, b = with_rank(singular_vectors(error, settings.rank), settings.rank, jax.random.key(0))
    shapes, root = axes.shapes(kernel.shape, settings.rank), math.sqrt(settings.scaling)
    lora_a, lora_b = a.reshape(shapes["lora_a"]) / root, b.reshape(shapes["lora_b"]) / root
    letters, stack, inputs, outputs = axes.letters()
    product = jnp.einsum(
        f"{stack}{inputs}y,{stack}y{outputs}->{letters}", lora_a, lora_b, precision="highest"
    )
    start, length = whole + settings.scaling * product, jnp.linalg.norm(wide.ravel())
    before, after = (jnp.linalg.norm((x - wide).ravel()) / length for x in (whole, start))
    magnitude = kernel_norm(start, axes, settings.eps)
    return ErrorStart(lora_a, lora_b, magnitude, before, after)
