"""The output of an adapted layer whose direction is much shorter than its kernel.

There `x W0 + s (x A) B` is a small difference of large sums: float32 loses `eps / delta` of it,
with `delta = ||V|| / ||W0||`. It is `x V` instead, from a few columns of `V` at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from dora_jax.decomposition.columns import Block, Columns
from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.quantized import Kernel
from dora_jax.layers.layout import LayerCall, Layout, LowRank
from dora_jax.ops.fork import fork, sum_of_terms
from dora_jax.ops.output_scale import Exact, wide_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float


def can_cancel(layout: Layout, call: LayerCall, dropped: LayerCall, dtype: DTypeLike) -> bool:
    """Whether the output of a call can be much more exact than the sum `x W0 + s (x A) B`.

    Not where the layer's own dtype rounds as much; nor where dropout makes the two inputs differ,
    so that nothing cancels; nor where nothing is multiplied, as in a lookup.
    """
    x = call.arguments[layout.inputs]
    same = dropped.arguments[layout.inputs] is x
    precision = getattr(call.layer, "precision", None)
    return same and jnp.issubdtype(x.dtype, jnp.inexact) and multiplies_wide(dtype, precision)


def multiplies_wide(dtype: DTypeLike, precision: lax.PrecisionLike) -> bool:
    """Whether a layer multiplies in float32 or wider.

    A GPU rounds the operands of a float32 product to TF32, unless a precision says otherwise.
    """
    if wide_dtype(dtype) != jnp.dtype(dtype):
        return False
    default = precision is None and jax.config.jax_default_matmul_precision is None  # type: ignore[attr-defined]
    return not (default and jax.default_backend() == "gpu" and jnp.dtype(dtype) == jnp.float32)


def exact_output(
    layout: Layout,
    call: LayerCall,
    branch: LowRank,
    product: KernelProduct,
    is_short: Bool[Array, "*stack *out"],
) -> Exact:
    """Returns how `x V` is computed in a call, and where that is needed.

    Every layout can do it: with a block of `V` in the place of `A`, and of `B` the matrix that puts
    the block's columns in their places, `(x A) B` is the block's part of `x V`.
    """
    traced, arguments_of = call.traced_arguments()
    like = jax.ShapeDtypeStruct(call.plain_output.shape, call.plain_output.dtype)
    outputs = tuple(call.kernel.shape[i] for i in product.axes.outputs)

    def output(kernel: Kernel, a: Array, b: Array, *arrays: Array) -> Array:
        own = dataclasses.replace(call, arguments=arguments_of(arrays), kernel=kernel, bias=None)
        columns = Columns.of(product, branch.scaling, kernel, b)
        if columns.is_whole and layout.is_matrix_product(call.layer):
            v = columns.whole(kernel, a, b)
            return layout.matrix_product(own, v.astype(branch.dtype)).astype(like.dtype)
        leading = a.shape[:-1]

        def step(at: Block, total: Array) -> Array:
            block = columns.direction(at, kernel, a, b).reshape(*leading, -1)
            places = columns.selection(at, outputs)
            places = jnp.broadcast_to(places, (*b.shape[: len(product.axes.stack)], *places.shape))
            part = LowRank(block, places, 1.0, branch.dtype)
            return total + layout.low_rank(own, part).astype(total.dtype)

        return columns.each(step, jnp.zeros(like.shape, like.dtype))

    operands = (call.kernel, branch.a, branch.b, *traced)
    return Exact(is_short, output, operands)


def exact_attend(
    columns: Columns,
    attend: Callable[[Array], Array],
    added: Callable[[Array, Array, Array], Array],
    query: Float[Array, "*batch features"],
    operands: tuple[Any, ...],
) -> Float[Array, "*batch vocab"]:
    """Returns `attend(query) + added(query)`, or `query V^T` where a column of `V` is short.

    The gradient of the query is `g V` there. Those of the magnitude and the factors need it too,
    since the query was scaled.

    Args:
      columns: how `V` is formed.
      attend: the product with the frozen table.
      added: `(query, A, B) -> logits`, the low-rank product.
      query: scaled.
      operands: whether each column is short, the table, `A` and `B`.
    """
    is_short, kernel, _, _ = operands
    vocab = kernel.shape[columns.product.axes.inputs[0]]

    def logits(query: Array, kernel: Kernel, a: Array, b: Array) -> Array:
        def step(at: Block, total: Array) -> Array:
            v = columns.direction(at, kernel, a, b)
            part = columns.take_along(query, at, query.ndim - 1, new=True)
            return total + jnp.einsum("...c,vc->...v", part, v, precision="highest")

        return columns.each(step, jnp.zeros((*query.shape[:-1], vocab), query.dtype))

    def by_query(g: Array, kernel: Kernel, a: Array, b: Array) -> Array:
        def step(at: Block, total: Array) -> Array:
            v = columns.direction(at, kernel, a, b)
            part = jnp.einsum("...v,vc->...c", g, v, precision="highest")
            return columns.put_along(total, part, at, total.ndim - 1)

        return columns.each(step, jnp.zeros((*g.shape[:-1], kernel.shape[1]), g.dtype))

    shape = (*query.shape[:-1], vocab)
    one, other, zeros = fork(query, shape, Exact(is_short, by_query, operands[1:]))
    plain = attend(one)
    terms = (plain, added(other, *operands[2:]).astype(plain.dtype), zeros.astype(plain.dtype))
    return sum_of_terms(*terms, Exact(is_short, logits, (query, *operands[1:])))
