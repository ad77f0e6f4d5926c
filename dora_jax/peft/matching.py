"""Which module of a model each tensor of a PEFT file belongs to, and which have none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from dora_jax.errors import Path, layer_name
from dora_jax.model import AdaptedModel, carries_arrays, modules_of
from dora_jax.names.name_map import NameMap
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import PREFIX, ModuleTensors
from dora_jax.peft.layers import Layer, Modules

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def check_modules(
    config: PeftConfig, adapters: Mapping[str, ModuleTensors], modules: Modules
) -> None:
    """Raises `PeftError` unless the file has adapters of the modules that it selects, no others."""
    if unknown := sorted(adapters.keys() - modules.keys()):
        raise PeftError(
            f"the file holds an adapter of {unknown[0]}, which the model or the name map does not "
            f"have. {_advice(unknown, modules)}"
        )
    if config.all_linear:
        return
    for module in modules:
        if config.selects(module) and not (module in adapters or config.may_select(module)):
            raise PeftError(
                f"target_modules names {module}, but the file holds no adapter of it: fetch it "
                "again"
            )


def _advice(unknown: list[str], modules: Modules) -> str:
    """Returns what to do about adapters of modules that the model does not have."""
    inside = {
        name.removesuffix(f".{own}") for name in unknown for own in _ends(name) & modules.keys()
    }
    if len(inside) == 1:
        (prefix,) = inside
        return (
            f"Its modules are those of the model, inside {prefix}: give names.inside('', "
            f"{prefix!r}), or a map of the whole model"
        )
    outside = {own.removesuffix(f".{name}") for own in modules for name in _ends(own) & {*unknown}}
    if len(outside) == 1:
        (prefix,) = outside
        return f"The model has it inside {prefix}: correct the name map, which adds that"
    near = difflib.get_close_matches(unknown[0], modules, n=3, cutoff=0.0)
    return f"Nearest names: {near}. If the model does without it: unused=[{unknown[0]!r}]"


def _ends(name: str) -> set[str]:
    """Returns what follows each dot of a name."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}


def saved_parameters(
    config: PeftConfig,
    others: Mapping[str, Array],
    parameters: Mapping[Path, Any],
    names: NameMap,
    modules: Modules,
) -> dict[Path, Array]:
    """Returns the parameters of modules that are trained in full, by path.

    Args:
      config: PEFT's configuration.
      others: the file's tensors that are no part of an adapter, by name.
      parameters: those of the model, by path.
      names: which Hugging Face module each module is.
      modules: of the model.

    Raises:
      PeftError: a tensor belongs to no such module, or one of a module's tensors is missing.
    """
    left = dict(others)

    def take(name: str) -> Array:
        if name not in left:
            raise PeftError(
                f"{PREFIX}{name} is missing, although modules_to_save has its module: fetch the "
                "file again"
            )
        return left.pop(name)

    given = {name.rpartition(".")[0] for name in others}
    saved = {
        path
        for module, (path, _) in modules.items()
        if config.saves(module) or (module in given and config.may_save(module))
    }
    values = {
        path: names.from_hf(".".join(path), np.shape(value), take)
        for path, value in parameters.items()
        if path[:-1] in saved
    }
    _check_left(config, left, parameters, names, modules)
    return values


def _check_left(
    config: PeftConfig,
    left: Mapping[str, Array],
    parameters: Mapping[Path, Any],
    names: NameMap,
    modules: Modules,
) -> None:
    """Raises `PeftError` unless tensors of no module are frozen weights, as the model has them."""
    for name, x in left.items():
        module, _, parameter = name.rpartition(".")
        table = module.removesuffix(".base_layer")
        if config.saves(module) and module not in modules:
            raise PeftError(
                f"{PREFIX}{name} is of {module}, which was trained in full (modules_to_save) and "
                f"which the model or the name map does not have. If the model does without it: "
                f"unused=[{module!r}]; else add it to the map: names | {{'PATH': {module!r}}}"
            )
        if table == module or parameter != "weight" or table not in modules:
            raise PeftError(
                f"{PREFIX}{name} is neither part of an adapter nor of a module in modules_to_save "
                f"({list(config.modules_to_save)}) that the model has. PEFT saves the embedding if "
                "the vocabulary was resized: put that into the base first, then delete it here"
            )
        own = _parameter_of_tensor(f"{table}.weight", modules[table][0], parameters, names)
        if own is None or not _same_weight(x, *own, names):
            raise PeftError(
                f"{PREFIX}{name} is not the weight that the model has: it was trained or resized "
                "there. Put it into the base first"
            )


def _parameter_of_tensor(
    tensor: str, module: Path, parameters: Mapping[Path, Any], names: NameMap
) -> tuple[str, Any] | None:
    """Returns the dotted path and the value of a module's parameter; None if it is in a stack."""
    if names.find(".".join(module)).stacked:
        return None
    for path, value in parameters.items():
        dotted = ".".join(path)
        if path[:-1] == module and names.tensor_names(dotted) == [tensor]:
            return dotted, value
    return None


def _same_weight(tensor: Array, path: str, value: Any, names: NameMap) -> bool:
    """Returns whether the weight that PEFT saved with an adapted embedding or head is the model's.

    One of the two may have been cast. An abstract value is not compared.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    own, stored = np.asarray(value), names.from_hf(path, value.shape, lambda name: tensor)
    same = np.array_equal(own.astype(tensor.dtype), stored)
    return same or np.array_equal(own, stored.astype(own.dtype))


def check_saved(
    model: AdaptedModel, saved: Mapping[Path, Any], layers: Mapping[Path, Layer], names: NameMap
) -> None:
    """Raises `PeftError` for modules trained in full that PEFT cannot hold, or torch has as others.

    Args:
      model: the adapted model.
      saved: the parameters of these modules, by path.
      layers: the adapted layers.
      names: which Hugging Face module each module is.
    """
    holders = {path[:n] for path in layers for n in range(len(path))}
    if bare := [path for path in saved if path[:-1] in holders]:
        raise PeftError(
            f"{layer_name(bare[0])} is trained in full and stands next to other modules; PEFT "
            "trains whole modules alone: leave it out of modules_to_save"
        )
    if not carries_arrays(model) and model.statistics:
        _refuse_statistics(layer_name(model.statistics[0][:-1]))
    modules = modules_of(model)
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
