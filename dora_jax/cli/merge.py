"""`dora-jax merge`: an adapter folded into the weights of its base, folder to folder."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dora_jax.cli.base_weights import Base, torch_axes
from dora_jax.cli.convert import convert
from dora_jax.cli.folders import folder_format
from dora_jax.config import DoRAConfig
from dora_jax.decomposition.base import describe_base
from dora_jax.decomposition.merge import merge_kernel
from dora_jax.errors import AdapterError, CheckpointError
from dora_jax.huggingface.files import save_tensors, weight_files
from dora_jax.huggingface.safetensors import FLOATS, StoredTensor
from dora_jax.huggingface.saving import copy_companions, whole_folder
from dora_jax.names.architectures import NAME_MAPS
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import by_module

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_INTEGERS = {
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}


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
    """Writes a Hugging Face folder of the base with the adapter folded into its weights.

    Weights are read, merged and written one after another, each in the base's dtype: the host holds
    those of one file.

    Args:
      base: a Hugging Face folder with safetensors files.
      adapter: in either format.
      target: a new folder.
      names: which Hugging Face module each Flax module is; needed for an Orbax adapter.
      max_file_bytes: of one file that is written.
      allow_base_mismatch: merge although the base is not the one that the adapter was trained for.
      overwrite: exchange the weights in `target`.

    Returns:
      What was done, as JSON types.

    Raises:
      DoRAError: the adapter does not fit the base; names the layer or tensor.
    """
    if target.resolve() in (base.resolve(), adapter.resolve()):
        raise CheckpointError(f"{target} is read from: choose another folder")
    if weight_files(target) and not overwrite:
        raise CheckpointError(f"{target} holds weights: pass --overwrite, or another folder")
    config, tensors = _as_peft(base, adapter, names, allow_base_mismatch=allow_base_mismatch)
    layers, extra = by_module(tensors)
    opened = Base(base, list(layers))
    extra = _without_tables(opened, extra)
    _check_merge(opened, config, layers, extra)
    replaced = {opened.name(name): x for name, x in extra.items()}
    merging = {opened.name(f"{module}.weight"): module for module in layers}
    sizes = {name: tensor.nbytes for name, tensor in opened.tensors.items()}
    for name, x in replaced.items():
        dtype = FLOATS[opened.tensors[name].dtype] if name in opened.tensors else x.dtype
        replaced[name] = x.astype(dtype)
        sizes[name] = replaced[name].nbytes
    lost: dict[str, float] = {}

    def make(name: str) -> Array:
        if name in replaced:
            return replaced[name]
        if name not in merging:
            return _read_any(opened, name)
        module = merging[name]
        weight, lost[module] = _merge_weight(
            opened.read(f"{module}.weight"), layers[module], config, module
        )
        if not np.isfinite(weight).all():
            raise AdapterError(f"{name} is not finite as {weight.dtype} once it is merged")
        return weight

    with whole_folder(target) as partial:
        save_tensors(partial, sizes, make, max_file_bytes)
        copy_companions(base, partial, set())
    return {
        "path": str(target),
        "merged": sorted(merging),
        "replaced": sorted(replaced),
        "copied": len(sizes) - len(merging) - len(replaced),
        "rounded_away": {module: lost[module] for module in sorted(lost)},
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


def _check_merge(
    base: Base,
    config: PeftConfig,
    layers: Mapping[str, Mapping[str, Array]],
    extra: Mapping[str, Array],
) -> None:
    """Raises before anything is written if a layer or its shape is not the base's."""
    for module, parts in layers.items():
        shape = base.shape(f"{module}.weight")
        a, b = (parts.get(n, parts.get(f"embedding_{n}")) for n in ("A", "B"))
        if a is None or b is None:
            raise AdapterError(f"{module}: lora_A or lora_B is missing: fetch the adapter again")
        if ("magnitude_vector" in parts) != config.use_dora:
            raise AdapterError(
                f"{module}: use_dora is {config.use_dora}, the magnitude is "
                f"{'missing' if config.use_dora else 'there'}: the two files do not belong together"
            )
        if (a.shape[0], b.shape[1]) != 2 * (rank := config.rank(module),):
            raise AdapterError(
                f"{module}: the configuration says rank {rank}, lora_A has {a.shape[0]} and lora_B "
                f"{b.shape[1]}: the two files do not belong together"
            )
        magnitude = parts.get("magnitude_vector")
        if magnitude is not None and magnitude.size != b.shape[0]:
            raise AdapterError(
                f"{module}: the magnitude has {magnitude.size} features, lora_B {b.shape[0]}"
            )
        sizes = a.shape[1:], b.shape[0]
        embedding = "embedding_A" in parts
        if embedding and _is_tied(base):
            raise AdapterError(
                f"{module} is adapted, and the base's head uses the same table, which would change "
                "where PEFT leaves it: this adapter cannot be merged"
            )
        wanted = {(sizes[0][0], sizes[1])} if embedding or a.ndim == 2 else set()
        wanted |= set() if embedding else {(sizes[1], *sizes[0])}
        fits = shape in wanted
        if not fits:
            raise AdapterError(
                f"{module}: the adapter is of {sizes[0]} in and {sizes[1]} out features, the "
                f"base's weight has shape {shape}: is it the base it was trained for?"
            )
    for name, x in extra.items():
        tensor = base.tensors.get(base.name(name))
        if tensor is not None and tensor.shape != x.shape:
            raise AdapterError(f"{name} has shape {x.shape}, in the base {tensor.shape}")


def _without_tables(base: Base, extra: Mapping[str, Array]) -> dict[str, Array]:
    """Leaves out the frozen weights that PEFT saves with adapted tables and heads.

    Raises:
      AdapterError: one is not the base's: the vocabulary was resized, or it was trained.
    """
    rest = {}
    for name, x in extra.items():
        if ".base_layer." not in name:
            rest[name] = x
            continue
        own = name.replace(".base_layer.", ".")
        weight = base.read(own)
        if not np.array_equal(x.astype(weight.dtype), weight):
            raise AdapterError(
                f"{name} in the adapter is not {own} of the base: the vocabulary was resized, or "
                "the table was trained. Merge it in PEFT (merge_and_unload)"
            )
    return rest


def _is_tied(base: Base) -> bool:
    """Whether a language model's head uses the table of its embeddings."""
    if any(name.endswith(("lm_head.weight", "decoder.weight")) for name in base.tensors):
        return False
    file = base.folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    classes = " ".join(config.get("architectures") or [])
    return bool(config.get("tie_word_embeddings")) or "LM" in classes or "Generation" in classes


def _merge_weight(
    weight: Array, parts: Mapping[str, Array], config: PeftConfig, module: str
) -> tuple[Array, float]:
    """Returns a merged weight, and the share of the change that its dtype rounds away."""
    embedding = "embedding_A" in parts
    a, b = (parts.get(n, parts.get(f"embedding_{n}")) for n in ("A", "B"))
    assert a is not None and b is not None
    rank, alpha = config.rank(module), config.alpha(module)
    transposed = config.fan_in_fan_out
    if weight.ndim == 2 and weight.shape[0] != weight.shape[1]:  # some of a model's layers may be
        transposed = weight.shape == (a.shape[1], b.shape[0])
    axes = torch_axes(weight.ndim, embedding=embedding, transposed=transposed)
    own = DoRAConfig(
        rank=rank, alpha=alpha, use_rslora=config.use_rslora, decompose=config.use_dora
    ).layer_settings(())
    adapter = {"lora_a": jnp.moveaxis(jnp.asarray(a), 0, -1), "lora_b": b.reshape(-1, rank).T}
    if config.use_dora:
        adapter["magnitude"] = parts["magnitude_vector"].reshape(-1)
    kernel = jnp.asarray(weight)
    merged, lost = merge_kernel(own, kernel, adapter, describe_base(kernel, axes, own.eps), axes)
    return np.asarray(merged), float(lost)


def _read_any(base: Base, name: str) -> Array:
    """Reads a tensor that is copied as it is; it may be of integers."""
    stored = base.tensors[name]
    if stored.dtype in FLOATS:
        return stored.read()
    if stored.dtype not in _INTEGERS:
        raise CheckpointError(f"{name} is of {stored.dtype}, which cannot be copied")
    data = np.fromfile(
        stored.file, _INTEGERS[stored.dtype], offset=stored.start, count=_count(stored)
    )
    return data.reshape(stored.shape)


def _count(stored: StoredTensor) -> int:
    return int(np.prod(stored.shape))
