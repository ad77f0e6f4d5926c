"""What an adapted layer keeps of its frozen kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from dora_jax.decomposition.axes import Adapter, KernelAxes, canonical_transpose
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float


# How far a kernel may be from the one the adapter was made for: far enough for a cast to bfloat16
# (2^-9) or float8 (2^-4), near enough that another kernel is noticed.
_CAST_TOLERANCE = 2.0**-4


def kernel_norm(
    kernel: Float[Array, "..."], axes: KernelAxes, eps: float = 1e-8
) -> Float[Array, "*stack *out"]:
    """Returns `||W||` over the in axes, in float32 or wider; at least `eps`.

    A column that is exactly zero has norm exactly zero, so that it can be told from a small one.

    Example:
      >>> kernel_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]), KernelAxes((), (0,), (1,)))
      Array([5., 0.], dtype=float32)
    """
    letters, stack, _, outputs = axes.letters()
    wide = kernel.astype(wide_dtype(kernel.dtype))
    to_canonical = canonical_transpose(letters, axes, stack + outputs)
    square = to_canonical(jnp.sum(jnp.square(wide), axes.inputs))
    nonzero = to_canonical(jnp.any(kernel != 0, axes.inputs))
    return jnp.where(nonzero, jnp.maximum(jnp.sqrt(square), eps), 0.0)


def first_row(kernel: Float[Array, "..."], axes: KernelAxes) -> Float[Array, "*stack *out"]:
    """Returns the kernel at index 0 of every in axis: the mark by which a base is recognised."""
    letters, stack, _, outputs = axes.letters()
    index = tuple(0 if i in axes.inputs else slice(None) for i in range(axes.ndim))
    return canonical_transpose(letters, axes, stack + outputs)(kernel[index])


def describe_base(
    kernel: Float[Array, "..."], axes: KernelAxes, eps: float = 1e-8
) -> dict[str, Array]:
    """Returns what an adapted layer keeps of its frozen kernel.

    `norm` is `||W0||`, from which the magnitude starts; `row` recognises the kernel later.
    """
    return {"norm": kernel_norm(kernel, axes, eps), "row": first_row(kernel, axes)}


def base_changed(
    kernel: Float[Array, "..."], base: Adapter, axes: KernelAxes
) -> Float[Array, "*stack *out"]:
    """Returns True for each output feature whose kernel is not the one `base` describes."""
    return ~same_base(kernel, base, axes)


def same_base(kernel: Array, base: Adapter, axes: KernelAxes) -> Array:
    row, now = (x.astype(jnp.float32) for x in (base["row"], first_row(kernel, axes)))
    # The absolute part is for float16, in which numbers under 6e-8 become 0.
    return jnp.abs(now - row) <= _CAST_TOLERANCE * jnp.abs(row) + 1e-7
