"""`dora-jax convert`: an adapter folder from one format to the other."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax import nnx as dora_nnx
from dora_jax.checkpoint.adapters import SavedAdapters, read_adapters, save
from dora_jax.checkpoint.fingerprint import reconcile
from dora_jax.cli.base_weights import Base, torch_axes
from dora_jax.cli.folders import folder_format
from dora_jax.cli.placeholder_model import of_peft, of_saved
from dora_jax.decomposition.base import FrozenBase, describe_base
from dora_jax.errors import AdapterError, CheckpointError
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import by_module
from dora_jax.peft.loading import read_adapters as read_peft
from dora_jax.peft.saving import save_pretrained

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


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
      base: the Hugging Face folder of the base: an Orbax adapter is checked against it, and one
        made from PEFT keeps its mark.
      allow_base_mismatch: convert although the base is not the one that the adapter was trained for.
      overwrite: exchange what is in `target`.

    Returns:
      What was done, as JSON types.

    Raises:
      DoRAError: the adapter has no form in the other format, or does not fit; names the layer.
    """
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target} exists: pass --overwrite, or choose another folder")
    if folder_format(source) == "orbax":
        saved = read_adapters(source)
        opened = None
        if base is not None:
            opened = Base(base, _modules_of(saved, names))
            _check_base(saved, names, opened, allow_base_mismatch=allow_base_mismatch)
        save_pretrained(of_saved(saved, names, opened), target, names, adapters=saved.adapters)
        return {"from": "orbax", "to": "peft", "path": str(target)}
    peft_config, tensors = files.read(source)
    _check_orientation(peft_config, tensors, names)
    opened = None if base is None else Base(base, _peft_modules(tensors))
    model = of_peft(tensors, names, opened)
    tree, config = read_peft(model, source, names)
    if base is None:
        save(target, config, tree, overwrite=overwrite)
    else:
        adapted = dora_nnx.apply_dora(model, config, rngs=nnx.Rngs(0))
        dora_nnx.set_adapters(adapted, tree)
        save(target, adapted, config, overwrite=overwrite)
    return {"from": "peft", "to": "orbax", "path": str(target)}


def _modules_of(saved: SavedAdapters, names: NameMap) -> list[str]:
    found = []
    for path in saved.base:
        module = names.find(".".join(path))
        stack = np.shape(saved.base[path].norm)[: len(module.stacked)]
        found += module.names(stack)
    return found


def _check_base(
    saved: SavedAdapters, names: NameMap, base: Base, *, allow_base_mismatch: bool
) -> None:
    """Raises `AdapterError` unless the weights are those that an adapter was trained for."""
    for path, kept in saved.base.items():
        module = names.find(".".join(path))
        norm, row = np.asarray(kept.norm), np.asarray(kept.first_row)
        stack = norm.shape[: len(module.stacked)]
        for index, name in zip(np.ndindex(*stack), module.names(stack), strict=True):
            weight = base.read(f"{name}.weight")
            table = weight.shape[-1] == norm[index].size and weight.shape[0] != norm[index].size
            axes = torch_axes(weight.ndim, embedding=table, transposed=module.transposed)
            own = describe_base(jnp.asarray(weight), axes, saved.config.eps)
            in_order = FrozenBase(
                *(jnp.asarray(module.to_hf_order(x[index].reshape(-1))) for x in (norm, row))
            )
            reconcile({(name,): in_order}, {(name,): own}, allow_base_mismatch=allow_base_mismatch)


def _check_orientation(config: PeftConfig, tensors: Mapping[str, Array], names: NameMap) -> None:
    """Raises `AdapterError` if the name map takes GPT-2's weights for those of `nn.Linear`.

    The adapter's own tensors do not tell, and in a square weight nothing would tell later.
    """
    if not config.fan_in_fan_out:
        return
    for module, parts in by_module(tensors)[0].items():
        path = names.path(module)
        if "A" in parts and path is not None and not names.find(path).transposed:
            raise AdapterError(
                f"the base stores {module}.weight as (in, out) (fan_in_fan_out), and the name map "
                "does not say so: convert it in Python, with HFModule(..., transposed=True)"
            )


def _peft_modules(tensors: Mapping[str, Array]) -> list[str]:
    return list(by_module(tensors)[0])
