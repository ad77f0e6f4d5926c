"""`dora-jax convert`: an adapter folder from one format to the other."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.trees import flatten
from dora_jax.checkpoint.adapters import save
from dora_jax.checkpoint.fingerprint import reconcile
from dora_jax.checkpoint.saved import SavedAdapters, read_adapters
from dora_jax.cli.base_weights import BaseWeights, torch_axes
from dora_jax.cli.folders import folder_format
from dora_jax.cli.placeholder import adapted_placeholder, plain_placeholder
from dora_jax.decomposition.base import FrozenBase, describe_base
from dora_jax.disk import target_folder
from dora_jax.errors import AdapterError, CheckpointError, Path, layer_name
from dora_jax.model import Plain
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import ModuleTensors, group_tensors
from dora_jax.peft.layers import Layer, adapted_layers
from dora_jax.peft.loading import adapt_with
from dora_jax.peft.loading import read_adapters as read_peft
from dora_jax.peft.saving import save_pretrained
from dora_jax.selection import is_in_saved_module

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_describe_base = jax.jit(describe_base, static_argnames=("axes", "eps"))


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    names: NameMap,
    *,
    base: pathlib.Path | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes an adapter folder in the other format.

    Args:
      source: in either format.
      target: a new folder.
      names: which Hugging Face module each Flax module is.
      base: the Hugging Face folder of the base. An Orbax adapter is checked against it. An adapter
        from PEFT is saved with its fingerprint.
      allow_base_mismatch: whether to convert an adapter that was trained for another base.
      overwrite: whether to replace the contents of `target`.

    Returns:
      A report, as JSON types.

    Raises:
      DoRAError: the other format cannot represent the adapter, or the parts do not belong together;
        names the layer. Or `target` is read from.
    """
    target_folder(target, source, *(() if base is None else (base,)))
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target} exists: pass --overwrite, or choose another folder")
    if folder_format(source) == "orbax":
        _to_peft(source, target, names, base, allow_base_mismatch=allow_base_mismatch)
        return {"from": "orbax", "to": "peft", "path": str(target)}
    _to_orbax(source, target, names, base, overwrite=overwrite)
    return {"from": "peft", "to": "orbax", "path": str(target)}


def _to_peft(
    source: pathlib.Path,
    target: pathlib.Path,
    names: NameMap,
    base: pathlib.Path | None,
    *,
    allow_base_mismatch: bool,
) -> None:
    """Writes an Orbax folder as a PEFT folder."""
    saved = read_adapters(source)
    for path in flatten(saved.statistics):
        if is_in_saved_module(saved.config, path):
            raise AdapterError(
                f"{layer_name(path[:-1])} is trained in full and has batch statistics, which a "
                "PEFT folder is not written with here: leave it out of modules_to_save"
            )
    weights = None if base is None else BaseWeights(base, _hf_modules(saved, names))
    model = adapted_placeholder(saved, names, weights)
    if weights is not None:
        layers = adapted_layers(model, names)
        _check_base(saved, layers, weights, allow_base_mismatch=allow_base_mismatch)
    save_pretrained(model, target, names, adapters=saved.adapters)


def _to_orbax(
    source: pathlib.Path,
    target: pathlib.Path,
    names: NameMap,
    base: pathlib.Path | None,
    *,
    overwrite: bool,
) -> None:
    """Writes a PEFT folder as an Orbax folder."""
    config, tensors = files.read(source)
    adapters, others = group_tensors(config, tensors)
    _check_orientation(config, adapters, names)
    weights = None if base is None else BaseWeights(base, adapters)
    model = plain_placeholder(adapters, others, names, weights)
    tree, own_config = read_peft(model, source, names)
    if weights is None:
        save(target, own_config, tree, overwrite=overwrite)
    else:
        adapted = adapt_with(model, tree, own_config, Plain())
        save(target, adapted, own_config, overwrite=overwrite)


def _hf_modules(saved: SavedAdapters, names: NameMap) -> list[str]:
    """Returns the names of the Hugging Face modules that an Orbax folder has adapters of."""
    found = []
    for path, record in saved.base.items():
        module = names.find(".".join(path))
        found += module.names(np.shape(record.norm)[: len(module.stacked)])
    return found


def _check_base(
    saved: SavedAdapters,
    layers: Mapping[Path, Layer],
    base: BaseWeights,
    *,
    allow_base_mismatch: bool,
) -> None:
    """Raises `AdapterError` unless the weights are those that an adapter was trained for."""
    for path, record in saved.base.items():
        layer = layers[path]
        kept = [np.asarray(x) for x in (record.norm, record.first_row)]
        for index, name in zip(
            np.ndindex(*layer.stack), layer.module.names(layer.stack), strict=True
        ):
            weight = base.read(f"{name}.weight")
            axes = torch_axes(
                weight.ndim,
                embedding=layer.kind == "embedding",
                transposed=layer.module.transposed,
            )
            own = _describe_base(jnp.asarray(weight), axes, saved.config.eps)
            in_order = FrozenBase(
                *(jnp.asarray(layer.module.to_hf_order(x[index].reshape(-1))) for x in kept)
            )
            reconcile({(name,): in_order}, {(name,): own}, allow_base_mismatch=allow_base_mismatch)


def _check_orientation(
    config: PeftConfig, adapters: Mapping[str, ModuleTensors], names: NameMap
) -> None:
    """Raises `AdapterError` if the base stores a weight as `(in, out)` and the name map does not.

    The adapter's own tensors do not tell the two apart, nor does a square weight.
    """
    if not config.fan_in_fan_out:
        return
    for module, adapter in adapters.items():
        path = names.path(module)
        if adapter.kind != "embedding" and path is not None and not names.find(path).transposed:
            raise AdapterError(
                f"the base stores {module}.weight as (in, out) (fan_in_fan_out), and the name map "
                "does not say so: convert it in Python, with HFModule(..., transposed=True)"
            )
