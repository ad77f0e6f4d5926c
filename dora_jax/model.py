"""An adapted model of either front end, seen alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import flatten, nest
from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.errors import Path
from dora_jax.linen.model import DoRAModel
from dora_jax.nnx.variables import BaseParam, nnx_values, set_nnx_values

M = TypeVar("M")
Bases = Mapping[Path, Mapping[str, Any]]
_PREFIX = "base_"


def bases_of(model: Any) -> dict[Path, dict[str, Any]]:
    """Returns what each adapted layer of an NNX model or a `DoRAModel` keeps of its base."""
    if isinstance(model, DoRAModel):
        return {path: dict(base) for path, base in model.base.items()}
    values = nnx_values(model, BaseParam)
    return group_bases({(*p[:-1], p[-1].removeprefix(_PREFIX)): x for p, x in values.items()})


def group_bases(flat: Mapping[Path, Any]) -> dict[Path, dict[str, Any]]:
    """Returns arrays by path and name, grouped by path."""
    bases: dict[Path, dict[str, Any]] = {}
    for path, value in flat.items():
        bases.setdefault(path[:-1], {})[path[-1]] = value
    return bases


def with_bases(model: M, bases: Bases) -> M:
    """Puts what `bases_of` returned back; an NNX model is changed in place."""
    if isinstance(model, DoRAModel):
        placed = {
            path: {
                name: device_put_like(base[name], like) for name, like in model.base[path].items()
            }
            for path, base in bases.items()
        }
        return dataclasses.replace(model, base={**model.base, **placed})
    values = {
        (*path, _PREFIX + name): value
        for path, base in bases.items()
        for name, value in base.items()
    }
    set_nnx_values(model, BaseParam, values)
    return model


def layer_settings(model: Any) -> dict[Path, LayerSettings]:
    """Returns the settings of the adapted layers of an NNX model or a `DoRAModel`."""
    if isinstance(model, dora_linen.DoRAModel):
        return {path: layer.settings for path, layer in model.layers.items()}
    return {path: layer.settings for path, layer in dora_nnx.adapted_layers(model)}


Tree = Mapping[str, Any]


def _adapt(model: Any, config: DoRAConfig, kwargs: Mapping[str, Any]) -> tuple[Any, Tree]:
    """Returns an adapted model, and its adapter tree, whether it was adapted before or not."""
    if isinstance(model, nnx.Module):
        if any(True for _ in dora_nnx.adapted_layers(model)):
            _refuse(kwargs)
            model = nnx.merge(*nnx.split(model), copy=True)
        else:
            model = dora_nnx.apply_dora(model, config, **{"rngs": nnx.Rngs(0), **kwargs})
        return model, dora_nnx.get_adapters(model)
    if isinstance(model, dora_linen.DoRAModel):
        _refuse(kwargs)
        abstract = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in model.shapes.items()}
        return model, nest(abstract)
    return dora_linen.apply_dora(model, config, **{"rng": jax.random.key(0), **kwargs})


def _refuse(kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"the model is adapted already, so it takes no {', '.join(kwargs)}")


def base_parameters(model: Any, params: Any = None) -> dict[Path, Any]:
    """Returns the base's parameters by path: arrays, or their shapes where they are abstract."""
    if isinstance(model, nnx.Module):
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {tuple(map(str, path)): variable.get_value() for path, variable in state}
    if params is None:
        raise TypeError("a Linen model needs params too: the collection, as for apply_dora")
    return flatten(meta.unbox(params))


def abstract(tree: Any) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct` for one of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
