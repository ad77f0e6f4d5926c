"""A model that has the shapes of an adapter's layers and nothing else.

Reading and writing PEFT adapters asks a model for its kernels' axes. Where only folders are at
hand, these are made of what the folders say.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax import nnx as dora_nnx
from dora_jax.checkpoint.adapters import SavedAdapters
from dora_jax.cli.base_weights import Base
from dora_jax.cli.folders import stack_axes
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import with_base_records
from dora_jax.names.name_map import NameMap
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import PREFIX

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Embedding tables in the models of Hugging Face, whose adapters have keys of their own in PEFT.
_EMBEDDINGS = {
    *("embed_tokens", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    *("wte", "wpe", "shared", "tok_embeddings", "embed_positions"),
}


class Part(nnx.Module):
    """A module that only holds others."""


def of_saved(saved: SavedAdapters, names: NameMap, base: Base | None) -> nnx.Module:
    """Returns an adapted stand-in for the model of which an Orbax folder holds the adapters."""
    tree = Part()
    targets: list[str] = []
    arrays: dict[Path, dict[str, Any]] = collections.defaultdict(dict)
    for path, x in _leaves(saved.adapters):
        arrays[path[:-1]][path[-1]] = x
    for path, own in sorted(arrays.items()):
        if {"lora_a", "lora_b", "magnitude"} & own.keys():
            _put(tree, path, _layer_of(path, own, saved, names, base))
            targets.append(".".join(path))
        else:
            _put(tree, path, _parameters({name: _abstract(x) for name, x in own.items()}))
    # Of the patterns only those count that the layers which are there have settled.
    config = saved.config.to_dict() | {
        "target_modules": targets,
        "exclude_modules": [],
        "layers_pattern": saved.config.layers_pattern,
    }
    adapted = dora_nnx.apply_dora(tree, DoRAConfig(**config), rngs=nnx.Rngs(0))
    return with_base_records(adapted, saved.base) if saved.base else adapted


def of_peft(tensors: Mapping[str, Array], names: NameMap, base: Base | None) -> nnx.Module:
    """Returns a stand-in, not adapted, for the model of which a PEFT folder holds an adapter.

    Its kernels are the base's, or abstract without one. Layers are numbered, not stacked.
    """
    tree = Part()
    parameters: dict[Path, dict[str, Any]] = collections.defaultdict(dict)
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            module = name.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            _put(tree, _path(names, module), _layer_of_tensors(module, name, tensors, names, base))
        elif ".lora_" not in name and ".base_layer." not in name:
            module, _, parameter = name.rpartition(".")
            kind = _flax_name(module, parameter, x)
            shape = x.shape[::-1] if kind == "kernel" and x.ndim == 2 else x.shape
            parameters[_path(names, module)][kind] = jnp.zeros(shape, x.dtype)
    for path, own in parameters.items():
        _put(tree, path, _parameters(own))
    if base is not None and "lm_head.weight" in base.tensors and not hasattr(tree, "lm_head"):
        # So that a table is not taken for a head's too.
        shape = base.shape("lm_head.weight")[::-1]
        _put(tree, ("lm_head",), _parameters({"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}))
    return tree


def _layer_of(
    path: Path, own: Mapping[str, Any], saved: SavedAdapters, names: NameMap, base: Base | None
) -> nnx.Module:
    if "lora_a" not in own:
        raise PeftError(
            f"{layer_name(path)} trains the magnitude alone, which PEFT has no form for: merge it "
            "(dora.merge) and save the base"
        )
    module = names.find(".".join(path))
    a, b, stack = own["lora_a"].shape, own["lora_b"].shape, len(module.stacked)
    known = stack_axes(saved, path)
    if known is not None and known != stack:
        raise AdapterError(
            f"{layer_name(path)}: the adapter has {known} stack axes, the name map {stack}"
        )
    inputs, outputs = a[stack:-1], b[stack + 1 :]
    weight = None if base is None else base.shape(f"{module.names(a[:stack])[0]}.weight")
    kind = _kind(path, module.name, module.transposed, inputs, outputs, weight)
    kernel = jax.ShapeDtypeStruct((*a[:stack], *inputs, *outputs), jnp.float32)
    return _layer(kind, kernel, len(inputs), len(outputs))


def _kind(
    path: Path,
    name: str,
    transposed: bool,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    weight: tuple[int, ...] | None,
) -> str:
    """Returns "linear", "embedding" or "conv", from the base's weight if there is one."""
    sizes = math.prod(inputs), math.prod(outputs)
    if weight is None:
        if len(inputs) > 1:
            raise PeftError(
                f"{layer_name(path)} has several in axes: pass --base, which tells a convolution "
                "from a dense layer"
            )
        return "embedding" if name.rpartition(".")[2] in _EMBEDDINGS else "linear"
    if len(weight) > 2:
        return "conv"
    if transposed:
        sizes = sizes[::-1]
    if weight == sizes[::-1] and (sizes[0] != sizes[1] or not _is_table(name)):
        return "linear"
    if weight == sizes:
        return "embedding"
    raise AdapterError(
        f"{layer_name(path)}: the adapter is of a kernel {inputs} to {outputs}, {name}.weight of "
        f"the base has shape {weight}: is it the base that the adapter was trained for?"
    )


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in _EMBEDDINGS


def _layer_of_tensors(
    module: str, key: str, tensors: Mapping[str, Array], names: NameMap, base: Base | None
) -> nnx.Module:
    """Returns the layer for PEFT's tensors of one module, with the base's kernel."""
    a = tensors[PREFIX + key]
    embedding = key.endswith("lora_embedding_A")
    b_key = PREFIX + module + (".lora_embedding_B" if embedding else ".lora_B.weight")
    if b_key not in tensors:
        raise PeftError(f"{b_key} is missing: fetch the file again")
    b = tensors[b_key]
    kind = "embedding" if embedding else "conv" if a.ndim > 2 else "linear"
    shape = (*a.shape[2:], *a.shape[1:2], b.shape[0])
    kernel: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    if base is not None:
        parameter = "embedding" if embedding else "kernel"
        path = ".".join(_path(names, module))
        kernel = jnp.asarray(names.from_hf(f"{path}.{parameter}", shape, base.read))
    return _layer(kind, kernel, len(shape) - 1, 1)


def _layer(kind: str, kernel: Any, inputs: int, outputs: int) -> nnx.Module:
    """Returns a Flax layer around a kernel."""
    if kind == "embedding":
        rows, features = kernel.shape[-2:]
        table = nnx.eval_shape(lambda: nnx.Embed(rows, features, rngs=nnx.Rngs(0)))
        table.embedding = nnx.Param(kernel)
        return table
    if kind == "conv":
        *window, features, out = kernel.shape
        conv = nnx.eval_shape(
            lambda: nnx.Conv(features, out, tuple(window), use_bias=False, rngs=nnx.Rngs(0))
        )
        conv.kernel = nnx.Param(kernel)
        return conv
    if inputs == outputs == 1:
        features, out = kernel.shape[-2:]
        linear = nnx.eval_shape(lambda: nnx.Linear(features, out, use_bias=False, rngs=nnx.Rngs(0)))
        linear.kernel = nnx.Param(kernel)
        return linear
    sizes = kernel.shape[-inputs - outputs :]
    general = nnx.eval_shape(
        lambda: nnx.LinearGeneral(
            sizes[:inputs],
            sizes[inputs:],
            axis=tuple(range(-inputs, 0)),
            use_bias=False,
            rngs=nnx.Rngs(0),
        )
    )
    general.kernel = nnx.Param(kernel)
    return general


def _path(names: NameMap, module: str) -> Path:
    path = names.path(module)
    if path is None:
        raise PeftError(
            f"the name map does not have {module}: give another with --names, or what stands "
            "before its names with --hf-prefix"
        )
    return tuple(path.split("."))


def _flax_name(module: str, parameter: str, x: Array) -> str:
    if parameter == "weight":
        if _is_table(module):
            return "embedding"
        return "kernel" if x.ndim > 1 else "scale"
    return parameter


def _parameters(values: Mapping[str, Any]) -> nnx.Module:
    part = Part()
    for name, value in values.items():
        setattr(part, name, nnx.Param(value))
    return part


def _put(tree: nnx.Module, path: Path, module: nnx.Module) -> None:
    for key in path[:-1]:
        if not hasattr(tree, key):
            setattr(tree, key, Part())
        tree = getattr(tree, key)
    setattr(tree, path[-1], module)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype)


def _leaves(tree: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(key.key for key in path), leaf) for path, leaf in flat]
