"""The plain output of a layer, and `A^T W0` with it where the kernel is quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import Adapter
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.decomposition.quantized import QuantizedKernel, dense
from dora_jax.decomposition.scale import divides_by_norm
from dora_jax.layers.layout import LayerCall, Layout
from dora_jax.ops.joined import Dense, joined_product
from dora_jax.ops.low_rank import current_precision
from dora_jax.ops.primitives import has_mesh_in_type

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def plain_output_and_rows(
    settings: LayerSettings,
    layout: Layout,
    call: LayerCall,
    adapter: Adapter,
    factors: Factors | None,
    product: KernelProduct,
) -> tuple[Float[Array, "..."], Float[Array, "r out"] | None]:
    """Returns `x W0`, and `A^T W0` from the same product, or None where these are two products.

    They are one where a dense layer's kernel is quantised: see `dora_jax.ops.joined`.
    """
    kernel, h = call.kernel, call.plain_output
    x = call.arguments[layout.inputs]
    if (
        factors is None
        or not isinstance(kernel, QuantizedKernel)
        or not divides_by_norm(settings, adapter)
        or not layout.is_matrix_product(call.layer)
        or kernel.ndim != 2
        or product.cut
        or h.dtype != product.dtype
        or h.dtype.name == "float16"  # whose gradients `product` keeps from rounding
        or has_mesh_in_type(x, *jax.tree.leaves(kernel))
    ):
        return h, None
    leaves, structure = jax.tree.flatten(kernel)
    precision = current_precision(product.precision)
    how = Dense(structure, dense, h.dtype, product.wide, precision)
    return joined_product(x.astype(h.dtype), factors.a, leaves, how)
