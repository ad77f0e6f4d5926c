"""The layouts of dense layers and of embedding tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.layers.layout import (
    Arguments,
    LayerCall,
    Layout,
    LowRank,
    refuse_stateful_product,
)
from dora_jax.ops.low_rank import down_projection, up_projection

if TYPE_CHECKING:
    from jax import Array


@dataclasses.dataclass(frozen=True)
class _PlainProduct:
    """The attributes of a layer whose product is XLA's own."""

    precision: lax.PrecisionLike


@dataclasses.dataclass(frozen=True)
class DenseLayout(Layout):
    """`Dense` and `Linear`: a kernel `(in, out)`."""

    def axes(self, layer: Any, arguments: Arguments) -> KernelAxes:
        """Returns one in and one out axis."""
        refuse_stateful_product(layer)
        return KernelAxes((), (0,), (1,))

    def stand_in(self, layer: Any) -> Hashable | None:
        """Returns the precision of a layer whose product is XLA's own."""
        if not DenseLayout.is_matrix_product(self, layer):
            return None
        return _PlainProduct(getattr(layer, "precision", None))

    def is_matrix_product(self, layer: Any) -> bool:
        """Returns whether the layer's product is XLA's own."""
        return (
            not _has_own_product(layer) and getattr(layer, "preferred_element_type", None) is None
        )

    def matrix_product(self, call: LayerCall, kernel: Array) -> Array:
        """Returns `x W`."""
        x = call.arguments[self.inputs].astype(kernel.dtype)
        return down_projection(x, kernel, precision=call.layer.precision)

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Returns `s (x A) B`."""
        a, b = branch.factors()
        if _has_own_product(call.layer):  # which may do more than multiply
            xa = call.run(call.arguments, a, a.shape[-1])
        else:
            x = call.arguments[self.inputs].astype(branch.dtype)
            xa = down_projection(x, a, precision=call.layer.precision)
        return up_projection(xa, b, precision=call.layer.precision)


@dataclasses.dataclass(frozen=True)
class GeneralLayout(Layout):
    """`DenseGeneral` and `LinearGeneral`: a kernel `(*batch, *in, *out)`."""

    def axes(self, layer: Any, arguments: Arguments) -> KernelAxes:
        """Returns the batch axes as stack axes, then the in axes, then the out axes."""
        refuse_stateful_product(layer)
        batch = len(_as_tuple(getattr(layer, "batch_dims", getattr(layer, "batch_axis", ()))))
        inputs = len(_as_tuple(layer.axis))
        outputs = len(_as_tuple(getattr(layer, "features", None) or layer.out_features))
        order = tuple(range(batch + inputs + outputs))
        return KernelAxes(order[:batch], order[batch : batch + inputs], order[batch + inputs :])

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Returns `s (x A) B`, contracted over the layer's axes of `x`."""
        layer, x = call.layer, call.arguments[self.inputs].astype(branch.dtype)
        a, b = branch.factors()
        axes = self.axes(layer, call.arguments)
        contracted = tuple(sorted(axis % x.ndim for axis in _as_tuple(layer.axis)))  # as Flax does
        product = layer.dot_general if _has_own_product(layer) else lax.dot_general
        dimensions = ((contracted, axes.inputs), (axes.stack, axes.stack))
        xa = product(x, a, dimensions, precision=layer.precision)
        return up_projection(xa, b, stack=len(axes.stack), precision=layer.precision)


@dataclasses.dataclass(frozen=True)
class EmbedLayout(DenseLayout):
    """`Embed`: a table `(vocab, features)`, looked up, or multiplied by `attend`."""

    kernel: str = "embedding"
    dropout: bool = False
    attend: bool = True
    all_linear: bool = False

    def is_matrix_product(self, layer: Any) -> bool:
        """Returns False: the kernel is looked up."""
        return False

    def shared_axes(self, axes: KernelAxes) -> KernelAxes:
        """Returns the axes with in and out exchanged: a row has scales of its own."""
        return axes._replace(inputs=axes.outputs, outputs=axes.inputs)

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Returns `s A[ids] B`."""
        ids = call.arguments[self.inputs]
        a, b = branch.factors()
        if a.shape[0] == 1:  # as Flax does: a table of one row is broadcast, whatever the ids
            ids = jnp.zeros_like(ids)
        return up_projection(jnp.take(a, ids, axis=0), b)


def _has_own_product(layer: Any) -> bool:
    """Returns whether a layer makes its product in a way of its own.

    A `functools.partial` that gives `out_sharding` alone only says where the layer's output lies.
    """
    product = getattr(layer, "dot_general", None)
    if isinstance(product, functools.partial) and product.keywords.keys() == {"out_sharding"}:
        product = product.func
    return product not in (None, lax.dot_general)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (Sequence, Mapping)) else (value,)
