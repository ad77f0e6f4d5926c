"""The adapted layers of a model as PEFT has them, and their arrays as PEFT's tensors.

| layer | A | B | `lora_magnitude_vector` |
|---|---|---|---|
| linear | `lora_A.weight (r, in)` | `lora_B.weight (out, r)` | `(out,)` |
| conv | `lora_A.weight (r, in, *window)` | `lora_B.weight (out, r, 1, ...)` | `(1, out, 1, ...)` |
| embedding | `lora_embedding_A (r, vocab)` | `lora_embedding_B (dim, r)` | `(dim,)` |

Several in or out axes are flattened. A stack has one adapter for each slice.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import linen, nnx

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import Path, layer_name
from dora_jax.layers.conv import ConvLayout
from dora_jax.layers.dense import EmbedLayout
from dora_jax.model import AdaptedModel, ModelLayer, adapter_shapes, model_layers
from dora_jax.names.hf_module import HFModule
from dora_jax.names.name_map import NameMap
from dora_jax.names.torch_layout import NameMapError, converted_shape
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import PARTS, Kind, ModuleTensors, tensor_key

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# The path and the index in its stack of each module of a model, by its Hugging Face name.
Modules = Mapping[str, tuple[Path, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapted layer of a model, and the Hugging Face module that it is.

    Attributes:
      path: of its module in the Flax model.
      settings: the layer's settings.
      axes: of the stored kernel.
      kind: which of PEFT's layers it is.
      module: the Hugging Face module.
      shapes: of the adapter's arrays, by name.
      base: what the layer keeps of its frozen kernel.
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
        """The shape of the stack axes."""
        return next(iter(self.shapes.values()))[: len(self.axes.stack)]

    def slices(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Returns the Hugging Face name and the index of every slice that is adapted."""
        names = self.module.names(self.stack)
        for name, index in zip(names, np.ndindex(*self.stack), strict=True):
            if not index or self.settings.adapts(index[0], self.stack[0]):
                yield name, index


def adapted_layers(model: AdaptedModel, names: NameMap) -> dict[Path, Layer]:
    """Returns the adapted layers of a model of either front end, by path.

    Raises:
      PeftError: PEFT cannot represent a layer; names it.
    """
    layers = {}
    all_shapes = adapter_shapes(model)
    for path, layer in model_layers(model).items():
        shapes = {name: all_shapes[(*path, name)] for name in layer.settings.parameter_names}
        kind, module = _kind(layer), names.find(".".join(path))
        layers[path] = Layer(path, layer.settings, layer.axes, kind, module, shapes, layer.base)
    return layers


def hf_modules(parameters: Mapping[Path, Any], names: NameMap) -> Modules:
    """Returns the modules of a model that hold parameters and that the map lists.

    Args:
      parameters: the model's parameters by path.
      names: which Hugging Face module each module is.
    """
    shapes = {path[:-1]: np.shape(value) for path, value in parameters.items()}
    found = {}
    for path, shape in shapes.items():
        try:
            module = names.find(".".join(path))
        except NameMapError:
            continue
        stack = shape[: len(module.stacked)]
        for name, index in zip(module.names(stack), np.ndindex(*stack), strict=True):
            found[name] = (path, index)
    return found


def check_tied(
    layers: Iterable[Layer], names: NameMap, parameters: Mapping[Path, Any] | None
) -> None:
    """Raises `PeftError` for an adapted embedding that the model also uses as its head.

    Here `Embed.attend` uses the adapter. In PEFT a tied head does not. A model counts as tied if it
    lacks the `lm_head` that the name map lists. If its parameters are not known, this warns.
    """
    tables = [layer_name(layer.path) for layer in layers if layer.kind == "embedding"]
    heads = {path for path in names.modules if path.rpartition(".")[2] == "lm_head"}
    if not (tables and heads):
        return
    effect = (
        f"{tables[0]}: PEFT adapts the lookup alone. A head that is tied to the table uses the "
        "adapter here, but not in PEFT"
    )
    if parameters is None:
        warnings.warn(effect, stacklevel=3)
    elif not heads & {".".join(path[:-1]) for path in parameters}:
        raise PeftError(
            f"{effect}. The model has no lm_head of its own: leave the table out of target_modules"
        )


def to_tensors(layer: Layer, adapter: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the adapter of one layer as PEFT's tensors, by key."""
    tensors = {}
    for name, index in layer.slices():
        for array, x in adapter.items():
            key = tensor_key(name, PARTS[layer.kind][array])
            tensors[key] = _to_tensor(layer, array, np.asarray(x)[index])
    return tensors


def from_tensors(layer: Layer, adapters: Mapping[str, ModuleTensors]) -> dict[str, Array]:
    """Returns the adapter of one layer; undoes `to_tensors`.

    Slices of a stack that are not adapted are zero, since nothing uses them.

    Args:
      layer: the layer.
      adapters: PEFT's tensors of each of its slices, by module.

    Raises:
      PeftError: a tensor is missing or has another shape; names the key.
    """
    arrays = {}
    for array, shape in layer.shapes.items():
        slices = {}
        for name, index in layer.slices():
            part = PARTS[layer.kind][array]
            key, parts = tensor_key(name, part), adapters[name].parts
            if part not in parts:
                raise PeftError(
                    f"{key} is missing, although the layer is {layer.kind} here: fetch the file "
                    "again, or read it into the model it was made for"
                )
            slices[index] = _from_tensor(layer, key, array, parts[part])
        whole = np.zeros(shape, np.result_type(*slices.values()))
        for index, x in slices.items():
            whole[index] = x
        arrays[array] = whole
    return arrays


def _to_tensor(layer: Layer, array: str, x: Array) -> Array:
    """Returns one array of one slice, `(*in, r)`, `(r, *out)` or `(*out,)`, as a tensor."""
    window = len(layer.axes.inputs) - 1 if layer.kind == "conv" else 0
    if array == "lora_a":
        if layer.kind == "conv":
            return x.transpose(-1, -2, *range(window))
        return x.reshape(-1, x.shape[-1]).T
    if array == "lora_b":
        x = layer.module.to_hf_order(x.reshape(x.shape[0], -1)).T
        return x.reshape(*x.shape, *(1,) * window)
    x = layer.module.to_hf_order(x.reshape(-1))
    return x.reshape(1, -1, *(1,) * window) if layer.kind == "conv" else x


def _from_tensor(layer: Layer, key: str, array: str, tensor: Array) -> Array:
    """Returns one array of one slice; undoes `_to_tensor`, and checks the shape."""
    shape = layer.shapes[array][len(layer.axes.stack) :]
    wanted = converted_shape(functools.partial(_to_tensor, layer, array), shape)
    if tensor.shape != wanted:
        raise PeftError(
            f"{key} has shape {tensor.shape}, the model needs {wanted}: is it the base that the "
            "adapter was made for?"
        )
    if array == "lora_a":
        if layer.kind == "conv":
            return tensor.transpose(*range(2, tensor.ndim), 1, 0)
        return tensor.T.reshape(shape)
    if array == "lora_b":
        x = tensor.reshape(tensor.shape[:2]).T
        return layer.module.from_hf_order(x).reshape(shape)
    return layer.module.from_hf_order(tensor.reshape(-1)).reshape(shape)


def _kind(layer: ModelLayer) -> Kind:
    """Returns which of PEFT's layers a layer is.

    Raises:
      PeftError: it is none of them.
    """
    name = layer_name(layer.path)
    if not layer.path:
        raise PeftError(
            "the model is the adapted layer itself: put it into a module, as PEFT needs"
        )
    if not isinstance(layer.layout, ConvLayout):
        return "embedding" if isinstance(layer.layout, EmbedLayout) else "linear"
    merging = "Merge it (dora.merge) and save the base, or leave it out of target_modules"
    if issubclass(layer.layer_class, linen.ConvTranspose | nnx.ConvTranspose):
        raise PeftError(f"{name}: PEFT has no adapters for transposed convolutions. {merging}")
    for field, effect in (
        ("feature_group_count", "splits the rank between groups"),
        ("kernel_dilation", "does not dilate lora_A"),
    ):
        value = getattr(layer.module, field, 1)
        if value is not None and np.any(np.asarray(value) != 1):
            raise PeftError(
                f"{name} has {field}={value}, for which PEFT {effect}: it would compute something "
                f"else. {merging}"
            )
    return "conv"
