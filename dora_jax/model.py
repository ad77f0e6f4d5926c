"""An adapted model of either front end, seen alike.

What works on adapted models (checkpoints, PEFT, analysis, the command) asks these functions. Only
they, the front ends and `api` tell Linen from NNX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import Tree, boxed_like, flatten, nest, tree_shapes, unboxed
from dora_jax.config import DoRAConfig, LayerSettings, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import AdapterError, Path
from dora_jax.layers.layout import Layout
from dora_jax.linen import DoRAModel
from dora_jax.nnx.layers import BASE_PREFIX, base_of, plain_class
from dora_jax.nnx.model import named_modules
from dora_jax.nnx.variables import BaseParam, DoRAParam, copy_model, nnx_values, set_nnx_values

M = TypeVar("M")
# Variables of an NNX model that a call changes: running means, and counters of random streams.
STATISTICS, STREAMS = nnx.BatchStat, nnx.RngState
AdaptedModel = Any  # an NNX module or a `DoRAModel`: what `apply_dora` returns of either front end


class ModelLayer(NamedTuple):
    """An adapted layer of a model.

    Attributes:
      path: of its module.
      settings: the layer's settings.
      layout: of its class.
      axes: of the stored kernel.
      layer_class: the plain Flax class.
      module: the layer, for its attributes.
      base: what is kept of the frozen kernel.
    """

    path: Path
    settings: LayerSettings
    layout: Layout
    axes: KernelAxes
    layer_class: type
    module: Any
    base: FrozenBase


class Plain(NamedTuple):
    """Arguments with which `apply_dora` adapts a plain model, as far as they are given.

    Attributes:
      rngs: `nnx.Rngs` for NNX, a key for Linen; by default of seed 0.
      params, inputs: as for `apply_dora`.
    """

    rngs: Any = None
    params: Any = None
    inputs: Any = None


def is_adapted(model: Any) -> bool:
    """Returns whether a model of either front end has adapted layers.

    Raises:
      TypeError: it is no Flax model.
    """
    if isinstance(model, DoRAModel):
        return True
    if isinstance(model, nnx.Module):
        return bool(dora_nnx.adapted_layers(model)) or bool(nnx.state(model, DoRAParam))
    if isinstance(model, linen.Module):
        return False
    raise TypeError(f"expected a Flax module or a DoRAModel, got {type(model)}")


def carries_arrays(model: Any) -> bool:
    """Returns whether a model holds its own parameters and adapters, as NNX models do."""
    return isinstance(model, nnx.Module)


def adapt(model: Any, config: DoRAConfig, plain: Plain) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns an adapted model and its adapter tree, whether or not it was adapted before.

    What is given stays as it is. The tree of a `DoRAModel`, which holds no adapters, is abstract.

    Raises:
      TypeError: `plain` is given for a model that is adapted already, or lacks `params`.
      DoRAError: see `apply_dora`.
    """
    if is_adapted(model):
        if given := [name for name, value in plain._asdict().items() if value is not None]:
            raise TypeError(f"the model is adapted already, so it takes no {', '.join(given)}")
        if isinstance(model, DoRAModel):
            shapes = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in model.shapes.items()}
            return model, nest(shapes)
        model = copy_model(model)
        return model, dora_nnx.get_adapters(model)
    if isinstance(model, nnx.Module):
        if plain.params is not None:
            raise TypeError("an NNX model carries its arrays: leave out params")
        model = dora_nnx.adapt_to_load(model, config, plain.rngs, plain.inputs)
        return model, dora_nnx.get_adapters(model)
    if plain.params is None or plain.inputs is None:
        raise TypeError("a Linen module needs params and inputs too")
    rng = jax.random.key(0) if plain.rngs is None else plain.rngs
    config = TrainedConfig.of(config)
    return dora_linen.apply_dora(model, config, params=plain.params, rng=rng, inputs=plain.inputs)


def adapt_abstract(model: Any, config: DoRAConfig, plain: Plain) -> AdaptedModel:
    """Returns a plain model adapted without making an array, to learn its layers and shapes."""
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        return adapt(nnx.merge(graphdef, abstract(state)), config, plain)[0]
    params = None if plain.params is None else abstract(plain.params)
    return adapt(model, config, plain._replace(params=params))[0]


def model_layers(model: AdaptedModel) -> dict[Path, ModelLayer]:
    """Returns the adapted layers of a model, by path."""
    found = {}
    if isinstance(model, DoRAModel):
        for path, stored in model.layers.items():
            known, module, base = stored.adapted, stored.module, model.base[path]
            found[path] = ModelLayer(
                path, known.settings, known.layout, stored.axes, type(module), module, base
            )
        return found
    for path, layer in dora_nnx.adapted_layers(model).items():
        known, base = layer.adapted, base_of(layer)
        _, axes = dora_nnx.kernel_and_axes(layer)
        layer_class = plain_class(type(layer))
        found[path] = ModelLayer(path, known.settings, known.layout, axes, layer_class, layer, base)
    return found


def layer_settings(model: AdaptedModel) -> dict[Path, LayerSettings]:
    """Returns the settings of the adapted layers of a model, by path."""
    return {path: layer.settings for path, layer in model_layers(model).items()}


def layer_axes(model: AdaptedModel) -> dict[Path, KernelAxes]:
    """Returns the axes of the stored kernels of the adapted layers, by path."""
    return {path: layer.axes for path, layer in model_layers(model).items()}


def adapter_shapes(model: AdaptedModel) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every array of a model's adapter tree, by path."""
    if isinstance(model, DoRAModel):
        return dict(model.shapes)
    return tree_shapes(dora_nnx.get_adapters(model))


def adapter_tree(model: AdaptedModel, adapters: Tree | None = None) -> Tree:
    """Returns the adapter tree of a model: the one given, or the one that an NNX model carries.

    Raises:
      TypeError: a `DoRAModel` is given without its adapters.
      AdapterError: the tree does not fit the model; names each array.
    """
    if isinstance(model, DoRAModel):
        if adapters is None:
            raise TypeError("a Linen model needs its adapters too")
        dora_linen.check_adapters(model, adapters)
        return cast("Tree", unboxed(adapters))
    return dora_nnx.get_adapters(model) if adapters is None else adapters


def with_adapter_arrays(
    model: AdaptedModel, own: Tree, values: Mapping[Path, Any]
) -> AdaptedModel | tuple[DoRAModel, dict[str, Any]]:
    """Returns what `apply_dora` returns, with other adapter arrays.

    Args:
      model: what `adapt` returned; an NNX model is changed in place.
      own: the adapter tree that `adapt` returned.
      values: the new arrays by path. They are placed as those in their place; arrays that are not
        given stay.
    """
    if isinstance(model, DoRAModel):
        flat = flatten(own)
        placed = {path: device_put_like(x, flat[path]) for path, x in values.items()}
        return model, dora_linen.remembered(model, boxed_like(nest(flat | placed), own))
    set_nnx_values(model, DoRAParam, values)
    return model


def mutable_arrays(model: AdaptedModel, kind: type[nnx.Variable]) -> dict[Path, Any]:
    """Returns the arrays of an NNX model that calls change, by path; none of a `DoRAModel`.

    A Linen model has its own apart, in collections and keys. `kind` is one of the two above.
    """
    return nnx_values(model, kind) if carries_arrays(model) else {}


def set_mutable_arrays(
    model: AdaptedModel, kind: type[nnx.Variable], values: Mapping[Path, Any]
) -> None:
    """Puts the arrays of `mutable_arrays` into an NNX model, in place."""
    set_nnx_values(model, kind, values)


def base_records(model: AdaptedModel) -> dict[Path, FrozenBase]:
    """Returns what each adapted layer of a model keeps of its frozen kernel."""
    return {path: layer.base for path, layer in model_layers(model).items()}


def with_base_records(model: M, records: Mapping[Path, FrozenBase]) -> M:
    """Returns a model whose layers keep other records; an NNX model is changed in place.

    Arrays are placed on the devices, and in the sharding, of those in their place.
    """
    if isinstance(model, DoRAModel):
        placed = {
            path: jax.tree.map(device_put_like, record, model.base[path])
            for path, record in records.items()
        }
        return dataclasses.replace(model, base={**model.base, **placed})
    values = {
        (*path, BASE_PREFIX + name): value
        for path, record in records.items()
        for name, value in record.arrays().items()
    }
    set_nnx_values(model, BaseParam, values)
    return model


def check_own_base(model: AdaptedModel) -> None:
    """Raises `AdapterError` if an NNX model's kernel is not the one its adapter was made for."""
    if isinstance(model, nnx.Module):
        dora_nnx.check_base(model)


def base_parameters(model: Any, params: Any = None) -> dict[Path, Any]:
    """Returns the base's parameters by path: arrays, or their shapes where they are abstract.

    Raises:
      TypeError: a Linen model is given without `params`.
    """
    if isinstance(model, nnx.Module):
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {tuple(map(str, path)): variable.get_value() for path, variable in state}
    if params is None:
        raise TypeError("a Linen model needs params too: the collection, as for apply_dora")
    return flatten(params)


def parameter_tree(model: Any) -> Any:
    """Returns the tree of a plain model's parameters, its boxes included.

    Args:
      model: an NNX model, whose `nnx.Param` and `nnx.BatchStat` are returned; or, of a Linen model,
        the tree itself.

    Raises:
      AdapterError: the model is adapted.
      TypeError: a Linen module is given in place of its parameters.
    """
    if isinstance(model, linen.Module):
        raise TypeError("a Linen module holds no parameters: give its params collection")
    if isinstance(model, DoRAModel):
        raise AdapterError("this is a DoRAModel: give the parameters, merged to be saved")
    if not isinstance(model, nnx.Module):
        return model
    if is_adapted(model):
        raise AdapterError(
            "the model is adapted: load the base before apply_dora; save it after merge"
        )
    return nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))


def with_parameter_tree(model: M, tree: Any) -> M:
    """Returns a copy of a model or tree, as for `parameter_tree`, with other parameters."""
    if not isinstance(model, nnx.Module):
        return tree
    copy = copy_model(model)
    nnx.update(copy, tree)
    return copy


def modules_of(model: Any) -> dict[Path, Any]:
    """Returns the modules of an NNX model by path; a Linen model has them in a call only."""
    return dict(named_modules(model)) if isinstance(model, nnx.Module) else {}


def abstract(tree: Any) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct` for one of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
