"""`(x A) B`: the two products of a low rank, with gradients that every backend multiplies fast.

JAX's gradient of `x W` is a product whose left operand is the cotangent. XLA runs that product
slowly on a CPU when one side has only r features:

- The gradient of `B`, `(x A)^T g`. XLA transposes the left operand first. With activations of
  three axes it also computes everything that leads to that operand a second time, in transposed
  order. With `x A` as the left operand nothing is transposed: a step of a 6-layer BERT with LoRA
  took 0.68 of the time.
- The gradient of `A`, `x^T g`. XLA takes 5 to 10 times as long for a result of r columns as for
  one of r rows that is transposed afterwards.

XLA for TPU compiles both orders to the same program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from dora_jax.ops.primitives import define_primitive, transpose_in_first

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def down_projection(
    x: Float[Array, "*batch in"], a: Float[Array, "in r"], *, precision: lax.PrecisionLike = None
) -> Float[Array, "*batch r"]:
    """Returns `x A` in the dtype that both promote to.

    Args:
      x: the layer's input.
      a: the first factor.
      precision: as for `jax.lax.dot_general`.

    Example:
      >>> down_projection(jnp.ones((4, 7, 3)), jnp.ones((3, 2))).shape
      (4, 7, 2)
    """
    x, a = (v.astype(jnp.result_type(x, a)) for v in (x, a))
    return _down_projection(x, a, stack=0, precision=current_precision(precision))


def up_projection(
    x: Float[Array, "*stack *batch r"],
    b: Float[Array, "*stack r *out"],
    *,
    stack: int = 0,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*stack *batch *out"]:
    """Returns `x B`, contracted over r, in the dtype that both promote to.

    Args:
      x: the input projected to r features.
      b: the second factor.
      stack: how many leading axes of both are stack axes.
      precision: as for `jax.lax.dot_general`.

    Example:
      >>> up_projection(jnp.ones((4, 7, 2)), jnp.ones((2, 3))).shape
      (4, 7, 3)
    """
    x, b = (v.astype(jnp.result_type(x, b)) for v in (x, b))
    return _up_projection(x, b, stack=stack, precision=current_precision(precision))


def current_precision(precision: Any) -> Any:
    """Returns the precision that `dot_general` would use if it were called now.

    A primitive calls `dot_general` later, when the default precision may be another one.
    """
    if precision is None:
        return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return precision


def _product(x: Array, b: Array, *, stack: int, precision: Any) -> Array:
    axes = tuple(range(stack))
    return lax.dot_general(x, b, (((x.ndim - 1,), (stack,)), (axes, axes)), precision)


def _down_gradient_of_a(g: Array, x: Array, a: Any, *, stack: int, precision: Any) -> Array:
    return _down_gradient(x, g, stack=stack, precision=precision)


def _batch_down(
    operands: tuple[Array, Array],
    positions: tuple[int | None, int | None],
    *,
    stack: int,
    precision: Any,
) -> tuple[Array, int]:
    """Makes a batch axis of both one more stack axis; of one operand, one more of its own axes."""
    (x, a), (of_x, of_a) = operands, positions
    if of_a is None:
        assert of_x is not None
        x = jnp.moveaxis(x, of_x, stack)
        return _down_projection(x, a, stack=stack, precision=precision), stack
    if of_x is None:  # one product of all their columns
        a = jnp.moveaxis(a, of_a, -2)
        every = a.reshape(*a.shape[:-2], -1)
        y = _down_projection(x, every, stack=stack, precision=precision)
        return y.reshape(*y.shape[:-1], *a.shape[-2:]), y.ndim - 1
    x, a = jnp.moveaxis(x, of_x, 0), jnp.moveaxis(a, of_a, 0)
    return _down_projection(x, a, stack=stack + 1, precision=precision), 0


def _contract_batch(x: Array, g: Array, *, stack: int, precision: Any) -> Array:
    """Returns `x^T g`, summed over the batch, in JAX's order."""
    return jnp.matrix_transpose(_rows(x, g, stack, precision))


def _contract_batch_on_cpu(x: Array, g: Array, *, stack: int, precision: Any) -> Array:
    # Without the barrier XLA merges the transpose into the product and runs the slow one.
    rows = lax.optimization_barrier(_rows(x, g, stack, precision))
    if not stack or not rows.size:
        return jnp.matrix_transpose(rows)
    # One by one: where XLA finds a transpose of a product with stack axes, behind the barrier too,
    # it may turn both into a product of a layout that it then refuses, and ends the process.
    each = [one.T for one in rows.reshape(-1, *rows.shape[-2:])]
    return jnp.stack(each).reshape(*rows.shape[:-2], *each[0].shape)


def _rows(x: Array, g: Array, stack: int, precision: Any) -> Array:
    """Returns `g^T x`, summed over the batch: a row for each of the r features of `g`."""
    batch, axes = tuple(range(stack, x.ndim - 1)), tuple(range(stack))
    return lax.dot_general(g, x, ((batch, batch), (axes, axes)), precision)


def _contract_batch_gradient_of_x(
    c: Array, x: Any, g: Array, *, stack: int, precision: Any
) -> Array:
    return _down_gradient_of_x(g, x, c, stack=stack, precision=precision)


def _contract_batch_gradient_of_g(
    c: Array, x: Array, g: Any, *, stack: int, precision: Any
) -> Array:
    return _product(x, c, stack=stack, precision=precision)


def _up_gradient_of_b(g: Array, x: Array, b: Any, *, stack: int, precision: Any) -> Array:
    batch, axes = tuple(range(stack, x.ndim - 1)), tuple(range(stack))
    return lax.dot_general(x, g, ((batch, batch), (axes, axes)), precision)


def _batch_up(
    operands: tuple[Array, Array],
    positions: tuple[int | None, int | None],
    *,
    stack: int,
    precision: Any,
) -> tuple[Array, int]:
    """Makes a batch axis of both one more stack axis; of one operand, one more of its own axes."""
    (x, b), (of_x, of_b) = operands, positions
    if of_x is None:
        assert of_b is not None
        y = _up_projection(x, jnp.moveaxis(b, of_b, -1), stack=stack, precision=precision)
        return y, y.ndim - 1
    if of_b is None:
        x = jnp.moveaxis(x, of_x, stack)
        return _up_projection(x, b, stack=stack, precision=precision), stack
    x, b = jnp.moveaxis(x, of_x, 0), jnp.moveaxis(b, of_b, 0)
    return _up_projection(x, b, stack=stack + 1, precision=precision), 0


_down_gradient_of_x = transpose_in_first(_product)

_down_projection = define_primitive(
    "dora_down_projection",
    _product,
    bilinear=(_down_gradient_of_x, _down_gradient_of_a),
    batch=_batch_down,
)

_down_gradient = define_primitive(
    "dora_down_gradient",
    _contract_batch,
    bilinear=(_contract_batch_gradient_of_x, _contract_batch_gradient_of_g),
    on_cpu=_contract_batch_on_cpu,
)

_up_projection = define_primitive(
    "dora_up_projection",
    _product,
    bilinear=(transpose_in_first(_product), _up_gradient_of_b),
    batch=_batch_up,
)
