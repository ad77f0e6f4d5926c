"""Adapted Flax models to PEFT adapter folders."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from dora_jax.adapters.trees import check_shapes, flatten
from dora_jax.config import LayerSettings
from dora_jax.decomposition.scale import effective_factors
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import adapter_shapes, adapter_tree, base_parameters, is_adapted
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import PREFIX
from dora_jax.peft.layers import adapted_layers, check_tied, hf_modules
from dora_jax.peft.tensors import Layer, to_tensors

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    Array = np.ndarray[Any, Any]


def save_pretrained(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    adapters: Any = None,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: DTypeLike | None = None,
) -> pathlib.Path:
    """Writes a model's adapter as a folder that PEFT's `PeftModel.from_pretrained` reads.

    PEFT computes the same outputs with it. It names every adapted module in full, so that the same
    modules are selected there whatever else the model has. Its gradient through the norm is the
    detached one, whatever `norm_gradient` says here.

    Args:
      model: an adapted NNX model, or the `DoRAModel` of a Linen one.
      folder: where to write `adapter_config.json` and `adapter_model.safetensors`.
      names: which Hugging Face module each module of the model is, such as `dora_jax.names.LLAMA`.
      adapters: the adapter tree of a Linen model; of an NNX model, if not the one it carries.
      adapter_name: PEFT keeps an adapter of another name than "default" in a folder inside.
      base_model_name_or_path: of the base model, for PEFT's `AutoPeftModel`.
      task_type: PEFT's, such as `"CAUSAL_LM"`.
      dtype: to cast the tensors to; their own by default.

    Returns:
      The folder that holds the two files.

    Raises:
      PeftError: PEFT has no form for a layer or a setting; says which, and the mend.
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
    parameters = base_parameters(model) if isinstance(model, nnx.Module) else None
    check_tied(layers.values(), names, parameters)
    tensors: dict[str, Array] = {}
    saved = {path: x for path, x in flatten(tree).items() if path[:-1] not in layers}
    for path, layer in layers.items():
        own: Any = tree
        for key in path:
            own = own[key]
        _check_settings(layer, own)
        tensors |= to_tensors(
            layer, {k: np.asarray(v) for k, v in _effective_factors(layer, own).items()}
        )
    _check_saved(model, saved, names)
    modules_to_save = set()
    for path, value in saved.items():
        for name, tensor in names.to_hf(".".join(path), np.asarray(value)).items():
            tensors[PREFIX + name] = tensor
            modules_to_save.add(name.rpartition(".")[0])
    config = _config(list(layers.values()))
    config = dataclasses.replace(
        config,
        target_modules=_targets(config.target_modules, model, names),
        modules_to_save=sorted(modules_to_save),
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )
    if dtype is not None:
        tensors = {key: _cast(key, x, dtype) for key, x in tensors.items()}
    return files.write(folder, adapter_name, config, tensors)


def _checked_tree(model: Any, adapters: Any) -> Mapping[str, Any]:
    if not is_adapted(model):
        raise AdapterError("the model has no adapter: apply_dora first; a merged one has none left")
    tree = adapter_tree(model, adapters)
    check_shapes(tree, adapter_shapes(model))
    return tree


def _check_saved(model: Any, saved: Mapping[Path, Any], names: NameMap) -> None:
    """Raises `PeftError` for modules trained in full that are others in torch."""
    modules: dict[Path, Any] = {}
    if isinstance(model, nnx.Module):
        modules = {tuple(map(str, path)): m for path, m in nnx.iter_modules(model)}
    for path, value in saved.items():
        name, module = layer_name(path[:-1]), modules.get(path[:-1])
        if isinstance(module, nnx.BatchNorm):
            raise PeftError(
                f"{name} has running statistics, which are not part of an adapter here and are of "
                "one in PEFT: leave it out of modules_to_save"
            )
        axes = np.ndim(value) - len(names.find(".".join(path[:-1])).stacked)
        if path[-1] == "kernel" and axes > 2 and not isinstance(module, nnx.Conv):
            raise PeftError(
                f"{name} is in modules_to_save with a kernel of {axes} axes, of which it is not "
                "known which ones torch joins: leave it out of modules_to_save"
            )


def _check_settings(layer: Layer, adapter: Mapping[str, Any]) -> None:
    """Raises `PeftError` for settings that PEFT has no equivalent of."""
    name, settings = layer_name(layer.path), layer.settings
    if settings.precomputed or "scale" in adapter:
        raise PeftError(f"{name} holds a precomputed scale: save what precompute_scales was given")
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
    """Returns the adapter whose product acts on the kernel, of twice the rank if it started apart.

    `A B - A0 B0` is what PEFT makes of PiSSA and OLoRA adapters too.
    """
    if layer.base.init_a is None:
        return dict(adapter)
    whole = dataclasses.replace(layer.base, mask=None)
    a, b = effective_factors(adapter, whole, layer.axes)
    return {**adapter, "lora_a": a, "lora_b": b}


def _config(layers: Sequence[Layer]) -> PeftConfig:
    """Returns the configuration with which PEFT selects the same modules, and scales them alike."""
    settings_by_name = {
        name: _effective_settings(layer) for layer in layers for name, _ in layer.slices()
    }
    if not settings_by_name:
        raise PeftError("no layer is adapted, and PEFT needs one: a module trained in full is none")
    use_rslora = any(
        not math.isclose(s.scaling, s.alpha / s.rank) for s in settings_by_name.values()
    )
    (rank, _), *_ = collections.Counter(s.rank for s in settings_by_name.values()).most_common(1)
    (alpha, _), *_ = collections.Counter(s.alpha for s in settings_by_name.values()).most_common(1)
    return PeftConfig(
        r=rank,
        lora_alpha=_plain(alpha),
        target_modules=sorted(settings_by_name),
        use_dora=any(s.decompose for s in settings_by_name.values()),
        lora_dropout=max(s.dropout for s in settings_by_name.values()),
        use_rslora=use_rslora,
        rank_pattern={_exactly(n): s.rank for n, s in settings_by_name.items() if s.rank != rank},
        alpha_pattern={
            _exactly(n): _plain(s.alpha) for n, s in settings_by_name.items() if s.alpha != alpha
        },
        fan_in_fan_out=any(layer.module.transposed for layer in layers),
    )


def _targets(targets: str | Sequence[str], model: Any, names: NameMap) -> str | list[str]:
    """Returns the names of all adapted modules; or a pattern, if one is the end of another's name.

    Of a Linen model, whose parameters are not at hand, any name without a dot may be such an end.
    """
    if isinstance(model, nnx.Module):
        others = hf_modules(base_parameters(model), names).keys() - set(targets)
        ends = {name[match.end() :] for name in others for match in re.finditer(r"\.", name)}
        if not ends & set(targets):
            return list(targets)
    elif all("." in name for name in targets):
        return list(targets)
    return "|".join(map(re.escape, targets))


def _effective_settings(layer: Layer) -> LayerSettings:
    """Returns the settings for the factors that `_acting` returns: of one scaling, s."""
    settings = layer.settings
    if layer.base.init_a is None:
        return settings
    grown = 2 if math.isclose(settings.scaling, settings.alpha / settings.rank) else math.sqrt(2)
    return dataclasses.replace(settings, rank=2 * settings.rank, alpha=grown * settings.alpha)


def _cast(key: str, x: Array, dtype: DTypeLike) -> Array:
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if np.isfinite(x).all() and not np.isfinite(cast).all():
        raise PeftError(f"{key} does not fit into {cast.dtype}: its largest is {abs(x).max():.3g}")
    return cast


def _exactly(name: str) -> str:
    """Returns the key of a pattern that matches one module alone."""
    return "^" + re.escape(name)


def _plain(number: float) -> float:
    """Returns an integer where there is one, as PEFT writes it."""
    return int(number) if number == int(number) else number
