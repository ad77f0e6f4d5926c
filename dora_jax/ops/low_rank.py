"""`(x A) B`: the two products of a low rank, with gradients that every backend multiplies well.

JAX differentiates `x W` to a product with the cotangent as the left operand. XLA on a CPU makes
less of it than of the same product in another order, where one side has r features alone:

- The gradient of `B`, `(x A)^T g`: it transposes the left operand first, and with activations of
  three axes makes all that leads to it a second time, in transposed order. With `x A` as the left
  operand there is nothing to transpose. A step of a 6-layer BERT with LoRA took 0.68 of the time.
- The gradient of `A`, `x^T g`: its kernel for a result of r columns takes 5 to 10 times as long as
  the one for r rows, transposed in the end.

In XLA for TPU the programs are the same either way. Rules of this kind with forward mode, `vmap`
and reverse mode alike take a primitive: a `jax.custom_vjp` has no forward mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

from dora_jax.ops.primitives import _bilinear, has_mesh_in_type

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
    if has_mesh_in_type(x) or has_mesh_in_type(a):
        return _down(x, a, precision=precision)
    return _down_projection.bind(x, a, precision=_read(precision))


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
    if has_mesh_in_type(x) or has_mesh_in_type(b):
        return _up(x, b, stack=stack, precision=precision)
    return _up_projection.bind(x, b, stack=stack, precision=_read(precision))


def _read(precision: Any) -> Any:
    """Returns the precision as `dot_general` would read it, but here, where this is traced."""
    if precision is None:
        return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return precision


def _down(x: Array, a: Array, *, precision: Any) -> Array:
    return lax.dot_general(x, a, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _down_type(x: Any, a: Any, *, precision: Any) -> Any:
    return jax.core.ShapedArray((*x.shape[:-1], a.shape[1]), x.dtype)


def _down_to_x(g: Array, x: Any, a: Array, *, precision: Any) -> Array:
    return lax.dot_general(g, a, (((g.ndim - 1,), (1,)), ((), ())), precision)


def _down_to_a(g: Array, x: Array, a: Any, *, precision: Any) -> Array:
    return _down_gradient.bind(x, g, precision=precision)


def _down_gradient_as_jax(x: Array, g: Array, *, precision: Any) -> Array:
    """Returns `x^T g`, summed over the batch."""
    batch = tuple(range(x.ndim - 1))
    return lax.dot_general(g, x, ((batch, batch), ((), ())), precision).T


def _down_gradient_on_cpu(x: Array, g: Array, *, precision: Any) -> Array:
    batch = tuple(range(x.ndim - 1))
    rows = lax.dot_general(g, x, ((batch, batch), ((), ())), precision)
    # Without it XLA takes the transpose into the product, which is then the slow one.
    return lax.optimization_barrier(rows).T


def _down_gradient_type(x: Any, g: Any, *, precision: Any) -> Any:
    return jax.core.ShapedArray((x.shape[-1], g.shape[-1]), x.dtype)


def _down_gradient_to_x(c: Array, x: Any, g: Array, *, precision: Any) -> Array:
    return _down_to_x(g, x, c, precision=precision)


def _down_gradient_to_g(c: Array, x: Array, g: Any, *, precision: Any) -> Array:
    return _down(x, c, precision=precision)


def _up(x: Array, b: Array, *, stack: int, precision: Any) -> Array:
    axes = tuple(range(stack))
    return lax.dot_general(x, b, (((x.ndim - 1,), (stack,)), (axes, axes)), precision)


def _up_type(x: Any, b: Any, *, stack: int, precision: Any) -> Any:
    return jax.core.ShapedArray((*x.shape[:-1], *b.shape[stack + 1 :]), x.dtype)


def _up_to_x(g: Array, x: Any, b: Array, *, stack: int, precision: Any) -> Array:
    batch, axes = x.aval.ndim - 1, tuple(range(stack))
    outputs = tuple(range(batch, g.ndim)), tuple(range(stack + 1, b.ndim))
    return lax.dot_general(g, b, (outputs, (axes, axes)), precision)


def _up_to_b(g: Array, x: Array, b: Any, *, stack: int, precision: Any) -> Array:
    batch, axes = tuple(range(stack, x.ndim - 1)), tuple(range(stack))
    return lax.dot_general(x, g, ((batch, batch), (axes, axes)), precision)


def _batch_up(
    operands: tuple[Array, Array],
    positions: tuple[int | None, int | None],
    *,
    stack: int,
    precision: Any,
) -> tuple[Array, int]:
    """A batch axis of both is one more stack axis; of one alone, one more of its own axes."""
    (x, b), (of_x, of_b) = operands, positions
    if of_x is None:
        assert of_b is not None
        y = up_projection(x, jnp.moveaxis(b, of_b, -1), stack=stack, precision=precision)
        return y, y.ndim - 1
    if of_b is None:
        x = jnp.moveaxis(x, of_x, stack)
        return up_projection(x, b, stack=stack, precision=precision), stack
    x, b = jnp.moveaxis(x, of_x, 0), jnp.moveaxis(b, of_b, 0)
    return up_projection(x, b, stack=stack + 1, precision=precision), 0


def _batch_down(
    operands: tuple[Array, Array], positions: tuple[int | None, int | None], *, precision: Any
) -> tuple[Array, int]:
    (x, a), (of_x, of_a) = operands, positions
    if of_a is None:
        assert of_x is not None
        return down_projection(jnp.moveaxis(x, of_x, 0), a, precision=precision), 0
    return jax.vmap(lambda x, a: _down(x, a, precision=precision), positions)(x, a), 0


def _batch_down_gradient(
    operands: tuple[Array, Array], positions: tuple[int | None, int | None], *, precision: Any
) -> tuple[Array, int]:
    return jax.vmap(lambda x, g: _down_gradient_as_jax(x, g, precision=precision), positions)(
        *operands
    ), 0


_down_projection = _bilinear(
    "dora_down_projection", _down, _down_type, _down_to_x, _down_to_a, _batch_down
)

_down_gradient = _bilinear(
    "dora_down_gradient",
    _down_gradient_as_jax,
    _down_gradient_type,
    _down_gradient_to_x,
    _down_gradient_to_g,
    _batch_down_gradient,
)

mlir.register_lowering(
    _down_gradient, mlir.lower_fun(_down_gradient_on_cpu, multiple_results=False), platform="cpu"
)

_up_projection = _bilinear("dora_up_projection", _up, _up_type, _up_to_x, _up_to_b, _batch_up)
