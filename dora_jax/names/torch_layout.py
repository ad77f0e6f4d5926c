"""How torch lays out the weights of Hugging Face models, against a Flax layer's kernel."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import DoRAError

if TYPE_CHECKING:
    from jaxtyping import Shaped

    Array = np.ndarray[Any, Any]


class NameMapError(DoRAError):
    """A name map that is not one to one, or a module that it does not know."""


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """The order of features in a layer whose rotary embedding turns neighbours, `(2k, 2k + 1)`.

    Hugging Face's turns `(k, k + head_dim / 2)` ("half-rotated"), so that the out features of q and
    k stand in another order there: kernels, biases, `lora_b` and magnitudes are permuted.

    Attributes:
      head_dim: features of one head.
      rotary_dim: how many of them, the first ones, are turned; all if None.
    """

    head_dim: int
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        turned = self.rotary_dim or self.head_dim
        if turned % 2 or turned > self.head_dim or self.head_dim < 2:
            raise NameMapError(
                f"rotary features come in pairs, at most head_dim of them: got {self}"
            )

    def order(self, features: int) -> Shaped[Array, " features"]:
        """Returns the position in the Flax layer of each feature of Hugging Face's.

        Example:
          >>> Interleaved(head_dim=4).order(8).tolist()
          [0, 2, 1, 3, 4, 6, 5, 7]
        """
        if features % self.head_dim:
            raise NameMapError(f"{features} features are no heads of {self.head_dim}")
        turned = self.rotary_dim or self.head_dim
        head = np.r_[0:turned:2, 1:turned:2, turned : self.head_dim]
        return (np.arange(0, features, self.head_dim)[:, None] + head).ravel()


def to_hf_order(x: Array, features: Interleaved | None, axis: int = -1) -> Array:
    """Returns an array whose `axis` is of a Flax layer's out features in Hugging Face's order."""
    return x if features is None else np.take(x, features.order(x.shape[axis]), axis)


def from_hf_order(x: Array, features: Interleaved | None, axis: int = -1) -> Array:
    """Returns an array whose `axis` is of Hugging Face's out features in the Flax layer's order."""
    return x if features is None else np.take(x, np.argsort(features.order(x.shape[axis])), axis)


def _axes(ndim: int, stack: int) -> KernelAxes:
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
      kernel: of a Flax layer.
      axes: of a kernel whose in and out axes are flattened. None is `(in, out)`, or a
        convolution's `(*window, in, out)`, after the stack axes.
      stack: how many stack axes there are.
      features: the order of the out features, if it is another one.
      transposed: return `(*stack, in, out)`.

    Example:
      >>> to_weight(np.ones((3, 3, 4, 8)), None, 0).shape
      (8, 4, 3, 3)
    """
    if axes is None:
        axes = _axes(kernel.ndim, stack)
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
    """Returns the kernel, of that shape, that a weight stands for; undoes `to_weight`."""
    if transposed:
        weight = weight.swapaxes(-1, -2)
    weight = from_hf_order(weight, features, stack)
    if axes is None:
        axes = _axes(len(shape), stack)
        order = axes.stack + axes.outputs + axes.inputs[-1:] + axes.inputs[:-1]
    else:
        order = axes.stack + axes.outputs + axes.inputs
        weight = weight.reshape([shape[i] for i in order])
    return weight.transpose(np.argsort(order))
