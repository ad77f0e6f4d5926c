"""`apply_dora` for NNX: a copy of the model whose selected layers carry an adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dora_jax.config import DoRAConfig, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, LayoutError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.layers.layout import Layout, further_kernels, stored_axes
from dora_jax.layers.plan import StoredKernel, plan_layers, start_layers, warn_of_high_ranks
from dora_jax.layers.registry import check_not_intercepted, find_layout
from dora_jax.nnx.layers import attach
from dora_jax.nnx.mode import is_in_eval_mode, modes_of
from dora_jax.nnx.model import adapted_layers, named_modules
from dora_jax.nnx.tracing import (
    call_axes_of,
    check_stored_shape,
    find_unsupported,
    trace_axes,
    warn_of_uncalled,
    warn_of_unchecked,
)
from dora_jax.nnx.variables import (
    M,
    copy_model,
    nnx_values,
    train_parameters,
)
from dora_jax.selection import saved_paths


def apply_dora(
    model: M, config: DoRAConfig, *, rngs: nnx.Rngs, inputs: Sequence[Any] | None = None
) -> M:
    """Returns a copy of an NNX model whose selected layers carry a DoRA adapter.

    The copy shares its frozen arrays with `model`, which stays as it is. What is trained, and what
    a call changes, it has to itself: a step may donate these. At this point both compute the same,
    bit for bit. The adapters' dropout acts where the model is in train mode; it acts too if the
    model has no layer that knows its mode, until `eval()` is called.

    Args:
      model: any `nnx.Module`; its arrays may be abstract (`nnx.eval_shape`).
      config: which layers, and how.
      rngs: draws `lora_a` (stream `params`), and serves the adapters' dropout.
      inputs: arguments of a call of the model, arrays or `jax.ShapeDtypeStruct`; anything else is
        static. The call is traced, not run. Needed for layers whose equation is given with each
        call, and to find what reads the kernel of an adapted layer outside of it (a tied head).

    Raises:
      TypeError: `rngs` is a key.
      AdapterError: the model is adapted already.
      ConfigError: a pattern matches nothing; names the nearest layers.
      LayoutError: a named layer is of a class whose layout is not known, or the traced call uses
        its kernel outside of it too.

    Warns:
      UserWarning: a rank is above the smaller side of its kernel; the traced call does not call an
        adapted layer; or no call was traced. Each names the layers.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> x = jnp.ones((5, 4))
      >>> bool((adapted(x) == model(x)).all()), adapted.magnitude.shape
      (True, (3,))
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, as in rngs=nnx.Rngs(0), got {type(rngs)}")
    if adapted := list(adapted_layers(model)):
        raise AdapterError(
            f"the model is adapted already ({layer_name(adapted[0])} has an adapter); merge it "
            "first"
        )
    return _adapt(copy_model(model), config, rngs, inputs)


def _adapt(model: M, config: DoRAConfig, rngs: nnx.Rngs, inputs: Sequence[Any] | None) -> M:
    """Adapts the layers of a plain model, in place, and returns it."""
    modules: dict[Path, Any] = dict(named_modules(model))
    for path, module in modules.items():
        check_not_intercepted(path, type(module))
    layouts = {p: layout for p, m in modules.items() if (layout := find_layout(type(m)))}
    unsupported = find_unsupported(modules, layouts)
    bare = _bare_parameters(model, layouts.keys() | unsupported.keys())
    settings = plan_layers(config, layouts, modules | bare, unsupported)
    layers = {path: (modules[path], layouts[path]) for path in settings}
    axes = _call_axes(model, layers, inputs)
    kernels = {path: _stored_kernel(path, *layers[path], axes[path]) for path in settings}
    if not isinstance(config, TrainedConfig):
        warn_of_high_ranks(settings, kernels)
        if inputs is None and settings:
            warn_of_unchecked(settings, [m for path, m in modules.items() if path not in layouts])
    modes = modes_of(modules)
    started = start_layers(config, settings, kernels, rngs.params(), modules)
    for path, start in started.items():
        layer, layout = layers[path]
        place = tuple(key for key in path if not key.isdigit())
        stored = kernels[path]
        whole = tuple(stored.value.shape[i] for i in stored.axes.inputs)
        record = AdaptedLayer(start.settings, layout, axes[path], place, whole)
        attach(layer, record, start.adapter, start.base)
        layer.lora_dropout.deterministic = is_in_eval_mode(path, modes)
        if start.settings.dropout:
            layer.lora_dropout.rngs = _dropout_stream(rngs, kernels[path])
    for path in saved_paths(config, modules | bare):
        train_parameters(path, (modules | bare)[path])
    return model


def adapt_to_load(
    model: M, config: DoRAConfig, rngs: nnx.Rngs | None, inputs: Sequence[Any] | None
) -> M:
    """Returns what `apply_dora` does, for trained adapters that are then put in.

    They are loaded to be used. So where no layer of the model knows its mode, the adapters' dropout
    does not act until `train()` is called.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    adapted = apply_dora(model, TrainedConfig.of(config), rngs=rngs, inputs=inputs)
    if not modes_of(dict(named_modules(model))):
        for layer in adapted_layers(adapted).values():
            layer.lora_dropout.deterministic = layer.adapted.settings.dropout > 0
    return adapted


def _bare_parameters(model: nnx.Module, layers: Collection[Path]) -> dict[Path, nnx.Param]:
    """Returns the parameters that stand next to other modules, as the class token of a ViT does.

    A parameter of a module without others inside is named by its module.
    """
    holders = {path[:n] for path, _ in named_modules(model) for n in range(len(path))}
    nodes = ((tuple(map(str, path)), node) for path, node in nnx.iter_graph(model))
    return {
        path: node
        for path, node in nodes
        if isinstance(node, nnx.Param) and path[:-1] in holders and path[:-1] not in layers
    }


def _call_axes(
    model: nnx.Module,
    layers: Mapping[Path, tuple[Any, Layout]],
    inputs: Sequence[Any] | None,
) -> dict[Path, KernelAxes]:
    """Returns the axes of each kernel as one call sees it, from a traced call if there is one."""
    traced = {} if inputs is None else trace_axes(model, layers, tuple(inputs))
    if inputs is not None:
        warn_of_uncalled(layers.keys() - traced.keys())
    return {
        path: traced[path] if path in traced else call_axes_of(path, layer, layout, {})
        for path, (layer, layout) in layers.items()
    }


def _stored_kernel(path: Path, layer: Any, layout: Layout, call_axes: KernelAxes) -> StoredKernel:
    """Returns the kernel that a layer stores, whose stack axes stand in front."""
    kernel = getattr(layer, layout.kernel).get_value()
    axes = stored_axes(call_axes, kernel.ndim, layer_name(path))
    own = nnx_values(layer, nnx.Param)
    if reason := further_kernels(layout, own, kernel.ndim - call_axes.ndim):
        raise LayoutError(f"{layer_name(path)} cannot be adapted: {reason}")
    check_stored_shape(path, layer, kernel)
    return StoredKernel(kernel, axes)


def _dropout_stream(rngs: nnx.Rngs, kernel: StoredKernel) -> Any:
    """Returns the random stream of a layer's dropout: a scan or vmap takes a key for each slice."""
    stream, stack = rngs.dropout, tuple(kernel.value.shape[i] for i in kernel.axes.stack)
    return type(stream)(jax.random.split(stream(), stack), tag=stream.tag)
