"""Linen adapters merged into the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from dora_jax.adapters.trees import Tree, get_in, overlay, set_in, tree_shapes
from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import describe_base
from dora_jax.decomposition.merge import merge_kernel, warn_of_rounding
from dora_jax.errors import AdapterError, ConfigError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.layers.dense import DENSE
from dora_jax.linen.model import DoRAModel, check_adapters, check_base, saved_modules
from dora_jax.selection import match_modules


def merge(params: Tree, adapters: Tree, config: DoRAConfig | DoRAModel) -> dict[str, Any]:
    """Returns plain parameters with the merged kernels, of the structure of `params`.

    Args:
      params: the base's `params` collection.
      adapters: the adapter tree.
      config: the configuration, if every adapted kernel's axes are (stack, in, out); the adapted
        model serves every layout.

    Raises:
      AdapterError: an adapter has no kernel in `params`, its shapes do not fit, or an array that
        `config` asks for is missing; names the layer.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away; says how much.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> config = dora.DoRAConfig(rank=2)
      >>> model, adapters = dora.apply_dora(
      ...     module, config, params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> bool((merge(params, adapters, config)["kernel"] == params["kernel"]).all())
      True
    """
    if isinstance(config, DoRAModel):
        check_adapters(config, adapters)
        check_base(config, params)
        layers = config.layers
    else:
        layers = _layers_from_shapes(params, adapters, config)
        _check_saved(config, saved_modules(layers, adapters))
    merged: Tree = params
    lost = {}
    for path, layer in layers.items():
        settings, layout, axes = layer.settings, layer.layout, layer.axes
        own = get_in(params, path)
        kernel = meta.unbox(own[layout.kernel])
        if isinstance(config, DoRAModel):
            base = config.base[path]
        else:
            base = _describe_base(kernel, axes, settings.eps)
        new, lost[path] = merge_kernel(settings, kernel, get_in(adapters, path), base, axes)
        new = meta.replace_boxed(own[layout.kernel], new)
        merged = set_in(merged, path, {**own, layout.kernel: new})
    warn_of_rounding(lost)
    return overlay(merged, saved_modules(layers, adapters))


_describe_base = jax.jit(describe_base, static_argnums=(1, 2))


def _check_saved(config: DoRAConfig, saved: Tree) -> None:
    leaves = tree_shapes(saved)
    modules = {".".join(path[:i]) for path in leaves for i in range(1, len(path))}
    try:
        match_modules(config.modules_to_save, modules, "modules_to_save")
    except ConfigError as error:
        raise AdapterError(f"the adapters lack a module trained in full: {error}") from error


def _layers_from_shapes(
    params: Tree, adapters: Tree, config: DoRAConfig
) -> dict[Path, AdaptedLayer]:
    """Returns the adapted layers of a tree whose kernels are laid out as (stack, in, out)."""
    layers = {}
    for path in _adapter_paths(adapters):
        adapter, settings = get_in(adapters, path), config.layer_settings(path)
        if config.changes_product or settings.indices is not None:
            raise AdapterError(
                f"{layer_name(path)}: init={config.init!r} and layers_to_transform need what was "
                "kept of the base: pass the adapted model in place of the configuration"
            )
        _check_names(path, settings, adapter)
        own = get_in(params, path)
        if "kernel" not in own:
            raise AdapterError(
                f"{layer_name(path)}: there is an adapter, but no 'kernel' among its parameters"
            )
        axes = _axes_from_shapes(path, np.shape(meta.unbox(own["kernel"])), adapter)
        layers[path] = AdaptedLayer(settings, DENSE, axes, axes)
    return layers


def _adapter_paths(adapters: Tree, path: Path = ()) -> list[Path]:
    if {"lora_a", "lora_b", "magnitude"} & set(adapters):
        return [path]
    inner = ((k, v) for k, v in adapters.items() if isinstance(v, Mapping))
    return [found for k, v in inner for found in _adapter_paths(v, (*path, k))]


def _check_names(path: Path, settings: LayerSettings, adapter: Tree) -> None:
    wanted, given = set(settings.parameter_names), set(adapter)
    if wanted != given:
        raise AdapterError(
            f"{layer_name(path)}: the configuration asks for {sorted(wanted)}, the "
            f"adapter has {sorted(given)}"
        )


def _axes_from_shapes(path: Path, kernel: tuple[int, ...], adapter: Tree) -> KernelAxes:
    """Returns the axes of a kernel laid out as (stack, in, out), from its adapter's shapes.

    A magnitude alone does not tell stack from out axes: it is taken for a dense kernel's.
    """
    ndim, outputs, inputs = len(kernel), 1, 1
    if "lora_a" in adapter:
        a, b = (np.ndim(adapter[name]) for name in ("lora_a", "lora_b"))
        inputs, outputs = ndim - b + 1, ndim - a + 1
    stack, order = ndim - inputs - outputs, tuple(range(ndim))
    rank = np.shape(adapter["lora_a"])[-1] if "lora_a" in adapter else 0
    if min(stack, inputs, outputs) >= 0:
        axes = KernelAxes(order[:stack], order[stack : stack + inputs], order[stack + inputs :])
        expected = axes.shapes(kernel, rank)
        if all(np.shape(value) == expected[name] for name, value in adapter.items()):
            return axes
    shapes = {name: np.shape(value) for name, value in adapter.items()}
    raise AdapterError(
        f"{layer_name(path)}: the adapter {shapes} does not fit the kernel {kernel} laid out as "
        "(stack, in, out); check the base, or pass the adapted model in place of the configuration"
    )
