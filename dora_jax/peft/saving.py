"""Adapted Flax models to PEFT adapter folders."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from flax import nnx

from dora_jax.adapters.trees import Tree, check_shapes, flatten, get_in
from dora_jax.config import LayerSettings
from dora_jax.decomposition.scale import effective_factors
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import (
    AdaptedModel,
    adapter_shapes,
    adapter_tree,
    base_parameters,
    carries_arrays,
    is_adapted,
    model_layers,
    modules_of,
)
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import PREFIX
from dora_jax.peft.layers import Layer, adapted_layers, check_tied, hf_modules, to_tensors
from dora_jax.peft.settings import select_only, with_patterns

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from dora_jax.api import DoRAModel

    Array = np.ndarray[Any, Any]


@overload
def save_pretrained(
    model: nnx.Module,
    folder: files.Folder,
    names: NameMap,
    *,
    adapters: Tree | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: DTypeLike | None = None,
) -> pathlib.Path: ...


@overload
def save_pretrained(
    model: DoRAModel,
    folder: files.Folder,
    names: NameMap,
    *,
    adapters: Tree,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: DTypeLike | None = None,
) -> pathlib.Path: ...


def save_pretrained(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    adapters: Any = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: DTypeLike | None = None,
) -> pathlib.Path:
    """Writes a model's adapter as a folder that PEFT's `PeftModel.from_pretrained` reads.

    PEFT computes the same outputs with it, except that no gradient flows through the norm there,
    whatever `norm_gradient` is here. Every adapted module is named in full, so that PEFT selects no
    others.

    Args:
      model: an adapted NNX model, or the `DoRAModel` of a Linen one.
      folder: where to write `adapter_config.json` and `adapter_model.safetensors`. For several
        adapters, PEFT keeps all but the one named "default" in folders inside: `f"{folder}/other"`.
      names: which Hugging Face module each module of the model is, such as `dora_jax.names.LLAMA`.
      adapters: the adapter tree of a Linen model; of an NNX model, if not the one it carries.
      base_model_name_or_path: of the base model, for PEFT's `AutoPeftModel`.
      task_type: PEFT's, such as `"CAUSAL_LM"`.
      dtype: of the tensors; by default their own.

    Returns:
      The folder.

    Raises:
      PeftError: PEFT cannot represent a layer or a setting; names it, and the fix.
      NameMapError: `names` lacks a module.
      AdapterError: the model has no adapter, or the tree is of another one.

    Example:
      >>> import tempfile, dora_jax as dora
      >>> from dora_jax.names import IDENTITY
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sorted(file.name for file in save_pretrained(model, folder, IDENTITY).iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    tree = _checked_tree(model, adapters)
    layers = adapted_layers(model, names)
    parameters = base_parameters(model) if carries_arrays(model) else None
    check_tied(layers.values(), names, parameters)
    saved = _saved_tensors(model, tree, layers, names)
    tensors = saved | _adapter_tensors(layers.values(), tree)
    config = dataclasses.replace(
        _config(layers.values(), parameters, names),
        modules_to_save=sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in saved}),
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )
    if dtype is not None:
        tensors = {key: _cast(key, x, dtype) for key, x in tensors.items()}
    return files.write(folder, config, tensors)


def _checked_tree(model: AdaptedModel, adapters: Tree | None) -> Tree:
    """Returns a model's adapter tree.

    Raises:
      AdapterError: it does not fit the model.
      PeftError: it holds precomputed scales.
    """
    if not is_adapted(model):
        raise AdapterError("the model has no adapter: apply_dora first; a merged one has none left")
    tree = adapter_tree(model, adapters)
    for path in model_layers(model):
        if "scale" in get_in(tree, path, "the adapters"):
            raise PeftError(
                f"{layer_name(path)} holds a precomputed scale, which PEFT does not have: save the "
                "adapters that precompute_scales was given"
            )
    check_shapes(tree, adapter_shapes(model))
    return tree


def _adapter_tensors(layers: Iterable[Layer], tree: Tree) -> dict[str, Array]:
    """Returns the adapters of all layers as PEFT's tensors, by key."""
    tensors: dict[str, Array] = {}
    for layer in layers:
        adapter = get_in(tree, layer.path, "the adapters")
        _check_settings(layer)
        factors = _effective_factors(layer, adapter)
        tensors |= to_tensors(layer, {name: np.asarray(x) for name, x in factors.items()})
    return tensors


def _saved_tensors(
    model: AdaptedModel, tree: Tree, layers: Mapping[Path, Layer], names: NameMap
) -> dict[str, Array]:
    """Returns the parameters of modules trained in full as PEFT's tensors, by key."""
    saved = {path: x for path, x in flatten(tree).items() if path[:-1] not in layers}
    holders = {path[:n] for path in layers for n in range(len(path))}
    if bare := [path for path in saved if path[:-1] in holders]:
        raise PeftError(
            f"{layer_name(bare[0])} is trained in full and stands next to other modules; PEFT "
            "trains whole modules alone: leave it out of modules_to_save"
        )
    if not carries_arrays(model) and model.statistics:
        _refuse_statistics(layer_name(model.statistics[0][:-1]))
    _check_saved(modules_of(model), saved, names)
    tensors = {}
    for path, value in saved.items():
        for name, tensor in names.to_hf(".".join(path), np.asarray(value)).items():
            tensors[PREFIX + name] = tensor
    return tensors


def _check_saved(modules: Mapping[Path, Any], saved: Mapping[Path, Any], names: NameMap) -> None:
    """Raises `PeftError` for modules trained in full whose parameters are others in torch."""
    for path, value in saved.items():
        name, module = layer_name(path[:-1]), modules.get(path[:-1])
        if isinstance(module, nnx.BatchNorm):
            _refuse_statistics(name)
        if isinstance(module, nnx.LoRA):
            raise PeftError(
                f"{name} holds factors of its own beside a kernel, which torch's module does not "
                "have: leave it out of modules_to_save"
            )
        axes = np.ndim(value) - len(names.find(".".join(path[:-1])).stacked)
        if path[-1] == "kernel" and axes > 2 and not isinstance(module, nnx.Conv):
            raise PeftError(
                f"{name} is in modules_to_save with a kernel of {axes} axes, and it is not known "
                "which ones torch joins: leave it out of modules_to_save"
            )


def _refuse_statistics(name: str) -> None:
    raise PeftError(
        f"{name} has running statistics, which are tensors of the adapter in PEFT, and not written "
        "here: leave it out of modules_to_save"
    )


def _check_settings(layer: Layer) -> None:
    """Raises `PeftError` for settings that PEFT does not have."""
    name, settings = layer_name(layer.path), layer.settings
    merging = "Merge it (dora.merge) and save the base"
    if settings.decompose and not settings.normalize:
        raise PeftError(f"{name} has normalize=False; PEFT always divides by the norm. {merging}")
    if settings.decompose and not settings.magnitude_trainable:
        raise PeftError(
            f"{name} has magnitude_trainable=False; PEFT always trains the magnitude. {merging}"
        )
    if not settings.rank:
        raise PeftError(f"{name} has rank 0; PEFT has no magnitude without lora_A. {merging}")


def _effective_factors(layer: Layer, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapter with the factors of the change `A B - A0 B0`, which acts on the kernel.

    Where the product started at zero, these are `A` and `B`. Else they have twice the rank, as
    PEFT's conversion of PiSSA and OLoRA adapters has.
    """
    if layer.base.init_a is None:
        return dict(adapter)
    whole = dataclasses.replace(layer.base, mask=None)
    a, b = effective_factors(adapter, whole, layer.axes)
    return {**adapter, "lora_a": a, "lora_b": b}


def _effective_settings(layer: Layer) -> LayerSettings:
    """Returns the settings for the factors of `_effective_factors`, with the same scaling."""
    settings = layer.settings
    if layer.base.init_a is None:
        return settings
    factor = math.sqrt(2) if _uses_rslora(settings) else 2
    return dataclasses.replace(settings, rank=2 * settings.rank, alpha=factor * settings.alpha)


def _uses_rslora(settings: LayerSettings) -> bool:
    return not math.isclose(settings.scaling, settings.alpha / settings.rank)


def _config(
    layers: Iterable[Layer], parameters: Mapping[Path, Any] | None, names: NameMap
) -> PeftConfig:
    """Returns the configuration with which PEFT selects the same modules, with the same scaling."""
    settings = {name: _effective_settings(layer) for layer in layers for name, _ in layer.slices()}
    if not settings:
        raise PeftError(
            "no layer is adapted, and PEFT needs one; modules trained in full do not count"
        )
    rank, rank_pattern = with_patterns({name: s.rank for name, s in settings.items()})
    alpha, alpha_pattern = with_patterns({name: _number(s.alpha) for name, s in settings.items()})
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(settings, parameters, names),
        use_dora=any(s.decompose for s in settings.values()),
        lora_dropout=max(s.dropout for s in settings.values()),
        use_rslora=any(_uses_rslora(s) for s in settings.values()),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=any(layer.module.transposed for layer in layers),
    )


def _targets(
    adapted: Iterable[str], parameters: Mapping[Path, Any] | None, names: NameMap
) -> str | list[str]:
    """Returns `target_modules` that selects only the adapted modules.

    Without the parameters the other modules are not known: then any of their names may end in one
    without a dot.
    """
    if parameters is not None:
        return select_only(adapted, hf_modules(parameters, names))
    adapted = sorted(adapted)
    return adapted if all("." in name for name in adapted) else "|".join(map(re.escape, adapted))


def _cast(key: str, x: Array, dtype: DTypeLike) -> Array:
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if np.isfinite(x).all() and not np.isfinite(cast).all():
        raise PeftError(
            f"{key} does not fit into {cast.dtype}, its largest number is {abs(x).max():.3g}: pass "
            "a wider dtype"
        )
    return cast


def _number(x: float) -> float:
    """Returns an integer where there is one, as PEFT writes it."""
    return int(x) if x == int(x) else x
