"""One module of a Hugging Face model, as a name map lists it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.names.placeholders import fill
from dora_jax.names.torch_layout import Interleaved, NameMapError, from_hf_order, to_hf_order

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class HFModule:
    """A Hugging Face module.

    Attributes:
      name: its dotted path, such as `"model.layers.{i}.self_attn.q_proj"`.
      features: the order of the Flax layer's out features, where it differs.
      transposed: whether its weight is `(in, out)`, as that of GPT-2's `Conv1D`, not `(out, in)`.
      stacked: placeholders in the name that are stack axes of the Flax layer, in axis order.
    """

    name: str
    features: Interleaved | None = None
    transposed: bool = False
    stacked: tuple[str, ...] = ()

    def names(self, stack: tuple[int, ...] = ()) -> list[str]:
        """Returns one name for each slice of the stack, in row-major order.

        Args:
          stack: the shape of the stack axes.

        Raises:
          NameMapError: the numbers of stack axes and of placeholders differ.

        Example:
          >>> HFModule("h.{i}.mlp", stacked=("i",)).names((2,))
          ['h.0.mlp', 'h.1.mlp']
        """
        if len(stack) != len(self.stacked):
            raise NameMapError(
                f"{self.name}: the Flax kernel has {len(stack)} stack axes, its name has "
                f"placeholders for {len(self.stacked)}. Write one for each in the name map: "
                "'layers.{i}.mlp': 'model.layers.{i}.mlp'"
            )
        indices = (dict(zip(self.stacked, index, strict=True)) for index in np.ndindex(*stack))
        return [fill(self.name, index) for index in indices]

    def to_hf_order(self, x: Array, axis: int = -1) -> Array:
        """Reorders the out features along `axis`, from the Flax layer's order to this module's."""
        return to_hf_order(x, self.features, axis)

    def from_hf_order(self, x: Array, axis: int = -1) -> Array:
        """Reorders the out features along `axis`, from this module's order to the Flax layer's."""
        return from_hf_order(x, self.features, axis)
