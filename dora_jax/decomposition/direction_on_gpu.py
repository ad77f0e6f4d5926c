"""What `direction.py` computes from `V` itself, by kernels for a GPU, where a kernel is a matrix.

Each function returns what `choose` calls in a program for one GPU, or None for other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel

if TYPE_CHECKING:
    from jaxtyping import Array

    Function = Callable[..., Any]


def square_and_rows_on_gpu(
    product: KernelProduct, scaling: float, kernel: Kernel
) -> Function | None:
    """Returns `(is_short, (square, A^T V), W0, A, B, ||W0||^2) -> (square, A^T V)`."""
    if not _is_matrix(product, kernel):
        return None

    def run(is_short: Array, found: Any, kernel: Array, a: Array, b: Array, base: Array) -> Any:
        matrices = _Matrices(product, scaling, kernel, a, b)
        anew = matrices.over_stack(_module().columns_anew)
        square, rows = anew(
            matrices.vector(found[0]),
            matrices.rows(found[1]),
            matrices.vector(is_short),
            matrices.direction,
            matrices.direction.a,
        )
        square = jnp.where(is_short, square.reshape(base.shape) / base, found[0])
        return square, rows.reshape(found[1].shape)

    return run


def rows_on_gpu(
    _: Array, kernel: Kernel, *__: Array, product: KernelProduct, scaling: float
) -> Function | None:
    """Returns `(is_short, X^T V, X, W0, A, B) -> X^T V`."""
    if not _is_matrix(product, kernel):
        return None

    def run(is_short: Array, found: Array, x: Array, kernel: Array, a: Array, b: Array) -> Array:
        matrices = _Matrices(product, scaling, kernel, a, b)
        anew = matrices.over_stack(_module().columns_anew)
        short, rows = matrices.vector(is_short), matrices.rows(found)
        x = matrices.leading(product.tangent(x))
        _, new = anew(jnp.zeros(short.shape), rows, short, matrices.direction, x)
        return new.reshape(found.shape)

    return run


def transpose_on_gpu(
    _: Array, kernel: Kernel, *__: Array, product: KernelProduct, scaling: float
) -> Function | None:
    """Returns `(is_short, V Y^T, Y, W0, A, B) -> V Y^T`."""
    if not _is_matrix(product, kernel):
        return None

    def run(is_short: Array, found: Array, y: Array, kernel: Array, a: Array, b: Array) -> Array:
        matrices = _Matrices(product, scaling, kernel, a, b)
        anew = matrices.over_stack(_module().transpose_anew)
        new = anew(
            matrices.leading(found.astype(jnp.float32)),
            matrices.vector(is_short),
            matrices.direction,
            matrices.rows(y),
        )
        return new.reshape(found.shape).astype(found.dtype)

    return run


def _module() -> Any:
    """Imported where it is used: Pallas takes as long to import as the rest of the library."""
    from dora_jax.ops import short_columns

    return short_columns


def _is_matrix(product: KernelProduct, kernel: Kernel) -> bool:
    """Whether a kernel is an array `(*stack, *in, *out)`, and its norm is computed in float32."""
    if isinstance(kernel, QuantizedKernel):
        return False
    in_order = sum(product.axes, ()) == tuple(range(product.axes.ndim))
    return in_order and product.wide == jnp.float32


class _Matrices:
    """A layer's arrays as stacks of matrices, with one axis each for the stack, in and out."""

    def __init__(
        self, product: KernelProduct, scaling: float, kernel: Array, a: Array, b: Array
    ) -> None:
        stack, inputs, outputs = (
            math.prod(kernel.shape[i] for i in group) for group in product.axes
        )
        self.stack = stack if product.axes.stack else None
        self.sizes = inputs, outputs
        self.direction = _module().Direction(
            self._stacked(kernel, inputs, outputs),
            self.leading(product.rounded(a)),
            self.rows(product.rounded(b)),
            scaling,
            product.dtype,
        )

    def over_stack(self, function: Function) -> Function:
        """Returns the function of matrices as one of stacks of them."""
        return function if self.stack is None else jax.vmap(function)

    def vector(self, x: Array) -> Array:
        """Returns `(*stack, *out)` as `(stack, out)`."""
        return self._stacked(x, self.sizes[1])

    def rows(self, x: Array) -> Array:
        """Returns `(*stack, k, *out)` as `(stack, k, out)`."""
        return self._stacked(x, -1, self.sizes[1])

    def leading(self, x: Array) -> Array:
        """Returns `(*stack, *in, k)` as `(stack, in, k)`."""
        return self._stacked(x, self.sizes[0], x.shape[-1])

    def _stacked(self, x: Array, *shape: int) -> Array:
        return x.reshape(shape if self.stack is None else (self.stack, *shape))
