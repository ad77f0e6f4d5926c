"""The layouts of dense layers and of embedding tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.layers.layout import Call, Layout, Run, as_tuple, refuse_stateful_product
from dora_jax.ops.low_rank import down_projection, up_projection

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import DTypeLike


def _has_own_product(layer: Any) -> bool:
    return getattr(layer, "dot_general", None) not in (None, lax.dot_general)


def _dense_axes(layer: Any, call: Call) -> KernelAxes:
    refuse_stateful_product(layer)
    return KernelAxes((), (0,), (1,))


def _dense_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    a, b = a.astype(dtype), b.astype(dtype)
    if _has_own_product(layer):  # which may do more than multiply
        xa = run(call, a, a.shape[-1])
    else:
        xa = down_projection(call["inputs"].astype(dtype), a, precision=layer.precision)
    return up_projection(scaling * xa, b, precision=layer.precision)


def _general_axes(layer: Any, call: Call) -> KernelAxes:
    """The kernel of DenseGeneral and LinearGeneral is laid out as (batch, in, out)."""
    refuse_stateful_product(layer)
    batch = len(as_tuple(getattr(layer, "batch_dims", getattr(layer, "batch_axis", ()))))
    inputs = len(as_tuple(layer.axis))
    outputs = len(as_tuple(getattr(layer, "features", None) or layer.out_features))
    order = tuple(range(batch + inputs + outputs))
    return KernelAxes(order[:batch], order[batch : batch + inputs], order[batch + inputs :])


def _general_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    x = call["inputs"].astype(dtype)
    axes = _general_axes(layer, call)
    contracted = tuple(sorted(axis % x.ndim for axis in as_tuple(layer.axis)))  # as Flax does
    product = layer.dot_general or lax.dot_general
    xa = product(
        x,
        a.astype(dtype),
        ((contracted, axes.inputs), (axes.stack, axes.stack)),
        precision=layer.precision,
    )
    return up_projection(
        scaling * xa, b.astype(dtype), stack=len(axes.stack), precision=layer.precision
    )


def _embed_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    ids = call["inputs"]
    if a.shape[0] == 1:  # as Flax does: a table of one row is broadcast, whatever the ids
        ids = jnp.zeros_like(ids)
    return up_projection(scaling * jnp.take(a.astype(dtype), ids, axis=0), b.astype(dtype))


DENSE = Layout(_dense_axes, _dense_low_rank)
GENERAL = Layout(_general_axes, _general_low_rank)

EMBED = Layout(
    _dense_axes,
    _embed_low_rank,
    kernel="embedding",
    dropout=False,
    attend=True,
    all_linear=False,
)
