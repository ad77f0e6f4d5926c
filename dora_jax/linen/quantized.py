"""Linen parameters with quantised kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree, get_in, set_in, unboxed
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel
from dora_jax.layers.quantized_box import QuantizedBox
from dora_jax.layers.quantizing import Chosen
from dora_jax.linen.tracing import ExampleCall, stored_traces, trace_layers


def quantize(
    module: nn.Module, chosen: Chosen, params: Tree, inputs: Sequence[Any] | ExampleCall
) -> dict[str, Any]:
    """Returns parameters whose chosen kernels are quantised, each in a `QuantizedBox`.

        {"up": {"kernel": (in, out), ...}}  ->  {"up": {"kernel": QuantizedBox(codes, scales), ...}}

    The module runs on them as it is, adapted or not: Flax unboxes a parameter where it is used. A
    traced call shows the layers and the axes of their kernels.

    Args:
      module: any `flax.linen.Module`.
      chosen: which layers, and how.
      params: the module's `params` collection; it stays as it is.
      inputs: as for `apply_dora`.

    Raises:
      AdapterError: no layer is left.
      ConfigError: a pattern matches nothing.
    """
    call = inputs if isinstance(inputs, ExampleCall) else ExampleCall(inputs)
    trace = trace_layers(module, params, call)
    kernels = {
        path: unboxed(get_in(params, (*path, layer.layout.kernel)))
        for path, layer in trace.layers.items()
    }
    layouts = {path: layer.layout for path, layer in trace.layers.items()}
    paths = chosen.paths(kernels, layouts, trace.modules)
    result: Any = params
    for path, stored in stored_traces(module, params, call, trace, paths).items():
        layout = stored.traced.layout
        own = get_in(params, path)
        new = chosen.quantized(path, kernels[path], layout, stored.axes)
        result = set_in(result, path, {**own, layout.kernel: boxed(own[layout.kernel], new)})
    return dict(result)


def boxed(before: Any, kernel: Kernel) -> Any:
    """Returns a kernel for the parameters, in the boxes of the one before."""
    inner = QuantizedBox(kernel) if isinstance(kernel, QuantizedKernel) else kernel
    if isinstance(before, meta.AxisMetadata) and not isinstance(before, QuantizedBox):
        return before.replace_boxed(inner)
    return inner


def frozen_kernel(box: Any) -> Kernel:
    """Returns a layer's kernel without its box; a quantised one stays quantised."""
    kernel = unboxed(box)
    return kernel if isinstance(kernel, QuantizedKernel) else meta.unbox(box)
