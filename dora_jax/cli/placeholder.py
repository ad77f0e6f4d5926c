"""A placeholder for a model: it has the shapes of an adapter's layers, and nothing else.

PEFT adapters are read into a model and written from one, for the axes of its kernels. Where there
are only folders, a placeholder is made from their contents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax.checkpoint.saved import SavedAdapters
from dora_jax.cli.base_weights import BaseWeights
from dora_jax.cli.folders import kernel_axes, layer_arrays
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import Plain, abstract, adapt, with_base_records
from dora_jax.names.hf_module import HFModule
from dora_jax.names.name_map import NameMap
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import Kind, ModuleTensors

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# The names of embedding tables in Hugging Face models. PEFT has keys of their own for them.
_EMBEDDINGS = {
    *("embed_tokens", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    *("wte", "wpe", "shared", "tok_embeddings", "embed_positions"),
}


class Container(nnx.Module):
    """A module that only holds others."""


def adapted_placeholder(
    saved: SavedAdapters, names: NameMap, base: BaseWeights | None
) -> nnx.Module:
    """Returns an adapted placeholder for the model of the adapters in an Orbax folder."""
    layers, others = layer_arrays(saved)
    model = Container()
    for path, arrays in layers.items():
        _put(model, path, _layer_of_arrays(saved, path, arrays, names.find(".".join(path)), base))
    for path, x in others.items():
        _put(model, path, nnx.Param(abstract(x)))
    # Layers are listed by name, so the other selection fields are reset.
    config = saved.config.to_dict() | {
        "target_modules": [".".join(path) for path in layers],
        "exclude_modules": [],
    }
    if not any(saved.config.layer_settings(path).indices for path in layers):  # no stack
        config |= {"layers_to_transform": None, "layers_pattern": None}
    adapted, _ = adapt(model, DoRAConfig(**config), Plain())
    return with_base_records(adapted, saved.base) if saved.base else adapted


def plain_placeholder(
    adapters: Mapping[str, ModuleTensors],
    others: Mapping[str, Array],
    names: NameMap,
    base: BaseWeights | None,
) -> nnx.Module:
    """Returns a placeholder, not adapted, for the model of the adapter in a PEFT folder.

    Its kernels are the base's, or abstract without one. Layers are numbered, not stacked.
    """
    model = Container()
    for module, adapter in adapters.items():
        path = _path(names, module)
        _put(model, path, _layer_of_tensors(path, adapter, names, base))
    for name, x in others.items():
        module, _, parameter = name.rpartition(".")
        if module.endswith(".base_layer"):
            continue
        kind = _flax_name(module, parameter, x)
        shape = x.shape[::-1] if kind == "kernel" and x.ndim == 2 else x.shape
        _put(model, (*_path(names, module), kind), nnx.Param(jnp.zeros(shape, x.dtype)))
    if base is not None and "lm_head.weight" in base.tensors and not hasattr(model, "lm_head"):
        # So that the embedding does not count as the head too.
        shape = base.shape("lm_head.weight")[::-1]
        _put(model, ("lm_head", "kernel"), nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32)))
    return model


def _layer_of_arrays(
    saved: SavedAdapters,
    path: Path,
    arrays: Mapping[str, Array],
    module: HFModule,
    base: BaseWeights | None,
) -> nnx.Module:
    """Returns an abstract layer for the arrays of an adapter."""
    if "lora_a" not in arrays:
        raise PeftError(
            f"{layer_name(path)} trains the magnitude alone, which PEFT cannot represent: merge it "
            "(dora.merge) and save the base"
        )
    a, b = arrays["lora_a"].shape, arrays["lora_b"].shape
    stack = len(kernel_axes(saved, path, arrays).stack)
    if stack != len(module.stacked):
        raise AdapterError(
            f"{layer_name(path)}: the adapter has {stack} stack axes, the name map "
            f"{len(module.stacked)}: correct its placeholders"
        )
    inputs, outputs = a[stack:-1], b[stack + 1 :]
    weight = None if base is None else base.shape(f"{module.names(a[:stack])[0]}.weight")
    kind = _kind(path, module, (inputs, outputs), weight)
    kernel = jax.ShapeDtypeStruct((*a[:stack], *inputs, *outputs), jnp.float32)
    return _layer(kind, kernel, len(inputs), len(outputs))


def _kind(
    path: Path,
    module: HFModule,
    features: tuple[tuple[int, ...], tuple[int, ...]],
    weight: tuple[int, ...] | None,
) -> Kind:
    """Returns which of PEFT's layers a layer is.

    Args:
      path: of the layer.
      module: the Hugging Face module.
      features: the shapes of the kernel's in and out axes.
      weight: the shape of the base's weight; None without a base.
    """
    inputs, outputs = features
    is_table = module.name.rpartition(".")[2] in _EMBEDDINGS
    if weight is None:
        if len(inputs) > 1:
            raise PeftError(
                f"{layer_name(path)} has several in axes: pass --base, which tells a convolution "
                "from a dense layer"
            )
        return "embedding" if is_table else "linear"
    if len(weight) > 2:
        return "conv"
    sizes = math.prod(inputs), math.prod(outputs)
    if module.transposed:
        sizes = sizes[::-1]
    if weight == sizes[::-1] and (sizes[0] != sizes[1] or not is_table):
        return "linear"
    if weight == sizes:
        return "embedding"
    raise AdapterError(
        f"{layer_name(path)}: the adapter is of a kernel {inputs} to {outputs}, "
        f"{module.name}.weight of the base has shape {weight}: is it the base that the adapter was "
        "trained for?"
    )


def _layer_of_tensors(
    path: Path, adapter: ModuleTensors, names: NameMap, base: BaseWeights | None
) -> nnx.Module:
    """Returns the layer for a PEFT adapter of one module, with the base's kernel."""
    a, b = adapter.arrays["lora_a"], adapter.arrays["lora_b"]
    shape = (*a.shape[2:], a.shape[1], b.shape[0])
    kernel: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    if base is not None:
        parameter = "embedding" if adapter.kind == "embedding" else "kernel"
        kernel = jnp.asarray(names.from_hf(".".join((*path, parameter)), shape, base.read))
    return _layer(adapter.kind, kernel, len(shape) - 1, 1)


def _layer(kind: Kind, kernel: Any, inputs: int, outputs: int) -> nnx.Module:
    """Returns a Flax layer with a kernel of so many in and out axes, after its stack axes."""
    sizes = kernel.shape[-inputs - outputs :]
    make: Callable[..., nnx.Module]
    if kind == "embedding":
        make = functools.partial(nnx.Embed, *sizes)
    elif kind == "conv":
        *window, features, out = sizes
        make = functools.partial(nnx.Conv, features, out, tuple(window), use_bias=False)
    else:
        axis = tuple(range(-inputs, 0))
        make = functools.partial(
            nnx.LinearGeneral, sizes[:inputs], sizes[inputs:], axis=axis, use_bias=False
        )
    layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    setattr(layer, "embedding" if kind == "embedding" else "kernel", nnx.Param(kernel))
    return layer


def _path(names: NameMap, module: str) -> Path:
    """Returns the path of the Flax module for a Hugging Face module."""
    path = names.path(module)
    if path is None:
        raise PeftError(
            f"the name map does not have {module}: give another one with --names, or the prefix of "
            "its names with --hf-prefix"
        )
    return tuple(path.split("."))


def _flax_name(module: str, parameter: str, x: Array) -> str:
    """Returns the name that a parameter of a Hugging Face module has in a Flax layer."""
    if parameter != "weight":
        return parameter
    if module.rpartition(".")[2] in _EMBEDDINGS:
        return "embedding"
    return "kernel" if x.ndim > 1 else "scale"


def _put(model: nnx.Module, path: Path, value: Any) -> None:
    """Puts a module or a parameter into a model, and containers on the way there."""
    for key in path[:-1]:
        if not hasattr(model, key):
            setattr(model, key, Container())
        model = getattr(model, key)
    setattr(model, path[-1], value)
