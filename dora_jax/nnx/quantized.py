"""NNX models with quantised kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, LayoutError, Path, layer_name
from dora_jax.layers.layout import Layout, is_kernel, quantised, stored_axes
from dora_jax.layers.quantizing import ADAPTED, Chosen
from dora_jax.layers.registry import check_not_intercepted, find_layout
from dora_jax.nnx.model import adapted_layers, named_modules
from dora_jax.nnx.tracing import call_axes_of, trace_axes
from dora_jax.nnx.variables import M, copy_model


def quantize(model: M, chosen: Chosen, inputs: Sequence[Any] | None) -> M:
    """Returns a copy of a model whose chosen kernels are `QuantizedKernel`s.

    The layers stay as they are: each asks its variable for the kernel, which is dequantised there.

    Args:
      model: any `nnx.Module`; it stays as it is, and its arrays may be abstract.
      chosen: which layers, and how.
      inputs: arguments of a call of the model, for layers whose equation is given with each call.

    Raises:
      AdapterError: the model is adapted, or no layer is left.
      ConfigError: a pattern matches nothing.
      LayoutError: how a layer contracts its kernel is not known, or another library has it.
    """
    if adapted_layers(model):
        raise AdapterError(ADAPTED)
    model = copy_model(model)
    modules: dict[Path, Any] = dict(named_modules(model))
    for path, module in modules.items():
        check_not_intercepted(path, type(module))
    layers = {p: (m, layout) for p, m in modules.items() if (layout := find_layout(type(m)))}
    kernels = {path: _kernel(path, *layers[path]) for path in layers}
    values = {path: kernel.get_value() for path, kernel in kernels.items()}
    paths = chosen.paths(values, {path: layout for path, (_, layout) in layers.items()}, modules)
    axes = _axes(model, {path: layers[path] for path in paths}, inputs)
    for path in paths:
        value = kernels[path].get_value()
        own = stored_axes(axes[path], value.ndim, layer_name(path))
        kernels[path].set_value(chosen.quantized(path, value, layers[path][1], own))
    return model


def _kernel(path: Path, layer: Any, layout: Layout) -> nnx.Variable:
    """Returns the variable of a layer's kernel; raises `LayoutError` if it holds none."""
    kernel = getattr(layer, layout.kernel)
    value = kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel
    if not isinstance(kernel, nnx.Variable) or not is_kernel(value):
        raise LayoutError(f"{layer_name(path)} cannot be quantised: {quantised(value)}")
    return kernel


def _axes(
    model: nnx.Module, layers: Mapping[Path, tuple[Any, Layout]], inputs: Sequence[Any] | None
) -> dict[Path, KernelAxes]:
    """Returns the axes of each kernel; a call is traced for those that only a call shows."""
    axes, unknown = {}, {}
    for path, (layer, layout) in layers.items():
        try:
            axes[path] = layout.axes(layer, {})
        except LayoutError:
            unknown[path] = layer, layout
    traced = {} if inputs is None or not unknown else trace_axes(model, unknown, tuple(inputs))
    for path, (layer, layout) in unknown.items():
        axes[path] = traced[path] if path in traced else call_axes_of(path, layer, layout, {})
    return axes
