"""The layout of convolutions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError
from dora_jax.layers.layout import Arguments, LayerCall, Layout, LowRank, refuse_stateful_product
from dora_jax.ops.low_rank import up_projection

if TYPE_CHECKING:
    from jax import Array


@dataclasses.dataclass(frozen=True)
class ConvLayout(Layout):
    """`Conv` and `ConvTranspose`: a kernel `(*window, in / groups, out)`."""

    all_linear: bool = False

    def axes(self, layer: Any, arguments: Arguments) -> KernelAxes:
        """Returns the window and the in features as in axes."""
        if getattr(layer, "mask", None) is not None:
            raise LayoutError(
                f"{type(layer).__name__} has a mask on its kernel, through which a low-rank "
                "product does not factor: exclude_modules"
            )
        refuse_stateful_product(layer)
        spatial = 1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)
        inputs, outputs = (spatial, spatial + 1)
        if getattr(layer, "transpose_kernel", False):
            inputs, outputs = outputs, inputs
        return KernelAxes((), (*range(spatial), inputs), (outputs,))

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Convolves with A as a kernel of r features (of every group), then mixes them with B."""
        layer = call.layer
        groups = getattr(layer, "feature_group_count", 1)
        a, b = branch.factors()
        kernel = jnp.concatenate([a] * groups, axis=-1)
        if getattr(layer, "transpose_kernel", False):
            kernel = jnp.swapaxes(kernel, -1, -2)
        rank, outputs = branch.b.shape
        xa = call.run(call.arguments, kernel, groups * rank)
        if groups == 1:
            return up_projection(xa, b, precision=layer.precision)
        xa = xa.reshape(*xa.shape[:-1], groups, rank)
        b = b.reshape(rank, groups, outputs // groups)
        y = jnp.einsum("...gr,rgo->...go", xa, b, precision=layer.precision)
        return y.reshape(*y.shape[:-2], outputs)
