"""DoRA for Flax Linen: a method interceptor around `Module.apply`.

The adapters travel inside `params` beside the kernels they adapt, so that whatever the model does
with its own parameters (`nn.scan`, `nn.vmap`, `nn.remat`, `nn.share_scope`) it does with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree, get_in, set_in, tree_shapes
from dora_jax.config import DoRAConfig
from dora_jax.decomposition.initializers import init_layer, is_selected
from dora_jax.errors import AdapterError, ConfigError
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.linen.model import DoRAModel
from dora_jax.linen.stack_axes import is_in_front
from dora_jax.linen.tracing import stored_kernel_axes, trace_layers
from dora_jax.selection import check_indices, saved_paths, select_layers


def apply_dora(
    module: nn.Module | DoRAModel,
    config: DoRAConfig,
    *,
    params: Tree,
    rng: jax.Array,
    inputs: Sequence[Any],
    variables: Tree | None = None,
    method: Callable[..., Any] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[DoRAModel, dict[str, Any]]:
    """Returns an adapted model and its adapters, for a Linen module and its parameters.

    Nothing is changed in `module` or `params`. At this point both models compute the same, bit for
    bit.

    Args:
      module: any `flax.linen.Module`.
      config: which layers, and how.
      params: the module's `params` collection (not the dict around it).
      rng: draws `lora_a`.
      inputs: arguments of a call, arrays or `jax.ShapeDtypeStruct`: the call is traced, not run, to
        see which layers there are.
      variables: further collections that the call reads, such as `batch_stats`.
      method: the method to trace, if not `__call__`.
      kwargs: keyword arguments of the call.

    Returns:
      The model, for `model.apply({"params": params, "dora": adapters}, *inputs)`, and the adapter
      tree: nested dicts by module path.

    Raises:
      AdapterError: the module is adapted already, or the call does not use its parameters.
      ConfigError: a pattern matches nothing, or a rank is too high; names the layer.
      LayoutError: a named layer is of a class whose layout is not known.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> jax.tree.map(jnp.shape, adapters)
      {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}
      >>> y = model.apply({"params": params, "dora": adapters}, x)
      >>> bool((y == module.apply({"params": params}, x)).all())
      True
    """
    if isinstance(module, DoRAModel):
        raise AdapterError("the module is adapted already: merge it first")
    if "params" in params:
        raise ConfigError("params must be the collection itself: pass variables['params']")
    trace = functools.partial(
        trace_layers, module, params, inputs, variables or {}, method, kwargs or {}
    )
    found, modules = trace()
    settings_by_path = select_layers(
        config,
        {path: layer.layout.all_linear for path, layer in found.items()},
        modules,
        {path: refusal for path, refusal in modules.items() if refusal},
    )
    kernels = {
        p: meta.unbox(get_in(params, (*p, found[p].layout.kernel))) for p in settings_by_path
    }
    unclear = [
        p for p in settings_by_path if not is_in_front(kernels[p].shape, found[p].kernel_shape)
    ]
    if unclear:
        found, _ = trace([(*path, found[path].layout.kernel) for path in unclear])
    layers, base = {}, {}
    adapters: dict[str, Any] = {}
    for path, settings in settings_by_path.items():
        layout, kernel = found[path].layout, kernels[path]
        positions, axes = stored_kernel_axes(path, found[path], kernel.shape)
        if not is_selected(settings, axes):
            continue
        adapter, base[path] = init_layer(config, settings, path, rng, kernel, axes)
        adapters = set_in(adapters, path, adapter)
        traced = found[path]
        layers[path] = AdaptedLayer(
            settings,
            layout,
            axes,
            traced.axes,
            positions,
            traced.dtype,
            traced.precision,
            traced.module,
        )
    check_indices(config, {path: layer.settings for path, layer in layers.items()})
    for path in saved_paths(config, modules):
        adapters = set_in(adapters, path, meta.unbox(get_in(params, path)))
    return DoRAModel(module, config, layers, base, tree_shapes(adapters)), adapters
