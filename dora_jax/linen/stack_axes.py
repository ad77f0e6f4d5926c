"""Where Linen's lifted transforms stack parameters: `variable_axes={"params": 1}` and the like.

`nn.scan` and `nn.vmap` take the axis at one position from every parameter alike. An adapter has
other axes than its kernel. It is laid out so that each stack axis stands at the same position as in
the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import struct
from flax.core import meta

from dora_jax.decomposition.axes import KernelAxes

if TYPE_CHECKING:
    from jaxtyping import Array


@struct.dataclass
class PositionBox(meta.AxisMetadata):
    """A box around a parameter that records the positions at which transforms took axes from it.

    Attributes:
      value: the parameter, which may be boxed itself.
      positions: the positions, the outermost transform's first.
    """

    value: Any
    positions: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        """Returns the parameter."""
        return self.value

    def replace_boxed(self, val: Any) -> PositionBox:
        """Returns a box of the same positions around another value."""
        return PositionBox(val, self.positions)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> PositionBox:
        """Keeps the position."""
        value = meta.remove_axis(self.value, index, params)
        return PositionBox(value, (*self.positions, index))

    def add_axis(self, index: int, params: dict[Any, Any]) -> PositionBox:
        """Forgets the position that was kept last."""
        return PositionBox(meta.add_axis(self.value, index, params), self.positions[:-1])


def is_in_front(stored: Sequence[int], seen: Sequence[int]) -> bool:
    """Returns whether the shapes show that all stack axes stand in front of what a layer sees.

    Example:
      >>> is_in_front((3, 4, 5), (4, 5)), is_in_front((3, 4, 4), (4, 4))
      (True, True)
      >>> is_in_front((4, 3, 5), (4, 5)), is_in_front((4, 4, 5), (4, 5))  # the latter may be
      (False, False)
    """
    ways = itertools.combinations(range(len(stored)), len(seen))
    fitting = [way for way in ways if [stored[i] for i in way] == list(seen)]
    return fitting == [tuple(range(len(stored) - len(seen), len(stored)))]


def axes_of_stack(call_axes: KernelAxes, positions: Sequence[int]) -> KernelAxes:
    """Returns the axes of a stored kernel from those that a call sees; its stack axes in order.

    Example:
      >>> axes_of_stack(KernelAxes((), (0,), (1,)), [1])
      KernelAxes(stack=(1,), inputs=(0,), outputs=(2,))
    """
    taken, remaining = _take(positions, call_axes.ndim)
    stack, inputs, outputs = (tuple(remaining[i] for i in group) for group in call_axes)
    return KernelAxes((*sorted(taken), *stack), inputs, outputs)


def _take(positions: Sequence[int], call_ndim: int) -> tuple[list[int], list[int]]:
    """Returns which axes of a stored kernel the transforms take, in turn, and which they leave."""
    remaining = list(range(call_ndim + len(positions)))
    return [remaining.pop(position) for position in positions], remaining


@struct.dataclass
class Padded(meta.AxisMetadata):
    """A box around an array with leading axes of size 1, which unboxing takes off.

    Attributes:
      value: the array.
      ndim: the number of its axes without them, once transforms have taken the stack axes.
    """

    value: Any
    ndim: int = struct.field(pytree_node=False, default=0)

    def unbox(self) -> Any:
        """Returns the array without its leading axes of size 1."""
        return self.value.reshape(self.value.shape[self.value.ndim - self.ndim :])

    def replace_boxed(self, val: Any) -> Padded:
        """Returns the box around another value."""
        return Padded(val, self.ndim)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Padded:
        """Returns the box as it is: it counts no stack axes."""
        return self

    add_axis = remove_axis


def stack_at(x: Array, positions: Sequence[int], call_ndim: int) -> Padded:
    """Moves an adapter's stack axes to where the kernel has them.

    `x` starts with the stack axes, in the kernel's order. It is padded with axes of size 1, so that
    the positions of the kernel's `variable_axes` are valid for it too.

    Example:
      >>> magnitude = jnp.ones((3, 5))  # of a kernel (in, 3, 5)
      >>> stack_at(magnitude, [1], 2).value.shape
      (1, 3, 5)
    """
    stack, rest = x.shape[: len(positions)], x.shape[len(positions) :]
    x = x.reshape(stack + (1,) * (call_ndim - len(rest)) + rest)
    order = list(range(len(stack), x.ndim))
    taken, _ = _take(positions, call_ndim)
    for position, axis in reversed(list(zip(positions, taken, strict=True))):
        order.insert(position % (len(order) + 1), sorted(taken).index(axis))
    return Padded(jnp.transpose(x, order), len(rest))
