"""The axes of a kernel in three groups: stack, in and out."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array


# The arrays of one layer's adapter, by name.
Adapter = Mapping[str, "Array"]


class KernelAxes(NamedTuple):
    """The axes of a kernel, each listed once in one of three groups.

    Example:
      >>> KernelAxes(stack=(0,), inputs=(1,), outputs=(2,)).ndim  # (layers, in, out)
      3
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.stack) + len(self.inputs) + len(self.outputs)

    def shapes(self, kernel_shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `lora_a`, `lora_b` and `magnitude` for a kernel's shape."""
        stack, inputs, outputs = (tuple(kernel_shape[i] for i in group) for group in self)
        return {
            "lora_a": (*stack, *inputs, rank),
            "lora_b": (*stack, rank, *outputs),
            "magnitude": (*stack, *outputs),
        }

    def letters(self) -> tuple[str, str, str, str]:
        """Returns einsum letters: of the kernel, and of its stack, in and out axes."""
        kernel = string.ascii_lowercase[: self.ndim]
        stack, inputs, outputs = ("".join(kernel[i] for i in group) for group in self)
        return kernel, stack, inputs, outputs


def expand_trailing(mask: Array, ndim: int) -> Array:
    """Appends axes of length 1 to a mask of leading axes, for broadcasting.

    Example:
      >>> expand_trailing(jnp.ones(3), 3).shape
      (3, 1, 1)
    """
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def expand_inputs(x: Array, axes: KernelAxes) -> Array:
    """Lays an array of shape `(*stack, *out)` along a kernel's axes, for broadcasting."""
    kept = axes.stack + axes.outputs
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    return jnp.expand_dims(jnp.transpose(x, order), axes.inputs)


def canonical_transpose(x: Array, axes: KernelAxes) -> Array:
    """Transposes a kernel reduced over its in axes to `(*stack, *out)`.

    Example:
      >>> axes = KernelAxes(stack=(1,), inputs=(2,), outputs=(0,))  # a kernel (out, stack, in)
      >>> canonical_transpose(jnp.ones((5, 3)), axes).shape
      (3, 5)
    """
    kept = [i for i in range(axes.ndim) if i not in axes.inputs]
    return jnp.transpose(x, [kept.index(i) for i in axes.stack + axes.outputs])
