"""The change of a kernel in magnitude and in direction (DoRA, section 3.2)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class WeightChange(NamedTuple):
    """The change of one kernel. Each field is float32 of shape `(*stack,)`.

    Attributes:
      magnitude: `mean_n |m'(n) - m(n)|`, the paper's dM (eq. 3).
      relative_magnitude: `mean_n |m'(n) - m(n)| / m(n)`.
      direction: `mean_n (1 - cos(V'(n), W(n)))`, the paper's dD (eq. 4).
    """

    magnitude: Array
    relative_magnitude: Array
    direction: Array


@functools.partial(jax.jit, static_argnames="axes")
def weight_change(
    before: Float[Array, "..."], after: Float[Array, "..."], axes: KernelAxes
) -> WeightChange:
    """Returns how far the norms of a kernel's columns changed, and how far the columns turned.

    `1 - cos` is computed as half the squared distance of the unit columns: for close columns the
    difference itself would cancel. Columns that are zero before or after are left out.

    Args:
      before: the kernel, any floating dtype.
      after: the changed kernel, of the same shape.
      axes: the kernel's axes; a mean runs over all out axes.

    Example:
      >>> before = jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> after = jnp.array([[6.0, 0.0], [8.0, 1.0]])
      >>> change = weight_change(before, after, KernelAxes((), (0,), (1,)))
      >>> change.magnitude, change.direction  # |5 -> 10|, |1 -> 1|; 0 and 90 degrees
      (Array(2.5, dtype=float32), Array(0.5, dtype=float32))
    """
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    norm, new_norm = (
        jnp.sqrt(jnp.sum(jnp.square(w), axes.inputs, keepdims=True)) for w in (before, after)
    )
    nonzero = (norm > 0) & (new_norm > 0)
    unit = before / jnp.where(nonzero, norm, 1)
    new_unit = after / jnp.where(nonzero, new_norm, 1)
    distance = jnp.sum(jnp.square(new_unit - unit), axes.inputs, keepdims=True) / 2

    def mean(x: Array) -> Array:
        over = axes.inputs + axes.outputs
        return jnp.mean(x, over, where=jnp.broadcast_to(nonzero, x.shape))

    difference = jnp.abs(new_norm - norm)
    relative = difference / jnp.where(nonzero, norm, 1)
    return WeightChange(mean(difference), mean(relative), mean(distance))
