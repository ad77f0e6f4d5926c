"""Which layers of an NNX model can be adapted, and how a call of the model uses their kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.quantized import Kernel, abstract_dense
from dora_jax.errors import LayoutError, Path, layer_name
from dora_jax.layers.layout import (
    Arguments,
    Layout,
    Unsupported,
    bind_call,
    is_kernel,
    quantised,
)
from dora_jax.layers.registry import unsupported_reason
from dora_jax.nnx.layers import set_class, view_of
from dora_jax.nnx.model import named_modules
from dora_jax.ops.kernel_uses import kernel_uses, tag_kernel, trace_call


def find_unsupported(
    modules: Mapping[Path, Any], layouts: Mapping[Path, Layout]
) -> dict[Path, Unsupported]:
    """Returns why modules cannot be adapted: by their class, or by what the model does to them."""
    refused = {path: found for path, m in modules.items() if (found := unsupported_reason(type(m)))}
    wrapped = {
        id(inner): type(m).__name__
        for m in modules.values()
        if isinstance(m, nnx.WeightNorm | nnx.SpectralNorm)
        for _, inner in nnx.iter_modules(m)
    }
    holders: dict[int, list[str]] = {}
    for path, m in modules.items():
        for name, value in vars(m).items():
            if isinstance(value, nnx.Variable):
                holders.setdefault(id(value), []).append(".".join((*path, name)))
    for path, layout in layouts.items():
        layer = modules[path]
        own, kernel = ".".join((*path, layout.kernel)), getattr(layer, layout.kernel)
        others = [name for name in holders.get(id(kernel), []) if name != own]
        reason = ""
        if not isinstance(kernel, nnx.Variable):
            reason = quantised(kernel)
        elif not is_kernel(kernel.get_value()):
            reason = quantised(kernel.get_value())
        elif id(layer) in wrapped:
            reason = f"{wrapped[id(layer)]} overwrites its kernel in each call: exclude_modules"
        elif others:
            reason = (
                f"its kernel is {', '.join(others)} too, which would not see the adapter, and "
                "which merging would change: exclude_modules"
            )
        if reason:
            refused[path] = Unsupported(reason, layout.all_linear)
    return refused


def check_stored_shape(path: Path, layer: Any, kernel: Kernel) -> None:
    """Checks that stack axes stand in front, as far as the layer knows the shape of one kernel."""
    shapes = {
        nnx.Linear: ("in_features", "out_features"),
        nnx.Embed: ("num_embeddings", "features"),
    }
    own = getattr(layer, "kernel_shape", None)
    for layer_class, names in shapes.items():
        if isinstance(layer, layer_class):
            own = tuple(getattr(layer, name) for name in names)
    if own is None or kernel.ndim == len(own):  # no stack: the axes come from the call
        return
    if kernel.shape[kernel.ndim - len(own) :] != tuple(own):
        raise LayoutError(
            f"{layer_name(path)}: the kernel is stored as {kernel.shape}, its layer is made for "
            f"{tuple(own)}; a vmap must stack parameters in front (out_axes=0)"
        )


def call_axes_of(path: Path, layer: Any, layout: Layout, arguments: Arguments) -> KernelAxes:
    """Returns the axes of the kernel that a call sees; an error names the layer."""
    try:
        return layout.axes(layer, arguments)
    except LayoutError as error:
        raise LayoutError(f"{layer_name(path)} cannot be adapted: {error}") from error


def trace_axes(
    model: nnx.Module, layers: Mapping[Path, tuple[Any, Layout]], inputs: tuple[Any, ...]
) -> dict[Path, KernelAxes]:
    """Traces a call of the model; returns the axes of the kernel of each layer that it calls.

    While the call is traced, every layer is of a subclass that records how it is called.

    Raises:
      LayoutError: a kernel is used outside of its layer; names the layer.
    """
    found: dict[Path, KernelAxes] = {}

    def recorder(path: Path, layer_class: Any, layout: Layout) -> type[nnx.Module]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = bind_call(layer_class.__call__, (self, *args), kwargs)
            found[path] = call_axes_of(path, self, layout, bound)
            return layer_class.__call__(tagged(self), *args, **kwargs)

        def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
            found[path] = call_axes_of(path, self, layout, {})
            return layer_class.attend(tagged(self), *args, **kwargs)

        def tagged(self: Any) -> Any:
            kernel = tag_kernel(getattr(self, layout.kernel)[...], ".".join(path))
            return view_of(self, **{layout.kernel: nnx.Param(kernel)})

        methods = {"__call__": call} | ({"attend": attend} if layout.attend else {})
        return type(layer_class.__name__, (layer_class,), methods)

    def run(arrays: tuple[dict[Path, jax.Array], Any], inputs: tuple[Any, ...]) -> Any:
        kernels, state = arrays
        copy = nnx.merge(graphdef, state, copy=True)
        modules = dict(named_modules(copy))
        for path, kernel in kernels.items():
            getattr(modules[path], layers[path][1].kernel).set_value(kernel)
        return jax.tree.leaves(copy(*inputs))

    plain = {path: layer.__class__ for path, (layer, _) in layers.items()}
    for path, (layer, layout) in layers.items():
        set_class(layer, recorder(path, plain[path], layout))
    try:
        graphdef, state = nnx.split(model)
        kernels = {
            path: abstract_dense(getattr(layer, layout.kernel).get_value())
            for path, (layer, layout) in sorted(layers.items())
        }
        program = trace_call(run, (kernels, state), inputs)
    finally:
        for path, (layer, _) in layers.items():
            set_class(layer, plain[path])
    labels = {var: ".".join(path) for var, path in zip(program.invars, kernels, strict=False)}
    read = kernel_uses(program, labels).read
    for path, (_, layout) in sorted(layers.items()):
        if ".".join(path) in read:
            raise LayoutError(f"{layer_name(path)} cannot be adapted: {layout.read_elsewhere}")
    return found


def warn_of_uncalled(paths: Iterable[Path]) -> None:
    """Warns of selected layers that the traced call does not call."""
    for name in sorted(layer_name(path) for path in paths):
        warnings.warn(
            f"{name}: the traced call does not call this layer. If the model reads its kernel "
            "instead, the adapter has no effect until it is merged: leave the layer out",
            stacklevel=6,
        )


def warn_of_unchecked(adapted: Iterable[Path], others: Iterable[Any]) -> None:
    """Warns that no call was traced, where a class that is not Flax's may read a kernel itself.

    Args:
      adapted: the adapted layers.
      others: the modules that hold layers.
    """
    if all(type(module).__module__.startswith("flax.") for module in others):
        return
    names = [layer_name(path) for path in adapted]
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    warnings.warn(
        "apply_dora traced no call, so it could not check that the model calls each adapted layer "
        "and that nothing else reads their kernels (as a head tied to an embedding does): "
        f"{shown}. Pass inputs=(x,), the arguments of a call",
        stacklevel=5,
    )
