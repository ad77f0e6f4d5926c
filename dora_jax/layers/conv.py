"""The layout of convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError
from dora_jax.layers.layout import Call, Layout, Run, refuse_stateful_product
from dora_jax.ops.low_rank import up_projection

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import DTypeLike


def _conv_axes(layer: Any, call: Call) -> KernelAxes:
    if getattr(layer, "mask", None) is not None:
        raise LayoutError(
            f"{type(layer).__name__} has a mask on its kernel, through which a low-rank product "
            "does not factor: exclude_modules"
        )
    refuse_stateful_product(layer)
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
    if groups == 1:
        return up_projection(scaling * xa, b.astype(dtype), precision=layer.precision)
    xa = (scaling * xa).reshape(*xa.shape[:-1], groups, rank)
    b = b.astype(dtype).reshape(rank, groups, outputs // groups)
    y = jnp.einsum("...gr,rgo->...go", xa, b, precision=layer.precision)
    return y.reshape(*y.shape[:-2], outputs)


CONV = Layout(_conv_axes, _conv_low_rank, all_linear=False)
