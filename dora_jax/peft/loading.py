"""PEFT adapter folders to adapted Flax models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.trees import check_shapes, tree_shapes
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import abstract, base_parameters
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import PREFIX
from dora_jax.peft.layers import adapted_layers, check_tied, hf_modules
from dora_jax.peft.parsing import saved_parameters, split_tensors
from dora_jax.peft.settings import dora_config
from dora_jax.peft.tensors import Layer, from_tensors


def load_pretrained(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    adapter_name: str = "default",
    unused: Sequence[str] = (),
    verify: bool = True,
    rngs: nnx.Rngs | None = None,
    **arguments: Any,
) -> Any:
    """Returns a model adapted with what a PEFT adapter folder holds.

    The outputs are those that PEFT computes. The gradient through the norm is the detached one, as
    in PEFT. Adapters are float32, whatever the file's dtype (float64 if that is).

    Args:
      model: an NNX model, or a Linen module; not adapted.
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      names: which Hugging Face module each module of the model is, such as `dora_jax.names.LLAMA`.
      adapter_name: PEFT keeps an adapter of another name than "default" in a folder inside.
      unused: Hugging Face modules that the model does without, and whose adapters are left out.
      verify: whether the digest that `save_pretrained` wrote has to fit.
      rngs: of an NNX model: serves the adapters' dropout.
      **arguments: what else `apply_dora` takes: of a Linen module, `params` and `inputs`.

    Returns:
      An adapted NNX model; or a `DoRAModel` and its adapter tree.

    Raises:
      PeftError: a file is damaged or not PEFT's, a setting is not implemented, or the adapter is of
        another model; names the file, field or tensor, and the mend.

    Example:
      >>> import tempfile, dora_jax as dora
      >>> from dora_jax.names import IDENTITY
      >>> from dora_jax.peft import save_pretrained
      >>> base = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> model = dora.apply_dora(base, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_pretrained(model, folder, IDENTITY)
      ...     again = load_pretrained(base, folder, IDENTITY)
      >>> dora.adapters.diff(dora.get_adapters(model), dora.get_adapters(again))["layers.0.lora_a"]
      0.0
    """
    adapters, config = read_adapters(
        model,
        folder,
        names,
        adapter_name=adapter_name,
        unused=unused,
        verify=verify,
        **arguments,
    )
    if config.adapter_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise PeftError(
            "the adapter is in float64, which JAX has after jax.config.update('jax_enable_x64', "
            "True) alone. Without it, cast what read_adapters returns"
        )
    if isinstance(model, nnx.Module):
        model = dora_nnx.apply_dora(model, config, rngs=rngs or nnx.Rngs(0), **arguments)
        dora_nnx.set_adapters(model, adapters)
        return model
    adapted, start = dora_linen.apply_dora(model, config, **{"rng": jax.random.key(0), **arguments})
    return adapted, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), adapters, start)


def read_adapters(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    adapter_name: str = "default",
    unused: Sequence[str] = (),
    verify: bool = True,
    **arguments: Any,
) -> tuple[dict[str, Any], DoRAConfig]:
    """Returns the adapter tree and the configuration that a PEFT adapter folder holds.

    With them `apply_dora` and `set_adapters` make the model of `load_pretrained`. Arguments are
    those of `load_pretrained`; the model may be adapted already (to switch between adapters of one
    configuration), its arrays may be abstract.

    Returns:
      The tree, of NumPy arrays in the dtypes of the file, and the configuration.

    Raises:
      PeftError: as `load_pretrained`.
      AdapterError: the model is adapted with other settings than the adapter's.
    """
    config, tensors = files.read(folder, adapter_name, verify=verify)
    parameters = base_parameters(model, arguments.get("params"))
    known = hf_modules(parameters, names)
    adapter_tensors, others = split_tensors(config, tensors, known, unused)
    saved = saved_parameters(config, others, parameters, names, known)
    wanted = dora_config(config, adapter_tensors, saved, known)
    adapted = _adapted(model, wanted, arguments)
    layers = adapted_layers(adapted, names)
    _check_layers(layers, wanted, adapter_tensors, adapted is model)
    check_tied(layers.values(), names, parameters)
    flat = dict(saved)
    for path, layer in layers.items():
        used = {
            f"{PREFIX}{name}.{part}": x
            for name, _ in layer.slices()
            for part, x in adapter_tensors[name].items()
        }
        for name, x in from_tensors(layer, used).items():
            flat[(*path, name)] = x
    tree = _nested(flat)
    if isinstance(adapted, nnx.Module):
        check_shapes(tree, tree_shapes(dora_nnx.get_adapters(adapted)))
    else:
        dora_linen.check_adapters(adapted, tree)
    return tree, wanted


def _adapted(model: Any, config: DoRAConfig, arguments: Mapping[str, Any]) -> Any:
    """Returns the model adapted, without making an array; or as it is, if it is adapted."""
    config = dataclasses.replace(config, adapter_dtype="float32")  # for shapes, any is good
    if isinstance(model, dora_linen.DoRAModel) or (
        isinstance(model, nnx.Module) and bool(dora_nnx.adapted_layers(model))
    ):
        return model
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        shapes = nnx.merge(graphdef, abstract(state))
        return dora_nnx.apply_dora(shapes, config, rngs=nnx.Rngs(0), **arguments)
    if not isinstance(model, linen.Module):
        raise TypeError(f"expected a Flax module or a DoRAModel, got {type(model)}")
    shapes = abstract(arguments["params"])
    arguments = {"rng": jax.random.key(0), **arguments, "params": shapes}
    return dora_linen.apply_dora(model, config, **arguments)[0]


def _check_layers(
    layers: Mapping[Path, Layer], config: DoRAConfig, adapters: Mapping[str, Any], was_adapted: bool
) -> None:
    """Raises `DoRAError` unless the model is adapted where, and as, the file says."""
    given = {name for layer in layers.values() for name, _ in layer.slices()}
    problems = [
        f"{name} has an adapter in the {'model' if name in given else 'file'} alone"
        for name in sorted(given ^ adapters.keys())
    ]
    for path, layer in layers.items():
        own, wanted = layer.settings, config.layer_settings(path)
        problems += [
            f"{layer_name(path)} has {field} {getattr(own, field)} in the model, "
            f"{getattr(wanted, field)} in the file"
            for field in ("rank", "scaling", "decompose")
            if getattr(own, field) != getattr(wanted, field)
        ]
    if problems and was_adapted:
        listing = "; ".join(problems)
        raise AdapterError(f"the model is adapted in another way: {listing}. Use load_pretrained")
    if problems:
        raise PeftError(
            f"layers_to_transform cannot select what the file has: {'; '.join(problems)}. Read it "
            "into a model whose layers are not stacked"
        )


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree
