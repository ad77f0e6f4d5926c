"""One layer's adapter as PEFT's tensors, and back.

| layer | A | B | `lora_magnitude_vector` |
|---|---|---|---|
| linear | `lora_A.weight (r, in)` | `lora_B.weight (out, r)` | `(out,)` |
| conv | `lora_A.weight (r, in, *window)` | `lora_B.weight (out, r, 1, ...)` | `(1, out, 1, ...)` |
| embedding | `lora_embedding_A (r, vocab)` | `lora_embedding_B (dim, r)` | `(dim,)` |

Several in or out axes are flattened; a stack is one layer for each slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import Path
from dora_jax.names.name_map import HFModule
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import KEYS, PREFIX, Kind

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapted layer, as both front ends describe it.

    Attributes:
      path: module path.
      settings: its settings.
      axes: of the stored kernel.
      kind: which of PEFT's layers it is.
      module: the Hugging Face module.
      shapes: of its arrays, by name.
      base: what the layer keeps of its frozen kernel, see `dora_jax.decomposition.describe_base`.
    """

    path: Path
    settings: LayerSettings
    axes: KernelAxes
    kind: Kind
    module: HFModule
    shapes: Mapping[str, tuple[int, ...]]
    base: FrozenBase

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack."""
        return next(iter(self.shapes.values()))[: len(self.axes.stack)]

    def slices(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Returns the Hugging Face name and the index of every slice that is adapted."""
        names = self.module.names(self.stack)
        for name, index in zip(names, np.ndindex(*self.stack), strict=True):
            if self.settings.indices is None or index[0] in self.settings.indices:
                yield name, index


def to_tensors(layer: Layer, adapter: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the adapter of one layer as PEFT's tensors, by key."""
    tensors = {}
    for name, index in layer.slices():
        for parameter, x in adapter.items():
            key = f"{PREFIX}{name}.{KEYS[layer.kind][parameter]}"
            tensors[key] = _to_tensor(layer, parameter, np.asarray(x)[index])
    return tensors


def from_tensors(layer: Layer, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the adapter of one layer; undoes `to_tensors`.

    Slices of a stack that are not adapted hold zeros, which do not act.

    Raises:
      PeftError: a tensor is missing or has another shape; names the key.
    """
    adapter = {}
    for parameter, shape in layer.shapes.items():
        slices = {}
        for name, index in layer.slices():
            key = f"{PREFIX}{name}.{KEYS[layer.kind][parameter]}"
            if key not in tensors:
                raise PeftError(
                    f"{key} is missing, although the layer is {layer.kind} here: fetch the file "
                    "again, or read it into the model it was made for"
                )
            slices[index] = _from_tensor(layer, key, parameter, tensors[key])
        array = np.zeros(shape, np.result_type(*slices.values()))
        for index, x in slices.items():
            array[index] = x
        adapter[parameter] = array
    return adapter


def _to_tensor(layer: Layer, parameter: str, x: Array) -> Array:
    """Returns one array of one slice, of shape `(*in, r)`, `(r, *out)` or `(*out,)`."""
    window = len(layer.axes.inputs) - 1 if layer.kind == "conv" else 0
    if parameter == "lora_a":
        if layer.kind == "conv":
            return x.transpose(-1, -2, *range(window))
        return x.reshape(-1, x.shape[-1]).T
    if parameter == "lora_b":
        x = layer.module.to_hf_order(x.reshape(x.shape[0], -1)).T
        return x.reshape(*x.shape, *(1,) * window)
    x = layer.module.to_hf_order(x.reshape(-1))
    return x.reshape(1, -1, *(1,) * window) if layer.kind == "conv" else x


def _from_tensor(layer: Layer, key: str, parameter: str, tensor: Array) -> Array:
    """Undoes `_to_tensor`, after a look at the shape."""
    shape = layer.shapes[parameter][len(layer.axes.stack) :]
    # What the layer's own array would become says which shape the tensor has.
    wanted = _to_tensor(layer, parameter, np.broadcast_to(np.empty(()), shape)).shape
    if tensor.shape != wanted:
        raise PeftError(
            f"{key} has shape {tensor.shape}, the model needs {wanted}: is it the base that the "
            "adapter was made for?"
        )
    if parameter == "lora_a":
        if layer.kind == "conv":
            return tensor.transpose(*range(2, tensor.ndim), 1, 0)
        return tensor.T.reshape(shape)
    if parameter == "lora_b":
        x = tensor.reshape(tensor.shape[:2]).T
        return layer.module.from_hf_order(x).reshape(shape)
    return layer.module.from_hf_order(tensor.reshape(-1)).reshape(shape)
