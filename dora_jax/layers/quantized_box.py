"""The box in which Linen's parameters hold a quantised kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import struct
from flax.core import meta

from dora_jax.decomposition.quantized import QuantizedKernel, abstract_dense

if TYPE_CHECKING:
    from jaxtyping import Array


@struct.dataclass
class QuantizedBox(meta.AxisMetadata):
    """A box around a quantised kernel, which Flax unboxes where a module asks for its parameter.

    So every module sees an array, dequantised for its own call, and a scan takes a layer's part of
    the codes and scales first.

    Attributes:
      value: the quantised kernel.
    """

    value: QuantizedKernel

    def unbox(self) -> Array:
        """Returns the dequantised kernel."""
        return self.value.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        """Returns a quantised kernel in its box, anything else as it is."""
        return QuantizedBox(val) if isinstance(val, QuantizedKernel) else val

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedBox:
        """Returns the box as it is: each array inside has the axis at that place."""
        return self

    add_axis = remove_axis


def has_quantized(tree: Any) -> bool:
    """Returns whether a tree holds a quantised kernel, in a box or not."""
    kinds = (QuantizedBox, QuantizedKernel)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in leaves)


def abstract_boxes(params: Any) -> Any:
    """Returns parameters with the shape of a dequantised kernel in place of each box."""
    return jax.tree.map(
        lambda x: abstract_dense(x.value) if isinstance(x, QuantizedBox) else x,
        params,
        is_leaf=lambda x: isinstance(x, QuantizedBox),
    )
