"""What an adapted layer computes: the plain layer's output, its low rank, and the scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.scale import effective_factors, scale_minus_one
from dora_jax.errors import LayoutError, Path
from dora_jax.layers.layout import Call, Layout, OutputAxes, Run
from dora_jax.ops.output_scale import apply_scale
from dora_jax.ops.remat import scaled_name

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


def adapted_output(
    settings: LayerSettings,
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
      settings: the layer's settings.
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
      path: of the layer, by which remat may save `h + d h`.

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
    if settings.rank:
        inputs = call[layout.inputs]
        dropped = {**call, layout.inputs: dropout(inputs) if layout.dropout else inputs}
        a, b = effective_factors(adapter, base, axes)
        h = h + layout.low_rank(layer, dropped, a, b, settings.scaling, dtype, run).astype(h.dtype)
    if settings.decompose:
        d = layer_scale(settings, layout, layer, call, kernel, adapter, base)
        h = apply_scale(h, _along_output(d, axes, output_axes, h.ndim), scaled_name(path))
    if bias is None:
        return h
    shape = [kernel.shape[i] if i is not None else 1 for i in _expand(output_axes, h.ndim)]
    return h + bias.astype(h.dtype).reshape(shape)


def adapted_attend(
    settings: LayerSettings,
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
    if settings.decompose:
        d = layer_scale(settings, layout, layer, {layout.inputs: query}, kernel, adapter, base)
        query = apply_scale(query, d)
    logits = attend(query)
    if not settings.rank:
        return logits
    axes = layout.axes(layer, {})
    a, b = (x.astype(dtype) for x in effective_factors(adapter, base, axes))
    return logits + (settings.scaling * (query @ b.T) @ a.T).astype(logits.dtype)


def layer_scale(
    settings: LayerSettings,
    layout: Layout,
    layer: Any,
    call: Call,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
) -> Float[Array, "*stack *out"]:
    """Returns `d` of a layer: as hoisted out of the model, or computed here."""
    return scale_minus_one(
        settings,
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


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """What `DoRAModel` knows of one adapted layer.

    Attributes:
      settings: the layer's settings.
      layout: the layout of its class.
      axes: of the stored kernel.
      call_axes: of the kernel that one call sees.
      positions: where lifted transforms take the stack axes, the outermost transform's first.
      dtype, precision: of the layer's products.
      module: a copy of it, for its attributes.
    """

    settings: LayerSettings
    layout: Layout
    axes: KernelAxes
    call_axes: KernelAxes
    positions: tuple[int, ...] = ()
    dtype: Any = None
    precision: Any = None
    module: nn.Module | None = None
