"""Adapted NNX models with scales computed once, switched off, or mixed in a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from dora_jax.adapters.origin import check_origin
from dora_jax.adapters.serving import check_index, disable, select_adapters
from dora_jax.adapters.trees import check_shapes, flatten, tree_shapes
from dora_jax.decomposition.scale import stored_scale
from dora_jax.layers.adapted import compute_dtype
from dora_jax.nnx.layers import adapter_of, base_of, kernel_and_axes
from dora_jax.nnx.metadata import layer_metadata, variable_like
from dora_jax.nnx.model import (
    checked_layers,
    get_adapters,
    origins,
    set_adapters,
)
from dora_jax.nnx.variables import DoRAParam, M, copy_model


def precompute_scales(model: M) -> M:
    """Returns a copy of an adapted model whose layers hold their scale, computed here, once.

    The scale, `m / n`, replaces the magnitude. It depends on parameters alone. Inside a loss,
    precompute before a loop over microbatches: the norm is then evaluated, and differentiated, once
    for all of them. For inference, the scale stays fixed: a call costs what LoRA's does.

    Raises:
      AdapterError: nothing is adapted.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> precompute_scales(adapted).scale[...]
      Array([1., 1., 1.], dtype=float32)
    """
    model = copy_model(model)
    for layer in checked_layers(model).values():
        settings = layer.adapted.settings
        if not settings.decompose or settings.precomputed:
            continue
        kernel, axes = kernel_and_axes(layer)
        value = kernel.get_value()
        base, dtype = base_of(layer), compute_dtype(layer, value, value)
        product = layer.adapted.product(layer, value, axes, dtype, base)
        scale = stored_scale(settings, value, adapter_of(layer), base, product)
        if settings.has_magnitude:
            delattr(layer, "magnitude")
        metadata = layer_metadata(kernel, axes).get("scale")
        layer.scale = variable_like(DoRAParam, scale, kernel, metadata)
        settings = dataclasses.replace(settings, precomputed=True)
        layer.adapted = dataclasses.replace(layer.adapted, settings=settings)
    return model


def disabled_adapters(model: nnx.Module) -> dict[str, Any]:
    """Returns the adapter tree with which an adapted model computes what its base computes.

    `set_adapters` switches to it and back; nothing is compiled anew. Modules trained in full stay
    as they are.
    """
    layers = checked_layers(model)
    return disable(get_adapters(model), {path: base_of(layer) for path, layer in layers.items()})


def apply_mixed(model: nnx.Module, stacked: Any, index: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Applies an adapted model to a batch in which every example has an adapter of its own.

    The outputs are those of one call for each adapter. Precompute the scales first, so that norms
    are not computed for each example.

    Args:
      model: the adapted model, with precomputed scales or not.
      stacked: adapter trees of that model, from `dora_jax.adapters.stack_adapters`, with leaves
        `(adapters, ...)`.
      index: which of them each example uses, int `(batch,)`.
      *inputs: arrays with a leading batch axis.
      **kwargs: further arguments, the same for every example.

    Raises:
      AdapterError: nothing is adapted, the adapters do not fit, or an example has no index.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> model = dora.precompute_scales(
      ...     dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      ... )
      >>> both = dora.adapters.stack_adapters(
      ...     [dora.get_adapters(model), dora.disabled_adapters(model)]
      ... )
      >>> apply_mixed(model, both, jnp.array([0, 1, 0]), jnp.ones((3, 4))).shape
      (3, 3)
    """
    checked_layers(model)
    check_index(index, inputs)
    check_origin(flatten(stacked), origins(model))
    check_shapes(jax.tree.map(lambda x: x[0], stacked), tree_shapes(get_adapters(model)))
    graphdef, state = nnx.split(model)

    def one(tree: Any, *example: Any) -> Any:
        own = nnx.merge(graphdef, state, copy=True)
        set_adapters(own, tree)
        return jax.tree.map(lambda y: y[0], own(*(x[None] for x in example), **kwargs))

    return jax.vmap(one)(select_adapters(stacked, index), *inputs)
