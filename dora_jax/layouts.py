"""For each Flax layer class: which kernel axes are stacked, contracted, output; its low rank.

One `Layout` serves a Linen layer and its NNX namesake, since both have the same attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from dora_jax.config import AdapterSpec, LayoutError, Path
from dora_jax.decomposition import (
    Adapter,
    KernelAxes,
    acting_factors,
    apply_scale,
    scale_minus_one,
)
from dora_jax.remat import name_pre_scale

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

# The arguments of a layer's call, by name.
Call = Mapping[str, Any]
# Where the kernel's axes stand in a layer's output: a kernel axis, None for an axis of the inputs,
# `...` for any number of those.
OutputAxes = Sequence["int | EllipsisType | None"]
# `run(call, kernel, features)`: the layer's own method with another kernel and no bias.
Run = Callable[[Call, "Array", int], "Array"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer class uses its kernel.

    Attributes:
      axes: `(layer, call) -> KernelAxes` of the kernel that one call of the layer sees (stack axes
        that a scan or vmap adds in front are found from the stored kernel). `call` is empty where
        there is none yet.
      low_rank: `(layer, call, lora_a, lora_b, scaling, dtype, run) -> scaling * (inputs A) B`, in
        the shape of the layer's output. `call` holds the inputs after dropout.
      output_axes: `(layer, call, axes) -> OutputAxes`: by default the stack axes first, then those
        of the inputs, then the out axes.
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to its output, if it adds anything: it is not scaled.
      inputs: the name of the argument that the kernel is multiplied with.
      dropout: whether adapter dropout can act on that argument.
      attend: whether the layer has a method `attend(query)` that computes `query kernel^T`.
      all_linear: whether `target_modules="all-linear"` covers the layer.
    """

    axes: Callable[[Any, Call], KernelAxes]
    low_rank: Callable[..., Array]
    output_axes: Callable[[Any, Call, KernelAxes], OutputAxes] = lambda layer, call, axes: (
        *axes.stack,
        ...,
        *axes.outputs,
    )
    kernel: str = "kernel"
    bias: str = "bias"
    inputs: str = "inputs"
    dropout: bool = True
    attend: bool = False
    all_linear: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of a layer that use its kernel."""
        return ("__call__", "attend") if self.attend else ("__call__",)


class Refusal(NamedTuple):
    """Why a layer class is not adapted, with the mend; and whether "all-linear" would mean it."""

    reason: str
    all_linear: bool


_LAYOUTS: dict[type, Layout] = {}
_REFUSED: dict[type, Refusal] = {}


def register_layout(layer_class: type, layout: Layout) -> None:
    """Makes a layer class known, so that `apply_dora` adapts its instances.

    Raises:
      TypeError: what is given is no class, or no `Layout`.
      LayoutError: the layout names an argument that the class's `__call__` does not take.

    Example:
      >>> from flax import linen as nn
      >>> class Projection(nn.Module):  # a parameter `w` and an equation given with each call
      ...     shape: tuple[int, ...]
      ...
      ...     @nn.compact
      ...     def __call__(self, equation, x):
      ...         w = self.param("w", nn.initializers.normal(), self.shape)
      ...         return jnp.einsum(equation, x, w)
      >>> register_layout(
      ...     Projection,
      ...     einsum_layout(lambda layer, call: call["equation"], kernel="w", inputs="x"),
      ... )
      >>> find_layout(Projection).kernel
      'w'
    """
    if not (isinstance(layer_class, type) and isinstance(layout, Layout)):
        raise TypeError(f"expected a class and a Layout, got {layer_class!r} and {type(layout)}")
    arguments = list(inspect.signature(layer_class.__call__).parameters)[1:]
    if layout.inputs not in arguments:
        raise LayoutError(
            f"{layer_class.__name__}.__call__ takes {arguments}, not {layout.inputs!r}: name the "
            "argument that the kernel is multiplied with"
        )
    _LAYOUTS[layer_class] = layout


def find_layout(layer_class: type) -> Layout | None:
    """Returns the layout of a class, or None where it is not known.

    A subclass of a known class has its layout, unless it has a `__call__` (or `attend`) of its own:
    then what it does with the kernel is not known, and it must be registered itself.
    """
    for known in layer_class.__mro__:
        if known in _LAYOUTS:
            return None if _own_method(layer_class, known) else _LAYOUTS[known]
    return None


def _own_method(layer_class: type, known: type) -> str | None:
    """Returns the name of a method with which a subclass uses the kernel in a way of its own."""
    methods = _LAYOUTS[known].methods
    return next((m for m in methods if getattr(layer_class, m) is not getattr(known, m)), None)


def why_refused(layer_class: type) -> Refusal | None:
    """Returns why a class that holds a kernel cannot be adapted; None if nothing is known of it."""
    for known in layer_class.__mro__:
        if known in _REFUSED:
            return _REFUSED[known]
        if known in _LAYOUTS:
            if (method := _own_method(layer_class, known)) is None:
                return None
            name = layer_class.__name__
            reason = (
                f"{name} has a method {method} of its own, so what it does with the kernel of "
                f"{known.__name__} is not known: register_layout({name}, ...), or exclude_modules"
            )
            return Refusal(reason, _LAYOUTS[known].all_linear)
    return None


def bind_call(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a method's call by name, without its first, the layer.

    Example:
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> list(bind_call(nnx.Linear.__call__, (layer, jnp.ones(3)), {}))
      ['inputs', 'out_sharding']
    """
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def stored_axes(axes: KernelAxes, stored_ndim: int, path: str) -> KernelAxes:
    """Returns the axes of a stored kernel, whose further leading axes are stack.

    Raises:
      LayoutError: the stored kernel has fewer axes than the layer contracts.

    Example:
      >>> stored_axes(KernelAxes((), (0,), (1,)), 3, "layers.mlp")
      KernelAxes(stack=(0,), inputs=(1,), outputs=(2,))
    """
    extra = stored_ndim - axes.ndim
    if extra < 0:
        raise LayoutError(
            f"{path}: the kernel has {stored_ndim} axes, its layer needs at least {axes.ndim}"
        )
    stack, inputs, outputs = (tuple(i + extra for i in group) for group in axes)
    return KernelAxes(tuple(range(extra)) + stack, inputs, outputs)


def adapted_output(
    spec: AdapterSpec,
    layout: Layout,
    layer: Any,
    call: Call,
    axes: KernelAxes,
    plain_output: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    adapter: Adapter,
    base: Adapter,
    dropout: Callable[[Array], Array],
    run: Run,
    path: Path = (),
) -> Float[Array, "..."]:
    """Returns the output of an adapted layer: `h + d h + bias`, `h = x W0 + s dropout(x) A B`.

    The bias is not scaled, hence `plain_output` is the layer's output *without* it: taking it off
    again would not be exact.

    Args:
      spec: the layer's settings.
      layout: the layout of its class.
      layer: the Linen or NNX layer, for its attributes.
      call: the arguments of the call.
      axes: those of the kernel that the adapter was made for, as one call sees it.
      plain_output: `x W0`, from the layer's own method.
      kernel: the frozen kernel `W0`.
      bias: the layer's bias, if it has one.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them; `scale` in place
        of the magnitude if it was hoisted.
      base: `norm` and `row` of the kernel.
      dropout: acts on the input of the low-rank branch.
      run: runs the layer's own method with another kernel and no bias.
      path: of the layer, by which remat may save `h`.

    Raises:
      LayoutError: this call uses the kernel in another way than the one that was traced.
    """
    if layout.axes(layer, call) != axes:
        raise LayoutError(
            f"{type(layer).__name__} was adapted for a kernel of {axes}, this call uses it as "
            f"{layout.axes(layer, call)}; one adapter cannot serve both: exclude_modules"
        )
    h = plain_output
    output_axes = layout.output_axes(layer, call, axes)
    dtype = compute_dtype(layer, call[layout.inputs], kernel)
    if spec.rank:
        inputs = call[layout.inputs]
        dropped = {**call, layout.inputs: dropout(inputs) if layout.dropout else inputs}
        a, b = acting_factors(adapter, base, axes)
        h = h + layout.low_rank(layer, dropped, a, b, spec.scaling, dtype, run).astype(h.dtype)
    if spec.decompose:
        d = layer_scale(spec, layout, layer, call, kernel, adapter, base)
        h = apply_scale(name_pre_scale(h, path), _along_output(d, axes, output_axes, h.ndim))
    if bias is None:
        return h
    shape = [kernel.shape[i] if i is not None else 1 for i in _expand(output_axes, h.ndim)]
    return h + bias.astype(h.dtype).reshape(shape)


def adapted_attend(
    spec: AdapterSpec,
    layout: Layout,
    layer: Any,
    attend: Callable[[Array], Array],
    query: Float[Array, "*batch features"],
    kernel: Float[Array, "vocab features"],
    adapter: Adapter,
    base: Adapter,
) -> Float[Array, "*batch vocab"]:
    """Returns `query W'^T` for an adapted embedding table, so that a tied head sees the adapter.

    The scale is per feature, which is contracted here: it acts on the query.

    Args:
      attend: the layer's own method on the frozen table.
    """
    dtype = compute_dtype(layer, query, kernel)
    query = query.astype(dtype)
    if spec.decompose:
        d = layer_scale(spec, layout, layer, {layout.inputs: query}, kernel, adapter, base)
        query = apply_scale(query, d)
    logits = attend(query)
    if not spec.rank:
        return logits
    axes = layout.axes(layer, {})
    a, b = (x.astype(dtype) for x in acting_factors(adapter, base, axes))
    return logits + (spec.scaling * (query @ b.T) @ a.T).astype(logits.dtype)


def layer_scale(
    spec: AdapterSpec,
    layout: Layout,
    layer: Any,
    call: Call,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
) -> Float[Array, "*stack *out"]:
    """Returns `d` of a layer: as hoisted out of the model, or computed here."""
    return scale_minus_one(
        spec,
        kernel,
        adapter,
        base,
        layout.axes(layer, call),
        dtype=compute_dtype(layer, call[layout.inputs], kernel),
        precision=getattr(layer, "precision", None),
    )


def compute_dtype(layer: Any, inputs: Array, kernel: Array) -> DTypeLike:
    """Returns the dtype in which a layer multiplies: its own, or what its arguments promote to."""
    own = getattr(layer, "dtype", None)
    if own is not None:
        return own
    floating = [x for x in (inputs, kernel) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.result_type(*floating)


def _expand(output_axes: OutputAxes, ndim: int) -> list[int | None]:
    """Returns one entry for each axis of an output: the kernel's axis, or None."""
    entries: list[int | None] = []
    for entry in output_axes:
        if isinstance(entry, EllipsisType):
            entries += [None] * (ndim - len(output_axes) + 1)
        else:
            entries.append(entry)
    return entries


def _along_output(
    x: Float[Array, "*stack *out"], axes: KernelAxes, output_axes: OutputAxes, ndim: int
) -> Array:
    """Lays an array of shape `(*stack, *out)` along a layer's output, for broadcasting."""
    entries = _expand(output_axes, ndim)
    canonical = axes.stack + axes.outputs
    x = jnp.transpose(x, [canonical.index(i) for i in entries if i is not None])
    return jnp.expand_dims(x, [position for position, i in enumerate(entries) if i is None])


def _dense_axes(layer: Any, call: Call) -> KernelAxes:
    return KernelAxes((), (0,), (1,))


def _dense_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    def matmul(x: Array, w: Array) -> Array:
        return jnp.matmul(x, w.astype(dtype), precision=layer.precision)

    return matmul(scaling * matmul(call["inputs"].astype(dtype), a), b)


def _general_axes(layer: Any, call: Call) -> KernelAxes:
    """The kernel of DenseGeneral and LinearGeneral is laid out as (batch, in, out)."""
    batch = len(_tuple(getattr(layer, "batch_dims", getattr(layer, "batch_axis", ()))))
    inputs = len(_tuple(layer.axis))
    outputs = len(_tuple(getattr(layer, "features", None) or layer.out_features))
    order = tuple(range(batch + inputs + outputs))
    return KernelAxes(order[:batch], order[batch : batch + inputs], order[batch + inputs :])


def _general_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    x = call["inputs"].astype(dtype)
    axes = _general_axes(layer, call)
    contracted = tuple(sorted(axis % x.ndim for axis in _tuple(layer.axis)))  # as Flax does
    xa = lax.dot_general(
        x, a.astype(dtype), ((contracted, axes.inputs), (axes.stack, axes.stack)), layer.precision
    )
    over_rank = ((xa.ndim - 1,), (len(axes.stack),))
    return lax.dot_general(
        scaling * xa, b.astype(dtype), (over_rank, (axes.stack, axes.stack)), layer.precision
    )


def einsum_layout(
    equation: Callable[[Any, Call], str | None],
    *,
    kernel: str = "kernel",
    bias: str = "bias",
    inputs: str = "inputs",
) -> Layout:
    """Returns the layout of a layer that computes `jnp.einsum(equation, inputs, kernel)`.

    A kernel axis is *in* if the output does not have it, *stack* if inputs and output have it,
    *out* if the output alone has it.

    Args:
      equation: `(layer, call) -> str`, from the layer's attributes or from the arguments of the
        call, by name.
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to the product, if it adds anything.
      inputs: the name of the argument that is multiplied with the kernel.
    """

    def terms(layer: Any, call: Call) -> tuple[str, str, str]:
        try:
            known = equation(layer, call)
        except KeyError:  # an argument of a call that is yet to come
            known = None
        return _einsum_terms(known, type(layer).__name__)

    def axes(layer: Any, call: Call) -> KernelAxes:
        x, w, y = terms(layer, call)
        stack = tuple(i for i, c in enumerate(w) if c in y and c in x)
        contracted = tuple(i for i, c in enumerate(w) if c not in y)
        outputs = tuple(i for i, c in enumerate(w) if c in y and c not in x)
        return KernelAxes(stack, contracted, outputs)

    def low_rank(
        layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
    ) -> Array:
        x, w, y = terms(layer, call)
        stack, contracted, outputs = ("".join(w[i] for i in group) for group in axes(layer, call))
        r = next(c for c in string.ascii_letters if c not in x + w + y)
        kept = "".join(c for c in x if c in y or c == ".") + r
        precision = getattr(layer, "precision", None)
        xa = jnp.einsum(
            f"{x},{stack}{contracted}{r}->{kept}",
            call[inputs].astype(dtype),
            a.astype(dtype),
            precision=precision,
        )
        return jnp.einsum(
            f"{kept},{stack}{r}{outputs}->{y}", scaling * xa, b.astype(dtype), precision=precision
        )

    def output_axes(layer: Any, call: Call, axes: KernelAxes) -> OutputAxes:
        _, w, y = terms(layer, call)
        return [
            ... if c == "." else (w.index(c) if c in w else None) for c in y.replace("...", ".")
        ]

    return Layout(axes, low_rank, output_axes, kernel=kernel, bias=bias, inputs=inputs)


def _einsum_terms(equation: str | None, name: str) -> tuple[str, str, str]:
    """Splits an equation into the terms of inputs, kernel and output."""
    if equation is None:
        raise LayoutError(
            f"{name}: its equation is given with each call, so it is not known from the layer "
            "alone: pass inputs=(...) to apply_dora, so that a call can be traced"
        )
    operands, arrow, y = equation.replace(" ", "").partition("->")
    x, comma, w = operands.partition(",")
    if not (arrow and comma) or "." in w or len(set(w)) != len(w):
        raise LayoutError(
            f"{name}: the equation {equation!r} must be explicit ('inputs,kernel->output') and "
            "name each axis of the kernel once, without '...'"
        )
    return x, w, y


def _conv_axes(layer: Any, call: Call) -> KernelAxes:
    if getattr(layer, "mask", None) is not None:
        raise LayoutError(
            f"{type(layer).__name__} has a mask on its kernel, through which a low-rank product "
            "does not factor: exclude_modules"
        )
    spatial = 1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)
    inputs, outputs = (spatial, spatial + 1)
    if getattr(layer, "transpose_kernel", False):
        inputs, outputs = outputs, inputs
    return KernelAxes((), (*range(spatial), inputs), (outputs,))


def _conv_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    """Convolves with A as a kernel of r features (of every group), then mixes them with B."""
    groups = getattr(layer, "feature_group_count", 1)
    kernel = jnp.concatenate([a] * groups, axis=-1).astype(dtype)
    if getattr(layer, "transpose_kernel", False):
        kernel = jnp.swapaxes(kernel, -1, -2)
    rank, outputs = b.shape
    xa = run(call, kernel, groups * rank)
    xa = (scaling * xa).reshape(*xa.shape[:-1], groups, rank)
    b = b.astype(dtype).reshape(rank, groups, outputs // groups)
    y = jnp.einsum("...gr,rgo->...go", xa, b, precision=layer.precision)
    return y.reshape(*y.shape[:-2], outputs)


def _embed_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    ids = call["inputs"]
    if a.shape[0] == 1:  # as Flax does: a table of one row is broadcast, whatever the ids
        ids = jnp.zeros_like(ids)
    return (scaling * jnp.take(a.astype(dtype), ids, axis=0)) @ b.astype(dtype)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (Sequence, Mapping)) else (value,)


def _flax_equation(layer: Any, call: Call) -> str | None:
    return call.get("einsum_str") or layer.einsum_str


DENSE = Layout(_dense_axes, _dense_low_rank)
GENERAL = Layout(_general_axes, _general_low_rank)
EINSUM = einsum_layout(_flax_equation)
CONV = Layout(_conv_axes, _conv_low_rank, all_linear=False)
EMBED = Layout(
    _dense_axes,
    _embed_low_rank,
    kernel="embedding",
    dropout=False,
    attend=True,
    all_linear=False,
)

_LAYOUTS.update(
    {
        linen.Dense: DENSE,
        nnx.Linear: DENSE,
        linen.DenseGeneral: GENERAL,
        nnx.LinearGeneral: GENERAL,
        linen.Einsum: EINSUM,
        nnx.Einsum: EINSUM,
        linen.Conv: CONV,
        nnx.Conv: CONV,
        linen.ConvTranspose: CONV,
        nnx.ConvTranspose: CONV,
        linen.Embed: EMBED,
        nnx.Embed: EMBED,
    }
)
_ADAPTED = Refusal(
    "it has a low-rank adapter already: merge it into a plain nnx.Linear first", True
)
_REFUSED.update(
    {
        nnx.LoRA: _ADAPTED,
        nnx.LoRALinear: _ADAPTED,
        linen.ConvLocal: Refusal(
            "its kernel is another one at each position: exclude_modules", False
        ),
        linen.recurrent.DenseParams: Refusal(
            "OptimizedLSTMCell joins the kernels of its gates before it multiplies: use LSTMCell, "
            "which has the same parameters, or exclude_modules",
            True,
        ),
    }
)
