"""The `DoRAConfig` that adapts the layers that a PEFT file has adapters of."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.config import DoRAConfig
from dora_jax.errors import Path, layer_name
from dora_jax.peft.config import FILE, PeftConfig, PeftError
from dora_jax.peft.keys import PREFIX

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def dora_config(
    config: PeftConfig,
    adapters: Mapping[str, Mapping[str, Array]],
    saved: Mapping[Path, Array],
    known: Mapping[str, tuple[Path, tuple[int, ...]]],
) -> DoRAConfig:
    """Returns the configuration that adapts the layers that the file has adapters of."""
    settings: dict[Path, set[tuple[int, float]]] = collections.defaultdict(set)
    numbers: dict[Path, set[int]] = collections.defaultdict(set)
    for module, parts in adapters.items():
        path, index = known[module]
        settings[path].add((_rank(config, module, parts), float(config.alpha(module))))
        if index:
            numbers[path].add(index[0])
    for path, found in settings.items():
        if len(found) > 1:
            raise PeftError(
                f"{layer_name(path)} is a stack whose layers have several ranks or alphas (r, "
                f"lora_alpha): {sorted(found)}. Read it into a model whose layers are not stacked"
            )
    if not settings:
        raise PeftError("the file holds no adapter")
    wide = any(x.dtype == np.float64 for parts in adapters.values() for x in parts.values())
    chosen = {path: next(iter(found)) for path, found in settings.items()}
    (rank, _), *_ = collections.Counter(r for r, _ in chosen.values()).most_common(1)
    (alpha, _), *_ = collections.Counter(a for _, a in chosen.values()).most_common(1)
    modules = {path for path, _ in known.values()}
    return DoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=config.lora_dropout,
        target_modules=_targets(settings, modules),
        rank_pattern={_key(path): r for path, (r, _) in chosen.items() if r != rank},
        alpha_pattern={_key(path): a for path, (_, a) in chosen.items() if a != alpha},
        modules_to_save=saved_modules({path[:-1] for path in saved}, modules),
        layers_to_transform=_indices(numbers, known),
        use_rslora=config.use_rslora,
        decompose=config.use_dora,
        norm_gradient="detached",
        adapter_dtype="float64" if wide else "float32",
    )


def _rank(config: PeftConfig, module: str, parts: Mapping[str, Array]) -> int:
    """Returns the rank of a module's adapter, which both files have to agree on."""
    rank = config.rank(module)
    part, a = next((part, x) for part, x in parts.items() if "_A" in part)
    if a.ndim < 2 or a.shape[0] != rank:
        raise PeftError(
            f"{PREFIX}{module}.{part} has shape {a.shape}, but r or rank_pattern in {FILE} makes "
            f"its rank {rank}: the two files do not belong together"
        )
    return rank


def _indices(
    numbers: Mapping[Path, set[int]], known: Mapping[str, tuple[Path, tuple[int, ...]]]
) -> list[int] | None:
    """Returns `layers_to_transform` if the file has adapters of some layers of a stack only."""
    whole: dict[Path, set[int]] = collections.defaultdict(set)
    for path, index in known.values():
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


def _targets(paths: Iterable[Path], modules: Iterable[Path]) -> str | list[str]:
    """Returns the names of these modules; or a pattern, if one is the end of another's name."""
    names = sorted(".".join(path) for path in paths)
    return "|".join(map(re.escape, names)) if _ends(names, modules) else names


def saved_modules(paths: Iterable[Path], modules: Iterable[Path]) -> list[str]:
    names = sorted(".".join(path) for path in paths)
    if ends := _ends(names, modules):
        raise PeftError(
            f"modules_to_save: {ends[0]!r} would select another module too, whose name ends in it; "
            "rename one of the two"
        )
    return names


def _ends(names: Iterable[str], modules: Iterable[Path]) -> list[str]:
    """Returns those names that the names of other modules end in."""
    wanted = set(names)
    others = [path for path in set(modules) if ".".join(path) not in wanted]
    return sorted(wanted & {".".join(path[i:]) for path in others for i in range(1, len(path))})


def _key(path: Path) -> str:
    """Returns the key of a pattern that matches one module alone."""
    return "^" + re.escape(".".join(path))
