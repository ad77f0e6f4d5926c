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
)
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import PREFIX
from dora_jax.peft.layers import Layer, adapted_layers, check_tied, hf_modules, to_tensors
from dora_jax.peft.matching import check_saved
from dora_jax.peft.settings import select_only, with_patterns
from dora_jax.processes import first_alone, on_first_host

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from dora_jax.api.adapted import DoRAModel

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
    others. Of several processes all call it; the first gathers tensor by tensor, and writes.

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
    check_tied(layers.values(), names, _known_parameters(model))
    saved = _saved_modules(model, tree, layers, names)
    adapters = {path: _on_first_host(layer, tree) for path, layer in layers.items()}

    def write() -> str:
        own = _saved_tensors(saved, names)
        config = dataclasses.replace(
            _config(layers.values(), _known_parameters(model), names),
            modules_to_save=sorted({k.removeprefix(PREFIX).rpartition(".")[0] for k in own}),
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
        )
        return str(files.write(folder, config, _with_adapters(own, layers, adapters, dtype)))

    return pathlib.Path(first_alone(write))


def _known_parameters(model: AdaptedModel) -> dict[Path, Any] | None:
    """Returns the base's parameters by path, of a model that carries them."""
    return base_parameters(model) if carries_arrays(model) else None


def _saved_modules(
    model: AdaptedModel, tree: Tree, layers: Mapping[Path, Layer], names: NameMap
) -> dict[Path, Any]:
    """Returns the parameters of modules trained in full, on the host that writes them."""
    saved = {path: x for path, x in flatten(tree).items() if path[:-1] not in layers}
    check_saved(model, saved, layers, names)
    return {path: on_first_host(x) for path, x in saved.items()}


def _with_adapters(
    tensors: Mapping[str, Array],
    layers: Mapping[Path, Layer],
    adapters: Mapping[Path, Mapping[str, Array]],
    dtype: DTypeLike | None,
) -> dict[str, Array]:
    """Returns tensors together with those of adapters, in a dtype if one is given."""
    every = dict(tensors)
    for path, layer in layers.items():
        every |= to_tensors(layer, adapters[path])
    return every if dtype is None else {key: _cast(key, x, dtype) for key, x in every.items()}


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


def _on_first_host(layer: Layer, tree: Tree) -> dict[str, Any]:
    """Returns the arrays that PEFT has of a layer's adapter, on the host that writes them."""
    _check_settings(layer)
    factors = _effective_factors(layer, get_in(tree, layer.path, "the adapters"))
    return {name: on_first_host(x) for name, x in factors.items()}


def _saved_tensors(saved: Mapping[Path, Any], names: NameMap) -> dict[str, Array]:
    """Returns the parameters of modules trained in full as PEFT's tensors, by key."""
    return {
        PREFIX + name: tensor
        for path, value in saved.items()
        for name, tensor in names.to_hf(".".join(path), value).items()
    }


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
