"""`apply_dora` for Linen: a traced call shows the layers, whose adapters are a separate tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.placement import own_array
from dora_jax.adapters.trees import Tree, flatten, get_in, set_in, tree_shapes
from dora_jax.config import DoRAConfig, LayerSettings, TrainedConfig
from dora_jax.errors import AdapterError, ConfigError, Path
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.layers.plan import (
    StoredKernel,
    plan_layers,
    start_layers,
    warn_of_high_ranks,
)
from dora_jax.layers.quantized_box import has_quantized
from dora_jax.layers.quantizing import refuse_training_in_full
from dora_jax.linen.model import DoRAModel, StoredLayer, check_byte_order, remembered
from dora_jax.linen.tracing import ExampleCall, Trace, stored_traces, trace_layers
from dora_jax.selection import check_reached, saved_paths


def apply_dora(
    module: nn.Module | DoRAModel,
    config: DoRAConfig,
    *,
    params: Tree,
    rng: jax.Array,
    inputs: Sequence[Any] | ExampleCall,
) -> tuple[DoRAModel, dict[str, Any]]:
    """Returns an adapted model and its adapters, for a Linen module and its parameters.

        params    {"up": {"kernel": (in, out), "bias": (out,)}, ...}  stay as they are
        adapters  {"up": {"lora_a": (in, r), "lora_b": (r, out), "magnitude": (out,)}, ...}

    Both models compute the same at this point, bit for bit. The adapters share no memory.

    Args:
      module: any `flax.linen.Module`.
      config: which layers, and how.
      params: the module's `params` collection (not the dict around it).
      rng: draws `lora_a`.
      inputs: arguments of a call, arrays or `jax.ShapeDtypeStruct`; anything else (True, None, a
        name) is static. The call is traced, not run, to see which layers there are. An
        `ExampleCall` for one with keyword arguments, another method or further collections.

    Returns:
      The model, for `model.apply({"params": params, "dora": adapters}, *inputs)`, and the adapter
      tree: nested dicts by module path.

    Raises:
      AdapterError: the module is adapted already, or the call does not use its parameters.
      ConfigError: a pattern matches nothing that the call reaches; names the nearest layers.
      LayoutError: a named layer is of a class whose layout is not known, or the model computes
        its kernel, or with it outside of the layer.

    Warns:
      UserWarning: a rank is above the smaller side of its kernel, or `params` has selected layers
        that the call does not reach; names the layers.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> jax.tree.map(jnp.shape, adapters)
      {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}
    """
    module = _checked_module(module, params)
    call = inputs if isinstance(inputs, ExampleCall) else ExampleCall(inputs)
    return _adapt(module, config, params, rng, call)


def _adapt(
    module: nn.Module, config: DoRAConfig, params: Tree, rng: jax.Array, call: ExampleCall
) -> tuple[DoRAModel, dict[str, Any]]:
    """Does what `apply_dora` does, with arguments that were checked."""
    trace = trace_layers(module, params, call)
    layouts = {path: layer.layout for path, layer in trace.layers.items()}
    unreached = _unreached(params, trace)
    check_reached(config, trace.modules, unreached)
    parts = [*trace.modules, *unreached, *_bare_parameters(params, trace)]
    settings = plan_layers(config, layouts, parts, trace.unsupported)
    stored = _stored_layers(module, params, call, trace, settings)
    kernels = {p: StoredKernel(layer.kernel(params), layer.axes) for p, layer in stored.items()}
    if not isinstance(config, TrainedConfig):
        warn_of_high_ranks(settings, kernels)
    started = start_layers(config, settings, kernels, rng, [*trace.modules, *unreached])
    layers = {path: stored[path] for path in started}
    base = {path: start.base for path, start in started.items()}
    saved = saved_paths(config, parts)
    arrays = {path: layers[path].boxed(start.adapter) for path, start in started.items()}
    adapters = _adapter_tree(arrays, params, saved)
    statistics = [p for p in sorted(trace.statistics) if any(p[: len(s)] == s for s in saved)]
    model = DoRAModel(module, config, layers, base, tree_shapes(adapters), statistics)
    return model, remembered(model, adapters)


def _checked_module(module: nn.Module | DoRAModel, params: Tree) -> nn.Module:
    """Returns the module; raises `DoRAError` if it is adapted, or the parameters are others."""
    if isinstance(module, DoRAModel):
        raise AdapterError("the module is adapted already: merge it first")
    if "params" in params:
        raise ConfigError("params must be the collection itself: pass variables['params']")
    check_byte_order(params)
    return module


def _unreached(params: Tree, trace: Trace) -> dict[Path, bool]:
    """Returns the modules whose parameters the call does not reach, and which are dense layers."""
    found: dict[Path, bool] = {}
    for (*path, name), leaf in flatten(params).items():
        if (module := tuple(path)) not in trace.modules:
            is_dense = name == "kernel" and np.ndim(leaf) >= 2
            found[module] = found.get(module, False) or is_dense
    return found


def _adapter_tree(
    layers: Mapping[Path, Tree], params: Tree, saved: Sequence[Path]
) -> dict[str, Any]:
    """Returns the adapters of layers, with the parameters of modules trained in full."""
    adapters: Any = {}
    for path, adapter in layers.items():
        adapters = set_in(adapters, path, adapter)
    for path in saved:
        if has_quantized(get_in(params, path)):
            raise refuse_training_in_full(path)
        own = jax.tree.map(own_array, get_in(params, path))
        adapters = set_in(adapters, path, own)
    return adapters


def _bare_parameters(params: Tree, trace: Trace) -> list[Path]:
    """Returns the paths of parameters next to other modules, as the class token of a ViT is.

    A parameter of a module without others inside is named by its module.
    """
    holders = {path[:n] for path in trace.modules for n in range(len(path))}
    holders -= trace.layers.keys() | trace.unsupported.keys()
    return [path for path in flatten(params) if path[:-1] in holders]


def _stored_layers(
    module: nn.Module,
    params: Tree,
    call: ExampleCall,
    trace: Trace,
    settings: dict[Path, LayerSettings],
) -> dict[Path, StoredLayer]:
    """Returns the selected layers with the axes of their stored kernels."""
    stored = {}
    for path, (traced, positions, axes, shape) in stored_traces(
        module, params, call, trace, settings
    ).items():
        whole = tuple(shape[i] for i in axes.inputs)
        adapted = AdaptedLayer(settings[path], traced.layout, traced.axes, path, whole)
        box = get_in(params, (*path, traced.layout.kernel))
        box = box.replace(value=None) if isinstance(box, meta.Partitioned) else None
        stored[path] = StoredLayer(adapted, axes, positions, traced.dtype, traced.module, box)
    return stored
