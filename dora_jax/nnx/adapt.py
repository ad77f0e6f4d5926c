"""DoRA for Flax NNX: layers that carry their adapter.

An adapted layer is the same object of a subclass of its class, so that the paths and attributes of
the base model, and the base checkpoints made for them, stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from dora_jax.config import DoRAConfig
from dora_jax.decomposition.initializers import init_layer, is_selected
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.layout import Layout, stored_axes
from dora_jax.layers.registry import find_layout
from dora_jax.nnx.layers import dora_class, set_class
from dora_jax.nnx.model import adapted_layers, copy_model, named_modules
from dora_jax.nnx.tracing import (
    call_axes_of,
    check_stored_shape,
    find_unsupported,
    trace_axes,
    warn_of_uncalled,
)
from dora_jax.nnx.variables import BaseParam, DoRAParam, M, SavedParam, retype_parameters
from dora_jax.selection import check_indices, saved_paths, select_layers


def apply_dora(
    model: M, config: DoRAConfig, *, rngs: nnx.Rngs, inputs: Sequence[Any] | None = None
) -> M:
    """Returns a copy of an NNX model whose selected layers carry a DoRA adapter.

    The copy shares its arrays with `model`, which stays as it is. At this point both compute the
    same, bit for bit.

    Args:
      model: any `nnx.Module`; its arrays may be abstract (`nnx.eval_shape`).
      config: which layers, and how.
      rngs: draws `lora_a` (stream `params`), and serves the adapters' dropout.
      inputs: arguments of a call of the model, arrays or `jax.ShapeDtypeStruct`; it is traced, not
        run. Needed for layers whose equation is given with each call, and to find that a tied head
        reads an embedding that is adapted.

    Raises:
      TypeError: `rngs` is a key.
      AdapterError: the model is adapted already.
      ConfigError: a pattern matches nothing, or a rank is too high; names the layer.
      LayoutError: a named layer is of a class whose layout is not known.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> x = jnp.ones((5, 4))
      >>> bool((adapted(x) == model(x)).all()), adapted.magnitude.shape
      (True, (3,))
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, as in rngs=nnx.Rngs(0), got {type(rngs)}")
    if adapted := [path for path, _ in adapted_layers(model)]:
        raise AdapterError(
            f"the model is adapted already ({layer_name(adapted[0])} has an adapter); merge it "
            "first"
        )
    model = copy_model(model)
    modules = dict(named_modules(model))
    layers: dict[Path, tuple[Any, Layout]] = {
        path: (module, layout)
        for path, module in modules.items()
        if (layout := find_layout(type(module))) is not None
    }
    settings_by_path = select_layers(
        config,
        {path: layout.all_linear for path, (_, layout) in layers.items()},
        modules,
        find_unsupported(modules, layers),
    )
    layers = {path: layers[path] for path in settings_by_path}
    traced = {} if inputs is None else trace_axes(model, layers, tuple(inputs))
    if inputs is not None:
        warn_of_uncalled(layers.keys() - traced.keys())
    key = rngs.params()
    for path, settings in settings_by_path.items():
        layer, layout = layers[path]
        kernel = getattr(layer, layout.kernel).get_value()
        call_axes = traced[path] if path in traced else call_axes_of(path, layer, layout, {})
        axes = stored_axes(call_axes, kernel.ndim, layer_name(path))
        check_stored_shape(path, layer, kernel)
        if not is_selected(settings, axes):
            continue
        adapter, base = init_layer(config, settings, path, key, kernel, axes)
        set_class(layer, dora_class(layer.__class__))
        layer.settings, layer.call_axes = settings, call_axes
        layer.layer_path = tuple(key for key in path if not key.isdigit())
        layer.lora_dropout = nnx.Dropout(settings.dropout)
        if (
            settings.dropout
        ):  # a scan or vmap over the layer needs a key for each slice of its stack
            stream, stack = rngs.dropout, tuple(kernel.shape[i] for i in axes.stack)
            keys = jax.random.split(stream(), stack)
            layer.lora_dropout.rngs = type(stream)(keys, tag=stream.tag)
        for name, value in adapter.items():
            setattr(layer, name, DoRAParam(value))
        for name, value in base.items():
            setattr(layer, f"base_{name}", BaseParam(value))
    check_indices(config, {path: layer.settings for path, layer in adapted_layers(model)})
    for path in saved_paths(config, modules):
        retype_parameters(modules[path], nnx.Param, SavedParam)
    return model
