"""The `DoRAConfig` that adapts the layers that a PEFT file has adapters for."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dora_jax.config import DoRAConfig
from dora_jax.errors import Path, layer_name
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import ModuleTensors
from dora_jax.peft.layers import Modules

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

T = TypeVar("T", int, float)


def dora_config(
    config: PeftConfig,
    adapters: Mapping[str, ModuleTensors],
    saved: Mapping[Path, Array],
    modules: Modules,
) -> DoRAConfig:
    """Returns the configuration that adapts the layers that the file has adapters for.

    Args:
      config: PEFT's configuration.
      adapters: the file's adapters, by module.
      saved: the parameters of modules that are trained in full, by path.
      modules: of the model.

    Raises:
      PeftError: one `DoRAConfig` cannot select the file's layers; names them.
    """
    if not adapters:
        raise PeftError("the file holds no adapter")
    settings: dict[Path, set[tuple[int, float]]] = collections.defaultdict(set)
    numbers: dict[Path, set[int]] = collections.defaultdict(set)
    for name in adapters:
        path, index = modules[name]
        settings[path].add((config.rank(name), float(config.alpha(name))))
        if index:
            numbers[path].add(index[0])
    for path, found in settings.items():
        if len(found) > 1:
            raise PeftError(
                f"{layer_name(path)} is a stack whose layers have several ranks or alphas (r, "
                f"lora_alpha): {sorted(found)}. Read it into a model whose layers are not stacked"
            )
    chosen = {".".join(path): next(iter(found)) for path, found in settings.items()}
    rank, rank_pattern = with_patterns({name: r for name, (r, _) in chosen.items()})
    alpha, alpha_pattern = with_patterns({name: a for name, (_, a) in chosen.items()})
    paths = {".".join(path) for path, _ in modules.values()}
    wide = any(x.dtype == np.float64 for own in adapters.values() for x in own.parts.values())
    return DoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=config.lora_dropout,
        target_modules=select_only(chosen, paths),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=_saved_modules({".".join(path[:-1]) for path in saved}, paths),
        layers_to_transform=_stack_indices(numbers, modules),
        use_rslora=config.use_rslora,
        decompose=config.use_dora,
        norm_gradient="detached",
        adapter_dtype="float64" if wide else "float32",
    )


def with_patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Returns the most frequent value, and a pattern for each module with another value.

    Example:
      >>> with_patterns({"up": 4, "down": 4, "head": 8})
      (4, {'^head': 8})
    """
    (common, _), *_ = collections.Counter(values.values()).most_common(1)
    return common, {"^" + re.escape(name): v for name, v in values.items() if v != common}


def select_only(names: Iterable[str], modules: Iterable[str]) -> str | list[str]:
    """Returns `target_modules` that selects only the given modules.

    It is a list of their names; or a regular expression, if another module's name ends in one.

    Example:
      >>> select_only(["up"], ["up", "down"]), select_only(["up"], ["up", "inner.up"])
      (['up'], 'up')
    """
    names = sorted(names)
    return "|".join(map(re.escape, names)) if _ends_of_others(names, modules) else names


def _saved_modules(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Returns `modules_to_save` that selects only the given modules."""
    names = sorted(names)
    if ends := _ends_of_others(names, modules):
        raise PeftError(
            f"modules_to_save: {ends[0]!r} would select another module too, whose name ends in it; "
            "rename one of the two"
        )
    return names


def _ends_of_others(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Returns the names that the name of another module ends in."""
    wanted = set(names)
    others = [name.split(".") for name in set(modules) - wanted]
    return sorted(wanted & {".".join(parts[i:]) for parts in others for i in range(1, len(parts))})


def _stack_indices(numbers: Mapping[Path, set[int]], modules: Modules) -> list[int] | None:
    """Returns `layers_to_transform` if only some layers of a stack have adapters, else None."""
    whole: dict[Path, set[int]] = collections.defaultdict(set)
    for path, index in modules.values():
        if index:
            whole[path].add(index[0])
    parts = {path: found for path, found in numbers.items() if found != whole[path]}
    if not parts:
        return None
    if len({frozenset(found) for found in numbers.values()}) > 1:
        raise PeftError(
            "the file has adapters of other layers of one stack than of another: "
            f"{ {layer_name(path): sorted(found) for path, found in numbers.items()} }. Read it "
            "into a model whose layers are not stacked"
        )
    return sorted(next(iter(parts.values())))
