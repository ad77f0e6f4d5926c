"""`dora-jax merge`: an adapter merged into the weights of its base, folder to folder."""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.cli.base_weights import BaseWeights, torch_axes
from dora_jax.cli.convert import convert
from dora_jax.cli.folders import folder_format
from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.base import describe_base
from dora_jax.decomposition.merge import merge_kernel
from dora_jax.disk import target_folder, unchanged, written_whole
from dora_jax.disk.json_file import read_json
from dora_jax.errors import AdapterError, CheckpointError
from dora_jax.huggingface.files import save_tensors, weight_files
from dora_jax.huggingface.safetensors import DTYPES
from dora_jax.huggingface.saving import copy_companions, is_weights
from dora_jax.names.architectures import NAME_MAPS
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import ModuleTensors, group_tensors

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def merge(
    base: pathlib.Path,
    adapter: pathlib.Path,
    target: pathlib.Path,
    names: NameMap | None,
    *,
    max_file_bytes: int = 2 * 10**9,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a Hugging Face folder of the base with the adapter merged into its weights.

    Weights are read, merged and written one by one, each in the base's dtype. The host holds those
    of one file.

    Args:
      base: a Hugging Face folder with safetensors files.
      adapter: in either format.
      target: a new folder.
      names: which Hugging Face module each Flax module is; needed for an Orbax adapter.
      max_file_bytes: the largest size of a file.
      allow_base_mismatch: whether to merge an adapter that was trained for another base.
      overwrite: whether to replace the weights in `target`.

    Returns:
      A report, as JSON types.

    Raises:
      DoRAError: the adapter does not fit the base; names the layer or tensor.
    """
    path = target_folder(target, base, adapter)
    if weight_files(path) and not overwrite:
        raise CheckpointError(f"{target} holds weights: pass --overwrite, or another folder")
    with unchanged(base):
        config, tensors = _as_peft(base, adapter, names, allow_base_mismatch=allow_base_mismatch)
        adapters, others = group_tensors(config, tensors)
        weights = BaseWeights(base, adapters)
        replaced = _replaced_tensors(weights, others)
        _check_fits(weights, adapters)
        merged = {weights.name(f"{module}.weight"): adapter for module, adapter in adapters.items()}
        sizes = {name: tensor.nbytes for name, tensor in weights.tensors.items()}
        sizes |= {name: x.nbytes for name, x in replaced.items()}
        rounding_loss: dict[str, float] = {}
        make = functools.partial(_make_tensor, weights, config, merged, replaced, rounding_loss)
        with written_whole(path, own=is_weights, overwrite=overwrite) as partial:
            save_tensors(partial, sizes, lambda name: lambda: make(name), max_file_bytes)
            copy_companions(base, partial, set())
    return {
        "path": str(target),
        "merged": sorted(merged),
        "replaced": sorted(replaced),
        "copied": len(sizes) - len(merged) - len(replaced),
        "rounded_away": dict(sorted(rounding_loss.items())),
    }


def _as_peft(
    base: pathlib.Path, adapter: pathlib.Path, names: NameMap | None, *, allow_base_mismatch: bool
) -> tuple[PeftConfig, dict[str, Array]]:
    """Returns an adapter of either format as PEFT's configuration and tensors."""
    if folder_format(adapter) == "peft":
        return files.read(adapter)
    if names is None:
        raise AdapterError(
            f"{adapter} is an Orbax folder, whose layers have Flax's paths: say with --names which "
            f"Hugging Face modules they are, one of {', '.join(NAME_MAPS)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        converted = pathlib.Path(folder) / "adapter"
        convert(adapter, converted, names, base=base, allow_base_mismatch=allow_base_mismatch)
        return files.read(converted)


def _replaced_tensors(base: BaseWeights, others: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the tensors of modules trained in full, by their names in the base's folder.

    PEFT also saves the frozen weights of adapted embeddings and heads. They are left out.

    Raises:
      AdapterError: a tensor does not have the base's shape; or a frozen weight is not the base's,
        because the vocabulary was resized, or it was trained.
    """
    replaced = {}
    for tensor, x in others.items():
        if ".base_layer." in tensor:
            own = tensor.replace(".base_layer.", ".")
            weight = base.read(own)
            if not np.array_equal(x.astype(weight.dtype), weight):
                raise AdapterError(
                    f"{tensor} in the adapter is not {own} of the base: the vocabulary was "
                    "resized, or the table was trained. Merge it in PEFT (merge_and_unload)"
                )
            continue
        stored = base.tensors.get(name := base.name(tensor))
        if stored is not None and stored.shape != x.shape:
            raise AdapterError(
                f"{tensor} has shape {x.shape}, in the base {stored.shape}: is it the base that "
                "the adapter was trained for?"
            )
        replaced[name] = x if stored is None else x.astype(DTYPES[stored.dtype])
    return replaced


def _check_fits(base: BaseWeights, adapters: Mapping[str, ModuleTensors]) -> None:
    """Raises before anything is written if an adapter is not of one of the base's weights."""
    for module, adapter in adapters.items():
        shape, arrays = base.shape(f"{module}.weight"), adapter.arrays
        inputs, outputs = arrays["lora_a"].shape[1:], len(arrays["lora_b"])
        if adapter.kind == "embedding":
            possible = {(*inputs, outputs)}
            if _is_tied(base):
                raise AdapterError(
                    f"{module} is adapted, and the base's head uses the same table, which would "
                    "change with it, but not in PEFT: this adapter cannot be merged"
                )
        else:
            possible = {(outputs, *inputs)}
            if adapter.kind == "linear":  # its weight may be transposed, as GPT-2's
                possible.add((*inputs, outputs))
        if shape not in possible:
            raise AdapterError(
                f"{module}: the adapter has {inputs} in and {outputs} out features, the base's "
                f"weight has shape {shape}: is it the base that the adapter was trained for?"
            )


def _is_tied(base: BaseWeights) -> bool:
    """Whether a language model's head uses the table of its embeddings."""
    if any(name.endswith(("lm_head.weight", "decoder.weight")) for name in base.tensors):
        return False
    file = base.folder / "config.json"
    config = read_json(file) if os.path.lexists(file) else {}
    classes = config.get("architectures") or [] if isinstance(config, dict) else None
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(f"{file}: architectures must be a list of names: fetch it again")
    classes = " ".join(classes)
    return bool(config.get("tie_word_embeddings")) or "LM" in classes or "Generation" in classes


def _make_tensor(
    base: BaseWeights,
    config: PeftConfig,
    merged: Mapping[str, ModuleTensors],
    replaced: Mapping[str, Array],
    rounding_loss: dict[str, float],
    name: str,
) -> Array:
    """Returns a tensor of the merged folder, and notes its module's rounding loss."""
    if name in replaced:
        return replaced[name]
    weight = base.tensors[name].read()
    if name not in merged:
        return weight
    module = merged[name].module
    weight, rounding_loss[module] = _merge_weight(weight, merged[name], config)
    if not np.isfinite(weight).all():
        raise AdapterError(
            f"{name} is not finite as {weight.dtype} once it is merged: use a base in a wider dtype"
        )
    return weight


def _merge_weight(weight: Array, adapter: ModuleTensors, config: PeftConfig) -> tuple[Array, float]:
    """Returns a merged weight, and the share of the change that its dtype rounds away."""
    rank, alpha = config.rank(adapter.module), config.alpha(adapter.module)
    a, b = adapter.arrays["lora_a"], adapter.arrays["lora_b"]
    transposed = config.fan_in_fan_out
    if weight.ndim == 2 and weight.shape[0] != weight.shape[1]:
        # PEFT's field is one for all layers, of which only some may be transposed.
        transposed = weight.shape == (a.shape[1], b.shape[0])
    axes = torch_axes(weight.ndim, embedding=adapter.kind == "embedding", transposed=transposed)
    settings = DoRAConfig(
        rank=rank, alpha=alpha, use_rslora=config.use_rslora, decompose=config.use_dora
    ).layer_settings(())
    arrays = {"lora_a": np.moveaxis(a, 0, -1), "lora_b": b.reshape(-1, rank).T}
    if config.use_dora:
        arrays["magnitude"] = adapter.arrays["magnitude"].reshape(-1)
    merged, loss = _merge_kernel(settings, jnp.asarray(weight), arrays, axes)
    return np.asarray(merged), float(loss)


@functools.partial(jax.jit, static_argnames=("settings", "axes"))
def _merge_kernel(
    settings: LayerSettings, kernel: jax.Array, adapter: Adapter, axes: KernelAxes
) -> tuple[jax.Array, jax.Array]:
    return merge_kernel(settings, kernel, adapter, describe_base(kernel, axes, settings.eps), axes)
