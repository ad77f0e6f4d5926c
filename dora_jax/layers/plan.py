"""The plan of `apply_dora`, the same for both front ends: select layers, check them, start them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.decomposition.initializers import init_layer, is_selected
from dora_jax.errors import Path, layer_name
from dora_jax.layers.layout import Layout, Unsupported
from dora_jax.selection import check_indices, select_layers


class StoredKernel(NamedTuple):
    """A frozen kernel as the model stores it, with its stack axes; it may be abstract."""

    value: Any
    axes: KernelAxes


class LayerStart(NamedTuple):
    """How one adapted layer starts.

    Attributes:
      settings: the layer's settings.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them.
      base: what is kept of the frozen kernel.
    """

    settings: LayerSettings
    adapter: dict[str, Any]
    base: FrozenBase


def plan_layers(
    config: DoRAConfig,
    layouts: Mapping[Path, Layout],
    modules: Iterable[Path],
    unsupported: Mapping[Path, Unsupported],
) -> dict[Path, LayerSettings]:
    """Returns the settings of the layers that the configuration selects, by path.

    Args:
      config: the configuration.
      layouts: the layout of every layer that can be adapted.
      modules: the path of every module of the model.
      unsupported: why other layers that hold a kernel cannot be adapted.

    Raises:
      LayoutError: a layer that cannot be adapted is selected.
      ConfigError: a pattern matches nothing, or no layer is left.
    """
    all_linear = {path: layout.all_linear for path, layout in layouts.items()}
    return select_layers(config, all_linear, modules, unsupported)


def start_layers(
    config: DoRAConfig,
    settings: Mapping[Path, LayerSettings],
    kernels: Mapping[Path, StoredKernel],
    key: jax.Array,
    modules: Iterable[Path],
) -> dict[Path, LayerStart]:
    """Returns the adapter of each selected layer, and what it keeps of its kernel.

    A layer that `layers_to_transform` could only select as a slice of a stack is left out if it is
    no stack. `modules` are all paths of modules, as for `plan_layers`.

    Raises:
      ConfigError: `layers_to_transform` finds no layer; names the layer.
    """
    started = {}
    for path, own in settings.items():
        kernel = kernels[path]
        if is_selected(own, kernel.axes):
            adapter, base = init_layer(config, own, path, key, *kernel)
            started[path] = LayerStart(own, adapter, base)
    adapted = {path: start.settings for path, start in started.items()}
    check_indices(config, adapted, modules)
    return started


def warn_of_high_ranks(
    settings: Mapping[Path, LayerSettings], kernels: Mapping[Path, StoredKernel]
) -> None:
    """Warns of ranks above the smaller side of their kernel, where a user chose them."""
    high = []
    for path, own in settings.items():
        shape, axes = kernels[path].value.shape, kernels[path].axes
        inner, outer = (math.prod(shape[i] for i in group) for group in (axes.inputs, axes.outputs))
        if own.rank > min(inner, outer):
            high.append(f"{layer_name(path)} (rank {own.rank}, {inner} in, {outer} out)")
    if high:
        warnings.warn(
            f"the rank is above the smaller side of the kernel: {', '.join(high)}. Such a product "
            "trains more numbers than it has freedoms: train the layer in full (modules_to_save), "
            "leave it out (exclude_modules), or lower its rank (rank_pattern)",
            stacklevel=5,
        )
