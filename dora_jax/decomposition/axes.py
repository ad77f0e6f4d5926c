"""The axes of a kernel in three groups: stack, in and out."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array


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
    """Gives a mask of leading axes trailing ones of length 1, for broadcasting."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def expand_inputs(x: Array, axes: KernelAxes) -> Array:
    """Lays an array of shape `(*stack, *out)` along a kernel's axes, for broadcasting."""
    kept = axes.stack + axes.outputs
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    return jnp.expand_dims(jnp.transpose(x, order), axes.inputs)


def canonical_transpose(letters: str, axes: KernelAxes, canonical: str) -> Callable[[Array], Array]:
    """Returns the transpose that brings a kernel without its in axes to `stack + out` order."""
    kept = "".join(c for i, c in enumerate(letters) if i not in axes.inputs)
    return lambda x: jnp.transpose(x, [kept.index(c) for c in canonical])
