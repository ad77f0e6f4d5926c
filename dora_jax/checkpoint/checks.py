"""Checks that adapters, settings and model belong together, before they are saved or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dora_jax.adapters.groups import ADAPTER_ARRAYS
from dora_jax.adapters.placement import host_value
from dora_jax.adapters.trees import flatten
from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import adapter_tree, layer_settings

# What a layer computes depends on these settings; on the others only how it is trained.
_OUTPUT_FIELDS = (
    "rank",
    "scaling",
    "decompose",
    "normalize",
    "magnitude_trainable",
    "eps",
    "indices",
)


def check_settings(config: DoRAConfig, settings_by_path: Mapping[Path, LayerSettings]) -> None:
    """Raises `AdapterError` unless layers compute what a configuration asks for; names the layer.

    Dropout and the kind of gradient may differ: they only act in training.
    """
    for path, settings in settings_by_path.items():
        wanted = config.layer_settings(path)
        for field in _OUTPUT_FIELDS:
            given, asked = getattr(settings, field), getattr(wanted, field)
            if given != asked:
                raise AdapterError(
                    f"{layer_name(path)}: the model has {field} {given}, the configuration of the "
                    f"adapters {asked}; adapt the model with that configuration"
                )


def check_tree(adapters: Mapping[str, Any], config: DoRAConfig, model: Any) -> None:
    """Raises `AdapterError` unless an adapter tree can be saved."""
    flat = flatten(adapters)
    layers = {path[:-1] for path in flat if path[-1] in ADAPTER_ARRAYS}
    known = set() if model is None else layer_settings(model).keys()
    for path in layers | known:  # a normalisation layer trained in full has a scale, too
        if (*path, "scale") in flat:
            raise AdapterError(
                f"{layer_name(path)} holds a precomputed scale, which is computed and not "
                "trained: save the adapters that precompute_scales was given"
            )
    if model is None:
        _check_against_config(flat, layers, config)
    else:
        adapter_tree(model, adapters)
    for path, x in flat.items():
        if not np.isfinite(host_value(x)).all():
            raise AdapterError(
                f"{'.'.join(path)} is not finite: the training diverged; go back to an earlier "
                "checkpoint"
            )


def _check_against_config(flat: Mapping[Path, Any], layers: set[Path], config: DoRAConfig) -> None:
    if config.changes_product:
        raise AdapterError(
            f"adapters that started with init={config.init!r} count by their change: save them "
            "with the adapted model, which keeps their start"
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
