"""`||W0 + s A B||^2` where `A^T W0` is at hand, from the product that the layer makes anyway.

So the kernel is read once in each pass, see `dora_jax.ops.joined`. As in `direction`, what is
computed from factors is computed from `V` itself where columns of `V` are short.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.decomposition.direction import (
    SMALL_SQUARE,
    rows_of_columns,
    square_and_rows_of_columns,
    transpose_of_columns,
)
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.decomposition.quantized import Kernel
from dora_jax.ops.choice import choose
from dora_jax.ops.rarely import define_linear_map

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def relative_square_from_rows(
    rows: Float[Array, "r out"],
    kernel: Kernel,
    factors: Factors,
    base_norm: Float[Array, " out"],
    scaling: float,
    product: KernelProduct,
) -> Float[Array, " out"]:
    """Returns `||W0 + s A B||^2 / ||W0||^2`, as `relative_square`; `rows` are `A^T W0`.

    Its derivative in the rows is that in `A` through them.
    """
    base_square = jnp.square(jnp.where(base_norm == 0, 1, base_norm))
    return _square_and_rows(product, scaling, rows, kernel, *factors, base_square)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _square_and_rows(
    product: KernelProduct,
    scaling: float,
    from_kernel: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    base_square: Array,
) -> tuple[Float[Array, " out"], Float[Array, "r out"]]:
    """Returns `||V||^2 / ||W0||^2` and `A^T V`, from `A^T W0`."""
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    from_factors = scaling * product.with_factors(a, a, b)
    change = scaling * product.sum_over_rank((2 * from_kernel + from_factors) * b)
    square = 1 + change / base_square
    return choose(
        square < SMALL_SQUARE,
        functools.partial(square_and_rows_of_columns, product, scaling),
        lambda found, *_: found,
        (square, from_kernel + from_factors),
        kernel,
        lora_a,
        lora_b,
        base_square,
    )


@_square_and_rows.defjvp
def _square_and_rows_jvp(
    product: KernelProduct, scaling: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Takes the kernel and the square of the base's norm for constants."""
    _, kernel, lora_a, lora_b, base_square = primals
    from_kernel_dot, _, a_dot, b_dot, _ = tangents
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    square, rows = _square_and_rows(product, scaling, *primals)
    short = square < SMALL_SQUARE
    moved = from_kernel_dot + scaling * product.with_factors(product.tangent(a_dot), a, b)
    moved = jnp.where(short, 0, moved) + _rows_where_short(
        short, a_dot, kernel, lora_a, lora_b, short, product=product, scaling=scaling
    )
    half = product.tangent(b_dot) * rows + b * moved
    rows_dot = (
        moved
        + scaling * product.with_factors(a, product.tangent(a_dot), b)
        + scaling * product.with_factors(a, a, product.tangent(b_dot))
    )
    square_dot = 2 * scaling * product.sum_over_rank(half) / base_square
    return (square, rows), (square_dot, rows_dot)


def _nothing(
    x: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    short: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "r out"]:
    """Returns the rows of the columns that are short where none is: zeros."""
    return jnp.zeros(lora_b.shape, product.wide)


def _short_rows(
    x: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    short: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "r out"]:
    """Returns `X^T V` of the columns that are short, zero elsewhere."""
    rows = rows_of_columns(x, kernel, lora_a, lora_b, product=product, scaling=scaling)
    return jnp.where(short, rows, 0)


def _short_transpose(
    rows: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    short: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "in r"]:
    """Returns `V rows^T` over the columns that are short."""
    rows = jnp.where(short, rows, 0)
    return transpose_of_columns(rows, kernel, lora_a, lora_b, product=product, scaling=scaling)


def _no_kernels(*_: Any, **__: Any) -> None:
    """There are none for a GPU."""


_rows_where_short = define_linear_map(
    "dora_rows_where_short",
    _nothing,
    _short_rows,
    _short_transpose,
    on_gpu=(_no_kernels, _no_kernels),
)
