"""One traced call of a Linen module: which layers it runs, and on which kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree, get_in, has_path, set_in
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError, Path, layer_name
from dora_jax.layers.adapted import compute_dtype
from dora_jax.layers.kernel_uses import TIED, kernel_uses, tag_kernel
from dora_jax.layers.layout import Layout, Unsupported, bind_call
from dora_jax.layers.registry import find_layout, unsupported_reason
from dora_jax.linen.interceptor import call_plain
from dora_jax.linen.stack_axes import PositionBox, axes_of_stack

_COMPUTED = (
    "the model computes its kernel from the stored one (as nn.WeightNorm, nn.SpectralNorm and "
    "nn.map_variables do), so that an adapter of the stored kernel would not fit: exclude_modules"
)


class TracedLayer(NamedTuple):
    """A layer that can be adapted, as a call of the model sees it (inside scans and vmaps)."""

    layout: Layout
    axes: KernelAxes
    kernel_shape: tuple[int, ...]
    dtype: Any
    precision: Any
    module: nn.Module
    positions: tuple[int, ...] | None = None


def trace_layers(
    module: nn.Module,
    params: Tree,
    inputs: Sequence[Any],
    variables: Tree,
    method: Callable[..., Any] | str | None,
    kwargs: Mapping[str, Any],
    unclear: Sequence[Path] = (),
) -> tuple[dict[Path, TracedLayer], dict[Path, Unsupported | None]]:
    """Traces one call; returns the adaptable layers, and every module with why it is refused.

    Of the kernels in `unclear`, it finds where lifted transforms take the stack axes.
    """
    found: dict[Path, TracedLayer] = {}
    modules: dict[Path, Unsupported | None] = {}

    def record(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        call_kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        layout, own = find_layout(type(layer)), layer.variables.get("params", {})
        modules.setdefault(layer.path, unsupported_reason(type(layer)))
        if layout is None or context.method_name not in layout.methods:
            return next_call(*args, **call_kwargs)
        if layout.kernel not in own:  # Flax would make a new one in silence
            get_in(params, (*layer.path, layout.kernel))
        # A layer may be run on variables that are not its own, as a tied head is.
        if has_path(params, (*layer.path, layout.kernel)):
            shape = np.shape(meta.unbox(own.get(layout.kernel)))
            method = type(layer).__call__
            bound = bind_call(method, (layer, *args), call_kwargs)
            dtype = compute_dtype(layer, bound[layout.inputs], meta.unbox(own[layout.kernel]))
            precision = getattr(layer, "precision", None)
            try:
                axes = layout.axes(layer, bound)
            except LayoutError as error:  # raised only if the layer is selected
                modules[layer.path] = Unsupported(str(error), layout.all_linear)
            else:
                box = own[layout.kernel]
                marked = tag_kernel(meta.unbox(box), _label((*layer.path, layout.kernel)))
                found[layer.path] = TracedLayer(
                    layout,
                    axes,
                    shape,
                    dtype,
                    precision,
                    layer.clone(parent=None, name=None),
                    box.positions if isinstance(box, PositionBox) else None,
                )
                if layout.attend:  # run on what is marked, so that any other use shows
                    own = {**own, layout.kernel: marked}
                    return call_plain(layer, own, *args, method=context.method_name, **call_kwargs)
        return next_call(*args, **call_kwargs)

    def call(params: Tree, inputs: tuple[Any, ...]) -> Any:
        for path in unclear:
            params = set_in(params, path, PositionBox(get_in(params, path)))
        with nn.intercept_methods(record):
            key = jax.random.key(0)
            return module.apply(
                {**variables, "params": params},
                *inputs,
                rngs={"params": key, "dropout": key},
                method=method,
                mutable=True,
                **kwargs,
            )

    program = jax.make_jaxpr(call)(params, tuple(inputs)).jaxpr
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    labels = {var: _label(_dict_keys(key)) for var, (key, _) in zip(program.invars, leaves)}  # noqa: B905
    uses = kernel_uses(program, labels)
    for path in list(found):
        layout, label = found[path].layout, _label((*path, found[path].layout.kernel))
        reason = _COMPUTED if label in uses.computed else ""
        if layout.attend and label in uses.read:
            reason = TIED
        if reason:
            modules[path] = Unsupported(reason, found.pop(path).layout.all_linear)
    return found, modules


def _label(path: Path) -> str:
    return ".".join(path)


def _dict_keys(path: Sequence[Any]) -> Path:
    """Returns the keys of dicts in a path of JAX's, which may lead into a box too."""
    return tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def stored_kernel_axes(
    path: Path, traced: TracedLayer, stored_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], KernelAxes]:
    """Returns where transforms take the stack axes of a stored kernel, and its axes."""
    positions = traced.positions
    if positions is None:
        positions = (0,) * (len(stored_shape) - len(traced.kernel_shape))
    axes = axes_of_stack(traced.axes, positions)
    seen = tuple(n for i, n in enumerate(stored_shape) if i not in axes.stack[: len(positions)])
    if axes.ndim != len(stored_shape) or seen != traced.kernel_shape:
        raise LayoutError(
            f"{layer_name(path)}: the kernel is stored as {stored_shape}, its layer sees "
            f"{traced.kernel_shape}, and no nn.scan or nn.vmap explains the difference: "
            "exclude_modules"
        )
    return positions, axes
