"""What follows the plain layer's output: the low rank, the norm and the scale.

It depends on what kind of layer is called, and not on which. So it is traced once for all layers of
a kind, and a call outside of `jax.jit` runs one program, not one for each operation.
"""

from __future__ import annotations

import dataclasses
import functools
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.scale import (
    effective_factors,
    is_short,
    magnitude_over_norm,
    norm_of_layer,
)
from dora_jax.layers.exact_output import can_cancel, exact_output
from dora_jax.layers.joined_output import plain_output_and_rows
from dora_jax.layers.layout import LayerCall, Layout, LowRank, OutputAxes
from dora_jax.ops.choice import cheap_alone
from dora_jax.ops.output_scale import apply_scale, apply_scale_to_sum
from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """What is known of a call before it runs; hashable.

    Attributes:
      settings: the layer's settings.
      layout: the layout of its class.
      axes: of the kernel that the call sees.
      output_axes: where these stand in the output.
      dtype: in which the layer multiplies.
      product: how the norm multiplies the kernel.
      name: under which rematerialisation may save the scaled output.
    """

    settings: LayerSettings
    layout: Layout
    axes: KernelAxes
    output_axes: OutputAxes
    dtype: DTypeLike
    product: KernelProduct
    name: str


def finished_output(
    plan: OutputPlan, call: LayerCall, adapter: Adapter, base: FrozenBase
) -> Float[Array, "..."]:
    """Returns the adapted output of a call.

    Where the layout has a stand-in for the layer, `jax.jit` traces it once for each kind of layer.
    """
    dropped = _after_dropout(plan.layout, call)
    stand_in = plan.layout.stand_in(call.layer)
    traced, _ = call.traced_arguments()
    arrays = (call.plain_output, call.kernel, call.bias, dropped, dict(adapter), base)
    leaves = jax.tree.leaves((dict(call.arguments), arrays))
    if stand_in is None or len(traced) != 1 or has_mesh_in_type(*leaves):
        return _finished(plan, call, dropped, adapter, base)
    kind = _Kind(plan, stand_in, tuple(call.arguments), cheap_alone())
    return _of_kind(kind, traced[0], arrays)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What calls have in common that are traced once; `cheap` is that of `cheap_ways_alone`."""

    plan: OutputPlan
    stand_in: Any
    arguments: tuple[str, ...]
    cheap: bool


@functools.partial(jax.jit, static_argnums=0)
def _of_kind(
    kind: _Kind, x: Array, arrays: tuple[Array, Any, Array | None, Array | None, Any, FrozenBase]
) -> Array:
    plain_output, kernel, bias, dropped, adapter, base = arrays
    inputs = kind.plan.layout.inputs
    call = LayerCall(
        layer=kind.stand_in,
        arguments={name: x if name == inputs else None for name in kind.arguments},
        plain_output=plain_output,
        kernel=kernel,
        bias=bias,
        dropout=lambda x: x,
        run=_no_method,
    )
    return _finished(kind.plan, call, dropped, adapter, base)


def _no_method(*_: Any) -> Any:
    raise AssertionError("a layer with a method of its own has no stand-in")


def _finished(
    plan: OutputPlan,
    call: LayerCall,
    dropped: Array | None,
    adapter: Adapter,
    base: FrozenBase,
) -> Float[Array, "..."]:
    """Returns the adapted output, given the input after dropout, None if there is no dropout."""
    settings, layout, product, dtype = plan.settings, plan.layout, plan.product, plan.dtype
    exact, factors = None, effective_factors(adapter, base, plan.axes) if settings.rank else None
    h, rows = plain_output_and_rows(settings, layout, call, adapter, factors, product)
    norm = norm_of_layer(settings, call.kernel, adapter, base, product, factors, rows)
    if factors is not None:
        branch, own = LowRank(*factors, settings.scaling, dtype), _with_input(layout, call, dropped)
        added = layout.low_rank(own, branch).astype(h.dtype)
        if norm is not None and plan.axes.outputs and can_cancel(layout, call, own, dtype):
            exact = exact_output(layout, call, branch, product, is_short(norm, base))
        else:
            h = h + added
    if settings.decompose:
        scale = magnitude_over_norm(settings, call.kernel, adapter, base, product, norm)
        scale = _along_output(scale, plan.axes, plan.output_axes, h.ndim)
        if exact is None:
            h = apply_scale(h, scale, plan.name)
        else:
            h = apply_scale_to_sum(h, added, scale, exact, plan.name)
    if call.bias is None:
        return h
    shape = [
        call.kernel.shape[i] if i is not None else 1 for i in _expand(plan.output_axes, h.ndim)
    ]
    return h + call.bias.astype(h.dtype).reshape(shape)


def _after_dropout(layout: Layout, call: LayerCall) -> Array | None:
    """Returns the input of the low-rank branch where dropout changes it, else None."""
    if not layout.dropout:
        return None
    x = call.arguments[layout.inputs]
    dropped = call.dropout(x)
    return None if dropped is x else dropped


def _with_input(layout: Layout, call: LayerCall, dropped: Array | None) -> LayerCall:
    """Returns the call with another input of the low-rank branch, if one is given."""
    if dropped is None:
        return call
    return dataclasses.replace(call, arguments={**call.arguments, layout.inputs: dropped})


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
