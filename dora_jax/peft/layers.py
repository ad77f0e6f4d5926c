"""The adapted layers and the parameters of a model, the same for both front ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import linen, nnx

from dora_jax.errors import Path, layer_name
from dora_jax.layers.conv import ConvLayout
from dora_jax.layers.dense import EmbedLayout
from dora_jax.layers.layout import Layout
from dora_jax.model import adapter_shapes, model_layers
from dora_jax.names.name_map import HFModule, NameMap
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import Kind
from dora_jax.peft.tensors import Layer


def adapted_layers(model: Any, names: NameMap) -> dict[Path, Layer]:
    """Returns the adapted layers of an NNX model or a `DoRAModel`, by path.

    Raises:
      PeftError: PEFT has no form for a layer; names it.
    """
    layers = {}
    all_shapes = adapter_shapes(model)
    for path, layer in model_layers(model).items():
        shapes = {name: all_shapes[(*path, name)] for name in layer.settings.parameter_names}
        kind = _kind(path, layer.layout, layer.module)
        module = names.find(".".join(path))
        layers[path] = Layer(path, layer.settings, layer.axes, kind, module, shapes, layer.base)
    return layers


def hf_modules(
    parameters: Mapping[Path, Any], names: NameMap
) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Returns the Flax module and the index in its stack of every Hugging Face module.

    Modules that the map does not have are left out; so are those that hold no parameters.
    """
    shapes = {path[:-1]: np.shape(value) for path, value in parameters.items()}
    found = {}
    for path, shape in shapes.items():
        module = lookup(names, path)
        if module is None:
            continue
        stack = shape[: len(module.stacked)]
        for name, index in zip(module.names(stack), np.ndindex(*stack), strict=True):
            found[name] = (path, index)
    return found


def check_tied(
    layers: Iterable[Layer], names: NameMap, parameters: Mapping[Path, Any] | None
) -> None:
    """Raises `PeftError` for an adapted table that the model uses as its head, too.

    Here `Embed.attend` sees the adapter, in PEFT a tied head does not. A model is taken to be tied
    if it lacks the `lm_head` that the name map lists; where its parameters are not at hand, this
    warns.
    """
    tables = [layer_name(layer.path) for layer in layers if layer.kind == "embedding"]
    heads = {path for path in names.modules if path.rpartition(".")[2] == "lm_head"}
    if not (tables and heads):
        return
    effect = (
        f"{tables[0]}: PEFT adapts the lookup alone; a head that is tied to the table sees the "
        "adapter here, and would not there"
    )
    if parameters is None:
        warnings.warn(effect, stacklevel=3)
    elif not heads & {".".join(path[:-1]) for path in parameters}:
        raise PeftError(f"{effect}. The model has no lm_head of its own: leave the table out")


def lookup(names: NameMap, path: Path) -> HFModule | None:
    """Returns the Hugging Face module of a path, None where the map does not have it."""
    try:
        return names.find(".".join(path))
    except ValueError:
        return None


def _kind(path: Path, layout: Layout, layer: Any) -> Kind:
    """Returns which of PEFT's layers a layer is."""
    name = layer_name(path)
    if not path:
        raise PeftError(
            "the model is the adapted layer itself: put it into a module, as PEFT needs"
        )
    if not isinstance(layout, ConvLayout):
        return "embedding" if isinstance(layout, EmbedLayout) else "linear"
    if isinstance(layer, linen.ConvTranspose | nnx.ConvTranspose):
        raise PeftError(
            f"{name}: PEFT has no adapters for transposed convolutions. Merge it (dora.merge) and "
            "save the base, or leave it out of target_modules"
        )
    for field, effect in (
        ("feature_group_count", "splits the rank between groups"),
        ("kernel_dilation", "does not dilate lora_A"),
    ):
        value = getattr(layer, field, 1)
        if value is not None and np.any(np.asarray(value) != 1):
            raise PeftError(
                f"{name} has {field}={value}, for which PEFT {effect}: it would compute something "
                "else. Merge it (dora.merge) and save the base, or leave it out of target_modules"
            )
    return "conv"
