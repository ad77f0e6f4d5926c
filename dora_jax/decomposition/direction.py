"""The direction `V = W0 + s A B`: its square, and `A^T V`, without forming it.

The square comes from the factors, `||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T (A^T A) B)`. Where a
column of `V` is much shorter than that of `W0` these terms cancel: in float32 the square loses
`eps / delta^2`, with `delta = ||V|| / ||W0||`, and `A^T V = A^T W0 + s (A^T A) B` loses
`eps / delta`. There, which is rare, `V` itself is formed, a few columns at a time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dora_jax.decomposition.columns import Block, Columns
from dora_jax.decomposition.direction_on_gpu import (
    rows_on_gpu,
    square_and_rows_on_gpu,
    transpose_on_gpu,
)
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.decomposition.quantized import Kernel, dense
from dora_jax.ops.choice import choose
from dora_jax.ops.rarely import define_linear_map

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# The smallest `||V||^2 / ||W0||^2` that is summed from the factors.
SMALL_SQUARE = 0.1


def relative_square(
    kernel: Kernel,
    factors: Factors,
    base_norm: Float[Array, "*stack *out"],
    scaling: float,
    product: KernelProduct,
) -> Float[Array, "*stack *out"]:
    """Returns `||W0 + s A B||^2 / ||W0||^2`, without forming `W0 + s A B`.

    It is exactly 1 where `B` is 0. Accumulated in float32 or wider. Costs `2 r in out` operations.

    Args:
      kernel: the frozen kernel `W0`.
      factors: `A` and `B`.
      base_norm: `||W0||`, zero where a column is zero.
      scaling: `s`.
      product: how the layer multiplies.
    """
    product = product._replace(dtype=jnp.dtype(product.dtype or kernel.dtype))
    if not product.axes.outputs:  # one column: give it an axis
        product = product._replace(axes=product.axes._replace(outputs=(kernel.ndim,)))
        wide = Factors(factors.a, factors.b[..., None])
        square = relative_square(
            dense(kernel)[..., None], wide, base_norm[..., None], scaling, product
        )
        return square[..., 0]
    base_square = jnp.square(jnp.where(base_norm == 0, 1, base_norm))
    return _square_and_rows(product, scaling, kernel, *factors, base_square)[0]


# With `V = W0 + s A B` the differential of `||V||^2` is `2 s <A^T V, dB> + 2 s <dA^T V, B>`. This
# form needs one product for each tangent; JAX would differentiate the symmetric `A^T A` twice.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _square_and_rows(
    product: KernelProduct,
    scaling: float,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    base_square: Array,
) -> tuple[Float[Array, "*stack *out"], Float[Array, "*stack r *out"]]:
    """Returns `||V||^2 / ||W0||^2` and `A^T V`."""
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    from_kernel = product.with_kernel(lora_a, kernel)
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
        on_gpu=square_and_rows_on_gpu(product, scaling, kernel),
    )


def _square_and_rows_jvp(
    product: KernelProduct, scaling: float, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    kernel, lora_a, lora_b, base_square = primals
    kernel_dot, a_dot, b_dot, base_dot = map(_tangent_or_none, tangents)
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    square, rows = _square_and_rows(product, scaling, *primals)
    half, rows_dot = jnp.zeros_like(rows), jnp.zeros_like(rows)
    if b_dot is not None:
        half += product.tangent(b_dot) * rows
        rows_dot += scaling * product.with_factors(a, a, product.tangent(b_dot))
    if a_dot is not None:
        moved = _with_direction(
            square < SMALL_SQUARE, a_dot, kernel, lora_a, lora_b, product=product, scaling=scaling
        )
        half += b * moved
        rows_dot += moved + scaling * product.with_factors(a, product.tangent(a_dot), b)
    if kernel_dot is not None:
        moved = product.with_kernel(lora_a, kernel_dot)
        half += b * moved
        rows_dot += moved
    square_dot = 2 * scaling * product.sum_over_rank(half) / base_square
    if base_dot is not None:
        square_dot += (1 - square) * base_dot / base_square
    return (square, rows), (square_dot, rows_dot)


def _tangent_or_none(tangent: Any) -> Array | None:
    """Returns a tangent if there is one: codes and scales, as integers, have none."""
    return None if isinstance(jax.tree.leaves(tangent)[0], SymbolicZero) else tangent


_square_and_rows.defjvp(_square_and_rows_jvp, symbolic_zeros=True)


def square_and_rows_of_columns(
    product: KernelProduct,
    scaling: float,
    found: tuple[Array, Array],
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    base_square: Array,
) -> tuple[Array, Array]:
    """Returns both from `V`; a square that is not small stays as it was found."""
    columns = Columns.of(product, scaling, kernel, lora_b)
    a, stack = product.rounded(lora_a), len(product.axes.stack)
    inputs = tuple(range(stack, stack + len(product.axes.inputs)))

    def step(block: Block, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v = columns.direction(block, kernel, lora_a, lora_b)
        square = columns.put(carry[0], jnp.sum(jnp.square(v), inputs), block, 0)
        return square, columns.put(carry[1], product.contract("iy,io->yo", a, v), block, 1)

    square, rows = columns.each(step, jax.tree.map(jnp.zeros_like, found))
    return jnp.where(found[0] < SMALL_SQUARE, square / base_square, found[0]), rows


def _rows_of_factors(
    x: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "*stack r *out"]:
    """Returns `X^T V = X^T W0 + s (X^T A) B` for `X (*stack, *in, r)`."""
    a, b = product.rounded(lora_a), product.rounded(lora_b)
    added = product.with_factors(product.tangent(x), a, b)
    return product.tangent_with_kernel(x, kernel) + scaling * added


def rows_of_columns(
    x: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "*stack r *out"]:
    """Returns the same from `V`."""
    columns = Columns.of(product, scaling, kernel, lora_b)
    x = product.tangent(x)

    def step(block: Block, rows: Array) -> Array:
        v = columns.direction(block, kernel, lora_a, lora_b)
        return columns.put(rows, product.contract("iy,io->yo", x, v), block, 1)

    return columns.each(step, jnp.zeros_like(lora_b, product.wide))


def transpose_of_columns(
    rows: Array,
    kernel: Kernel,
    lora_a: Array,
    lora_b: Array,
    *,
    product: KernelProduct,
    scaling: float,
) -> Float[Array, "*stack *in r"]:
    """Returns `V rows^T`, from `V`."""
    columns = Columns.of(product, scaling, kernel, lora_b)

    def step(block: Block, total: Array) -> Array:
        v = columns.direction(block, kernel, lora_a, lora_b)
        return total + product.contract("io,yo->iy", v, columns.take(rows, block, 1, new=True))

    total = columns.each(step, jnp.zeros_like(lora_a, product.wide))
    return total.astype(lora_a.dtype)


_with_direction = define_linear_map(
    "dora_rows_of_direction",
    _rows_of_factors,
    rows_of_columns,
    transpose_of_columns,
    on_gpu=(rows_on_gpu, transpose_on_gpu),
)
