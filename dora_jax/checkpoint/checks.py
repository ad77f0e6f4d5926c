"""Checks before saving and loading: adapters, settings and model must belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.groups import ADAPTER_ARRAYS
from dora_jax.adapters.trees import check_finite, flatten
from dora_jax.checkpoint.manifest import path_of
from dora_jax.config import CUSTOM, OUTPUT_FIELDS, DoRAConfig, LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, CheckpointError, Path, layer_name
from dora_jax.model import adapter_tree, carries_arrays, is_adapted, layer_settings
from dora_jax.selection import is_in_saved_module


def check_settings(config: DoRAConfig, settings_by_path: Mapping[Path, LayerSettings]) -> None:
    """Raises `AdapterError` if a layer has other settings than its configuration; names the layer.

    Dropout and the kind of gradient may differ, because they affect training only.
    """
    for path, settings in settings_by_path.items():
        wanted = config.layer_settings(path)
        for field in OUTPUT_FIELDS:
            given, asked = getattr(settings, field), getattr(wanted, field)
            if given != asked:
                raise AdapterError(
                    f"{layer_name(path)}: the model has {field} {given}, the configuration of the "
                    f"adapters has {asked}; adapt the model with that configuration"
                )


def check_tree(adapters: Mapping[str, Any], config: DoRAConfig, model: Any) -> None:
    """Raises `AdapterError` unless an adapter tree can be saved."""
    flat = flatten(adapters)
    layers = {path[:-1] for path in flat if path[-1] in ADAPTER_ARRAYS}
    layers = {path for path in layers if not is_in_saved_module(config, path)}
    known = set() if model is None else layer_settings(model).keys()
    for path in layers | known:  # a normalisation layer trained in full has a scale, too
        if (*path, "scale") in flat:
            raise AdapterError(
                f"{layer_name(path)} holds a precomputed scale, which is not trained: save the "
                "adapters that precompute_scales was given"
            )
    if model is None:
        _check_against_config(flat, layers, config)
    else:
        adapter_tree(model, adapters)
    check_finite(adapters)


def check_start_of_others(config: DoRAConfig, model: Any) -> None:
    """Raises an error unless the modules that `load` leaves out with `only` have their start.

    Raises:
      TypeError: a `DoRAModel` is given, which holds no adapters.
      AdapterError: a function starts adapters, and the model is plain.
    """
    if is_adapted(model) and not carries_arrays(model):
        raise TypeError("only needs the plain module: a DoRAModel has no adapters of its own")
    if config.init_name == CUSTOM and not is_adapted(model):
        raise AdapterError(
            "only leaves the other modules as init starts them, and that is a function, which no "
            "folder holds: adapt the model with it, then load into that model"
        )


def check_ranks(
    config: DoRAConfig, flat: Mapping[Path, Any], axes: Mapping[Path, KernelAxes]
) -> None:
    """Raises `CheckpointError` if saved factors are not of the configuration's rank.

    A model adapted with that configuration would take memory for it before shapes are compared.

    Args:
      config: of the adapters.
      flat: the arrays by path.
      axes: of the adapted layers; none if they were saved without their model.
    """
    for (*layer, array), x in flat.items():
        rank = config.layer_settings(tuple(layer)).rank
        own = array == "lora_a" and (not axes or tuple(layer) in axes)
        if own and np.shape(x)[-1:] != (rank,):
            raise CheckpointError(
                f"{'.'.join((*layer, array))} has shape {np.shape(x)}, the configuration makes its "
                f"rank {rank}: the folder is damaged"
            )


def read_axes(axes: Any) -> dict[Path, KernelAxes]:
    """Returns the axes of kernels as `contents` stored them, by path.

    Raises:
      CheckpointError: a layer's are not three groups that hold each axis once; names the layer.
    """
    if not isinstance(axes, dict):
        raise CheckpointError(f"axes must be an object, not {axes!r:.100}: the folder is damaged")
    for name, groups in axes.items():
        fits = isinstance(groups, list) and len(groups) == 3
        fits = fits and all(isinstance(group, list) for group in groups)
        every: list[Any] = [axis for group in groups for axis in group] if fits else [None]
        if any(type(i) is not int for i in every) or sorted(every) != list(range(len(every))):
            raise CheckpointError(f"axes[{name!r}] is {groups!r:.100}: the folder is damaged")
    return {
        path_of(name) if name else (): KernelAxes(*map(tuple, groups))
        for name, groups in axes.items()
    }


def check_values(own: Mapping[Path, Any], saved: Mapping[Path, Any], part: str) -> None:
    """Raises `AdapterError` unless arrays have the names, shapes and dtypes of those saved.

    Args:
      own: the arrays of the run, by path.
      saved: those of its checkpoint.
      part: of the checkpoint, to name the arrays.
    """
    one, other = (
        {".".join((part, *path)): (np.shape(x), jnp.result_type(x)) for path, x in values.items()}
        for values in (own, saved)
    )
    problems = [f"{name} is not in the checkpoint" for name in one if name not in other]
    problems += [f"{name} is only in the checkpoint" for name in other if name not in one]
    problems += [
        f"{name} is {kind[1]} {kind[0]}, and was saved as {other[name][1]} {other[name][0]}"
        for name, kind in one.items()
        if other.get(name, kind) != kind
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(
            f"the checkpoint is of another model or optimiser: {'; '.join(problems[:5])}{more}"
        )


def _check_against_config(flat: Mapping[Path, Any], layers: set[Path], config: DoRAConfig) -> None:
    if config.changes_product:
        raise AdapterError(
            f"init={config.init_name!r} starts adapters away from zero, and only the adapted model "
            "keeps their initial values: save the adapters with that model"
        )
    for path in layers:
        settings = config.layer_settings(path)
        names = {p[-1] for p in flat if p[:-1] == path}
        if names != set(settings.parameter_names):
            raise AdapterError(
                f"{layer_name(path)}: the configuration asks for "
                f"{sorted(settings.parameter_names)}, the adapter has {sorted(names)}"
            )
        if settings.rank and (rank := np.shape(flat[*path, "lora_a"])[-1]) != settings.rank:
            raise AdapterError(
                f"{layer_name(path)}: the adapter has rank {rank}, the configuration "
                f"{settings.rank}"
            )
