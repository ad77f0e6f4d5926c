"""Checks that adapters, settings and model belong together, before they are saved or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters import flatten
from dora_jax.config import AdapterError, AdapterSpec, DoRAConfig, Path, layer_name
from dora_jax.optim import ADAPTER_ARRAYS
from dora_jax.storage import host_value

# What a layer computes depends on these settings; on the others only how it is trained.
_ACTING = ("rank", "scaling", "decompose", "normalize", "magnitude_trainable", "eps", "indices")


def check_settings(config: DoRAConfig, specs: Mapping[Path, AdapterSpec]) -> None:
    """Raises `AdapterError` unless layers compute what a configuration asks for; names the layer.

    Dropout and the kind of gradient may differ: they only act in training.
    """
    for path, spec in specs.items():
        wanted = config.spec(path)
        for field in _ACTING:
            given, asked = getattr(spec, field), getattr(wanted, field)
            if given != asked:
                raise AdapterError(
                    f"{layer_name(path)}: the model has {field} {given}, the configuration of the "
                    f"adapters {asked}; adapt the model with that configuration"
                )


def layer_specs(model: Any) -> dict[Path, AdapterSpec]:
    """Returns the settings of the adapted layers of an NNX model or a `DoRAModel`."""
    if isinstance(model, dora_linen.DoRAModel):
        return {path: layer.spec for path, layer in model.layers.items()}
    return {path: layer.spec for path, layer in dora_nnx.adapted_layers(model)}


def check_tree(adapters: Mapping[str, Any], config: DoRAConfig, model: Any) -> None:
    """Raises `AdapterError` unless an adapter tree can be saved."""
    flat = flatten(adapters)
    layers = {path[:-1] for path in flat if path[-1] in ADAPTER_ARRAYS}
    known = set() if model is None else layer_specs(model).keys()
    for path in layers | known:  # a normalisation layer trained in full has a scale, too
        if (*path, "scale") in flat:
            raise AdapterError(
                f"{layer_name(path)} is hoisted: save the adapters that were hoisted, a scale is "
                "computed and not trained"
            )
    if isinstance(model, dora_linen.DoRAModel):
        dora_linen.check_adapters(model, adapters)
    elif model is None:
        _check_against_config(flat, layers, config)
    for path, x in flat.items():
        if not np.isfinite(host_value(x)).all():
            raise AdapterError(
                f"{'.'.join(path)} is not finite: the training diverged; go back to an earlier "
                "checkpoint"
            )


def _check_against_config(flat: Mapping[Path, Any], layers: set[Path], config: DoRAConfig) -> None:
    if config.changes_product:
        raise AdapterError(
            f"adapters that started with init={config.init!r} act by what they changed: pass the "
            "adapted model in place of the configuration, it keeps what they started from"
        )
    for path in layers:
        spec = config.spec(path)
        names = {p[-1] for p in flat if p[:-1] == path}
        if names != set(spec.parameter_names):
            raise AdapterError(
                f"{layer_name(path)}: the configuration asks for {sorted(spec.parameter_names)}, "
                f"the adapter has {sorted(names)}"
            )
        if spec.rank and (rank := np.shape(flat[*path, "lora_a"])[-1]) != spec.rank:
            raise AdapterError(
                f"{layer_name(path)}: the adapter has rank {rank}, the configuration {spec.rank}"
            )
