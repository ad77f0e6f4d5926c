"""`(x A) B`: the product with `B`, and a gradient that every backend multiplies as it stands.

JAX differentiates a product with the cotangent as the left operand. For the gradient of `B` that is
the largest array around, contracted over its leading axes, and XLA on a CPU transposes it first:
with activations of three axes it makes all that leads to it a second time, in transposed order.
With the activation as the left operand (`r` features) there is nothing to transpose. The step of a
6-layer BERT with LoRA took 0.68 of the time; in XLA for TPU the program is the same either way.

A rule of this kind with forward mode, `vmap` and reverse mode alike takes a primitive: a
`jax.custom_vjp` has no forward mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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
    if _has_mesh_in_type(x) or _has_mesh_in_type(b):
        # In `jax.shard_map` and under explicit sharding JAX's own product knows the rules of the
        # types; the order of two operands is not worth a second set of them.
        return _dot_general(x, b, stack=stack, precision=precision)
    if precision is None:  # as `dot_general` would read it, but here, where this is traced
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _up_projection.bind(x, b, stack=stack, precision=precision)


def _dot_general(x: Array, b: Array, *, stack: int, precision: lax.PrecisionLike) -> Array:
    axes = tuple(range(stack))
    return lax.dot_general(x, b, (((x.ndim - 1,), (stack,)), (axes, axes)), precision)


def _has_mesh_in_type(x: Array) -> bool:
    return any(kind is not AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types)


def _result_type(x: Any, b: Any, *, stack: int, precision: Any) -> Any:
    return jax.core.ShapedArray((*x.shape[:-1], *b.shape[stack + 1 :]), x.dtype)


def _transpose_x(g: Array, x: Any, b: Array, *, stack: int, precision: Any) -> Array:
    batch, axes = x.aval.ndim - 1, tuple(range(stack))
    outputs = tuple(range(batch, g.ndim)), tuple(range(stack + 1, b.ndim))
    return lax.dot_general(g, b, (outputs, (axes, axes)), precision)


def _transpose_b(g: Array, x: Array, b: Any, *, stack: int, precision: Any) -> Array:
    batch, axes = tuple(range(stack, x.ndim - 1)), tuple(range(stack))
    return lax.dot_general(x, g, ((batch, batch), (axes, axes)), precision)


def _batch(
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


_up_projection = Primitive("dora_up_projection")
_up_projection.def_impl(_dot_general)
_up_projection.def_abstract_eval(_result_type)
mlir.register_lowering(_up_projection, mlir.lower_fun(_dot_general, multiple_results=False))
ad.defbilinear(_up_projection, _transpose_x, _transpose_b)
batching.primitive_batchers[_up_projection] = _batch
