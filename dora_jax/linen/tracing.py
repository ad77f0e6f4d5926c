"""One traced call of a Linen module: which layers it runs, and on which kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree, flatten, get_in, has_path, set_in, unboxed
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError, Path, layer_name
from dora_jax.layers.adapted import compute_dtype
from dora_jax.layers.layout import (
    Layout,
    Unsupported,
    bind_call,
    further_kernels,
    is_array,
    quantised,
)
from dora_jax.layers.quantized_box import abstract_boxes
from dora_jax.layers.registry import check_not_intercepted, find_layout, unsupported_reason
from dora_jax.linen.stack_axes import PositionBox, axes_of_stack, is_in_front
from dora_jax.ops.kernel_uses import kernel_uses, tag_kernel, trace_call

_COMPUTED = (
    "the model computes its kernel from the stored one (as nn.WeightNorm, nn.SpectralNorm and "
    "nn.map_variables do), so that an adapter of the stored kernel would not fit: exclude_modules"
)


@dataclasses.dataclass(frozen=True)
class ExampleCall:
    """One call of a Linen module, to be traced: `apply_dora(..., inputs=ExampleCall((x,), ...))`.

    Attributes:
      args: positional arguments: arrays or `jax.ShapeDtypeStruct`, or trees of these. Anything else
        (True, None, a name) is static.
      kwargs: keyword arguments of the call, likewise.
      method: the method to trace, if not `__call__`.
      variables: further collections that the call reads, such as `batch_stats`.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: Callable[..., Any] | str | None = None
    variables: Tree = dataclasses.field(default_factory=dict)


class TracedLayer(NamedTuple):
    """A layer that can be adapted, as a call of the model sees it (inside scans and vmaps).

    Attributes:
      layout: of its class.
      axes: of its kernel.
      kernel_shape: of its kernel.
      dtype: in which it multiplies.
      module: a copy of it, for its attributes.
      positions: where lifted transforms take the stack axes, if that was asked for.
    """

    layout: Layout
    axes: KernelAxes
    kernel_shape: tuple[int, ...]
    dtype: Any
    module: nn.Module
    positions: tuple[int, ...] | None = None


class StoredTrace(NamedTuple):
    """A traced layer, with what is known of its stored kernel.

    Attributes:
      traced: the layer as a call sees it.
      positions: where lifted transforms take the stack axes, the outermost transform's first.
      axes: of the stored kernel.
      shape: of the stored kernel.
    """

    traced: TracedLayer
    positions: tuple[int, ...]
    axes: KernelAxes
    shape: tuple[int, ...]


class Trace(NamedTuple):
    """What one traced call of a module shows.

    Attributes:
      layers: the layers that can be adapted, by path.
      modules: every module, with the reason if it cannot be adapted.
      statistics: the paths of the arrays in the collection `batch_stats`.
    """

    layers: dict[Path, TracedLayer]
    modules: dict[Path, Unsupported | None]
    statistics: set[Path]

    @property
    def unsupported(self) -> dict[Path, Unsupported]:
        """The modules that cannot be adapted, with the reason."""
        return {path: reason for path, reason in self.modules.items() if reason}


def trace_layers(
    module: nn.Module, params: Tree, call: ExampleCall, ambiguous: Sequence[Path] = ()
) -> Trace:
    """Traces one call of a module.

    Args:
      module: the module.
      params: its parameters, or their shapes.
      call: what to trace.
      ambiguous: paths of kernels whose shapes do not tell where lifted transforms take their stack
        axes; for these the trace finds it.
    """
    _check_arrays(params)
    params = abstract_boxes(params)
    trace, checked = Trace({}, {}, set()), set[Path]()

    def run(params: Tree, given: tuple[Any, ...]) -> Any:
        args, kwargs, variables = given
        for path in ambiguous:
            params = set_in(params, path, PositionBox(get_in(params, path)))
        with nn.intercept_methods(_recorder(trace, params, checked)):
            output, updated = module.apply(
                {**variables, "params": params},
                *args,
                rngs=_example_rngs(),
                method=call.method,
                mutable=True,
                **kwargs,
            )
        trace.statistics.update(flatten(updated.get("batch_stats", {})))
        return output, {name: tree for name, tree in updated.items() if name != "params"}

    program = trace_call(run, params, (tuple(call.args), dict(call.kwargs), call.variables))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    labels = {var: _label(_dict_keys(key)) for var, (key, _) in zip(program.invars, leaves)}  # noqa: B905
    uses = kernel_uses(program, labels)
    for path, layer in list(trace.layers.items()):
        label = _label((*path, layer.layout.kernel))
        reason = ""
        if label in uses.computed:
            reason = _COMPUTED
        elif path in checked and label in uses.read:
            reason = layer.layout.read_elsewhere
        if reason:
            trace.modules[path] = Unsupported(reason, layer.layout.all_linear)
            del trace.layers[path]
    return trace


def _check_arrays(params: Tree, path: Path = ()) -> None:
    """Raises `LayoutError` for parameters that qwix has quantised; names the first."""
    for name, value in params.items():
        inner = unboxed(value)
        if isinstance(inner, Mapping):
            _check_arrays(inner, (*path, name))
        elif type(inner).__module__.startswith("qwix."):
            raise LayoutError(f"{layer_name(path)} cannot be adapted: {quantised(inner)}")


def stored_traces(
    module: nn.Module, params: Tree, call: ExampleCall, trace: Trace, paths: Iterable[Path]
) -> dict[Path, StoredTrace]:
    """Returns traced layers with the axes of their stored kernels.

    Where shapes do not tell which axes are stack axes, a second trace finds them.
    """
    kernels = {p: (*p, trace.layers[p].layout.kernel) for p in paths}
    shapes = {p: unboxed(get_in(params, kernel)).shape for p, kernel in kernels.items()}
    ambiguous = [p for p in kernels if not is_in_front(shapes[p], trace.layers[p].kernel_shape)]
    layers = trace.layers
    if ambiguous:
        layers = trace_layers(module, params, call, [kernels[p] for p in ambiguous]).layers
    return {
        path: StoredTrace(layers[path], *_stored_axes(path, layers[path], shape), shape)
        for path, shape in shapes.items()
    }


def _stored_axes(
    path: Path, traced: TracedLayer, stored_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], KernelAxes]:
    """Returns where transforms take the stack axes of a stored kernel, and its axes.

    Raises:
      LayoutError: the stored shape is not the one that the layer sees with stack axes added.
    """
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


def _recorder(trace: Trace, params: Tree, checked: set[Path]) -> Callable[..., Any]:
    """Returns an interceptor that records every module it sees, and tags kernels in the program.

    It adds to `checked` the layers that run on their tagged kernels, so that other uses show.
    """
    inside = False  # a layer that runs on its tagged kernel

    def record(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        nonlocal inside
        if inside:
            return next_call(*args, **kwargs)
        layer = context.module
        check_not_intercepted(layer.path, type(layer))
        layout, own = find_layout(type(layer)), layer.variables.get("params", {})
        trace.modules.setdefault(layer.path, unsupported_reason(type(layer)))
        if layout is None or context.method_name not in layout.methods:
            return next_call(*args, **kwargs)
        if layout.kernel not in own:  # Flax would make a new one without a word
            get_in(params, (*layer.path, layout.kernel))
        # A layer may be run on variables that are not its own, as a tied head is.
        if not has_path(params, (*layer.path, layout.kernel)):
            return next_call(*args, **kwargs)
        arguments = bind_call(type(layer).__call__, (layer, *args), kwargs)
        try:
            axes = layout.axes(layer, arguments)
        except LayoutError as error:  # raised only if the layer is selected
            trace.modules[layer.path] = Unsupported(str(error), layout.all_linear)
            return next_call(*args, **kwargs)
        box = own[layout.kernel]
        kernel = meta.unbox(box)
        reason = further_kernels(layout, flatten(meta.unbox(own)))
        if not is_array(kernel):
            reason = quantised(kernel)
        if reason:
            trace.modules[layer.path] = Unsupported(reason, layout.all_linear)
            return next_call(*args, **kwargs)
        tagged = tag_kernel(kernel, _label((*layer.path, layout.kernel)))
        trace.layers[layer.path] = TracedLayer(
            layout,
            axes,
            np.shape(kernel),
            compute_dtype(layer, arguments[layout.inputs], kernel),
            layer.clone(parent=None, name=None),
            box.positions if isinstance(box, PositionBox) else None,
        )
        if any(isinstance(value, Mapping) for value in own.values()):  # layers inside a layer
            return next_call(*args, **kwargs)
        checked.add(layer.path)
        inside = True
        try:
            return _call_with(layer, layout.kernel, tagged, context.method_name, args, kwargs)
        finally:
            inside = False

    return record


def _call_with(
    layer: nn.Module, name: str, kernel: Any, method: str, args: Sequence[Any], kwargs: Tree
) -> Any:
    """Runs a method of a layer on another kernel; what it writes to its variables is lost."""
    variables = layer.variables
    variables = {**variables, "params": {**variables["params"], name: kernel}}
    plain = layer.clone(parent=None, name=None)
    rngs = _example_rngs()
    return plain.apply(variables, *args, rngs=rngs, method=method, mutable=True, **kwargs)[0]


def _example_rngs() -> dict[str, jax.Array]:
    return dict.fromkeys(("params", "dropout"), jax.random.key(0))


def _label(path: Path) -> str:
    return ".".join(path)


def _dict_keys(path: Sequence[Any]) -> Path:
    """Returns the keys of dicts in a path of JAX's, which may lead into a box too."""
    return tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
