"""The mathematics of DoRA, on arrays.

A kernel's axes are split into three groups: *stack* (scan-stacked layers, vmapped copies, experts),
*in* (contracted with the input) and *out*. For each stack index and output feature, DoRA
(arXiv 2402.09353, eq. 5) rebuilds the frozen kernel `W0` as

    W' = m * V / n,   V = W0 + s A B,   n = ||V|| over the in axes,

with a trainable magnitude `m (*stack, *out)` and a trainable low-rank direction
`A (*stack, *in, r)`, `B (*stack, r, *out)`. Only `merge` forms an array as large as the kernel.
Shapes are written `stack`, `in`, `out` for possibly several axes each. Nothing here knows Flax.
"""

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import (
    FrozenBase,
    base_changed,
    describe_base,
    first_row,
    kernel_norm,
)
from dora_jax.decomposition.direction import relative_square
from dora_jax.decomposition.initializers import init_layer
from dora_jax.decomposition.merge import materialize, merge_kernel
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.decomposition.quantize import Quantization, quantize_kernel
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel, dense
from dora_jax.decomposition.scale import (
    direction_norm,
    effective_factors,
    magnitude_over_norm,
)
from dora_jax.decomposition.sharding import (
    layer_entries,
    layer_shardings,
    quantized_shardings,
)

__all__ = [
    "Factors",
    "FrozenBase",
    "Kernel",
    "KernelAxes",
    "KernelProduct",
    "Quantization",
    "QuantizedKernel",
    "base_changed",
    "dense",
    "describe_base",
    "direction_norm",
    "effective_factors",
    "first_row",
    "init_layer",
    "kernel_norm",
    "layer_entries",
    "layer_shardings",
    "magnitude_over_norm",
    "materialize",
    "merge_kernel",
    "quantize_kernel",
    "quantized_shardings",
    "relative_square",
]
