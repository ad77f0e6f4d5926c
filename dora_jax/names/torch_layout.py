"""The layout of torch's weights in Hugging Face models, and that of a Flax layer's kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import DoRAError

if TYPE_CHECKING:
    from jaxtyping import Shaped

    Array = np.ndarray[Any, Any]


class NameMapError(DoRAError):
    """A name map that is not one to one, or a module that it does not list."""


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """The order of features in a layer whose rotary embedding rotates pairs `(2k, 2k + 1)`.

    Hugging Face rotates pairs `(k, k + head_dim / 2)` ("half-rotated"). The out features of q and k
    have another order there, so kernels, biases, `lora_b` and magnitudes are permuted.

    Attributes:
      head_dim: number of features of one head.
      rotary_dim: how many of them, the first ones, are rotated; None for all.
    """

    head_dim: int
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        rotated = self.rotary_dim or self.head_dim
        if rotated % 2 or rotated > self.head_dim or self.head_dim < 2:
            raise NameMapError(
                f"rotary features come in pairs, at most head_dim of them: got {self}"
            )

    def order(self, features: int) -> Shaped[Array, " features"]:
        """Returns, for each feature of Hugging Face's order, its position in the Flax layer.

        Example:
          >>> Interleaved(head_dim=4).order(8).tolist()
          [0, 2, 1, 3, 4, 6, 5, 7]
        """
        if features % self.head_dim:
            raise NameMapError(
                f"{features} features do not divide into heads of {self.head_dim}: correct head_dim"
            )
        rotated = self.rotary_dim or self.head_dim
        head = np.r_[0:rotated:2, 1:rotated:2, rotated : self.head_dim]
        return (np.arange(0, features, self.head_dim)[:, None] + head).ravel()


def to_hf_order(x: Array, features: Interleaved | None, axis: int = -1) -> Array:
    """Reorders the out features along `axis`, from the Flax layer's order to Hugging Face's."""
    return x if features is None else np.take(x, features.order(x.shape[axis]), axis)


def from_hf_order(x: Array, features: Interleaved | None, axis: int = -1) -> Array:
    """Reorders the out features along `axis`, from Hugging Face's order to the Flax layer's."""
    return x if features is None else np.take(x, np.argsort(features.order(x.shape[axis])), axis)


def converted_shape(convert: Callable[[Array], Array], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a function gives to an array of the given shape.

    Converts a dummy array, whose elements share one byte of memory.

    Example:
      >>> converted_shape(np.transpose, (2, 3))
      (3, 2)
    """
    return convert(np.broadcast_to(np.empty((), np.uint8), shape)).shape


def _default_axes(ndim: int, stack: int) -> KernelAxes:
    order = tuple(range(ndim))
    return KernelAxes(order[:stack], order[stack:-1], order[-1:])


def to_weight(
    kernel: Array,
    axes: KernelAxes | None,
    stack: int,
    features: Interleaved | None = None,
    transposed: bool = False,
) -> Array:
    """Returns a kernel as `(*stack, out, in)`, a convolution's as `(*stack, out, in, *window)`.

    Args:
      kernel: the kernel of a Flax layer.
      axes: the kernel's axes, if its in and out axes are to be flattened. None stands for
        `(*stack, in, out)`, or a convolution's `(*stack, *window, in, out)`.
      stack: number of stack axes.
      features: the order of the Flax layer's out features, where it differs.
      transposed: whether to return `(*stack, in, out)`.

    Example:
      >>> to_weight(np.ones((3, 3, 4, 8)), None, 0).shape
      (8, 4, 3, 3)
    """
    if axes is None:
        axes = _default_axes(kernel.ndim, stack)
        inputs = axes.inputs[-1:] + axes.inputs[:-1]  # torch has the window last
        weight = kernel.transpose(axes.stack + axes.outputs + inputs)
    else:
        shape = [kernel.shape[i] for i in axes.stack]
        outputs = int(np.prod([kernel.shape[i] for i in axes.outputs]))
        weight = kernel.transpose(axes.stack + axes.outputs + axes.inputs)
        weight = weight.reshape(*shape, outputs, -1)
    weight = to_hf_order(weight, features, stack)
    return weight.swapaxes(-1, -2) if transposed else weight


def from_weight(
    weight: Array,
    shape: tuple[int, ...],
    axes: KernelAxes | None,
    stack: int,
    features: Interleaved | None = None,
    transposed: bool = False,
) -> Array:
    """Returns the kernel of the given shape for a weight; undoes `to_weight`."""
    if transposed:
        weight = weight.swapaxes(-1, -2)
    weight = from_hf_order(weight, features, stack)
    if axes is None:
        axes = _default_axes(len(shape), stack)
        order = axes.stack + axes.outputs + axes.inputs[-1:] + axes.inputs[:-1]
    else:
        order = axes.stack + axes.outputs + axes.inputs
        weight = weight.reshape([shape[i] for i in order])
    return weight.transpose(np.argsort(order))
