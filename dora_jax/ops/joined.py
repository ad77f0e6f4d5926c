"""`x W` and `A^T W` in one product, `[x; A^T] W`, so that the kernel has one consumer a pass.

A quantised kernel is dequantised by XLA for TPU inside of a product, if that is its only use.
Otherwise the dequantised kernel is written, and kept from the forward to the backward pass. A step
of three layers of 4096 x 4096 with 512 tokens on TPU v5e reads and writes 711 MB for nf4 with two
products a pass, and keeps 123 MB; bf16 kernels take 532 MB.

On other platforms, and on several devices, these are two products, as without this file: rows of
another number may be multiplied in another order, and rows that lie on several devices do not join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Dense(NamedTuple):
    """How a kernel is made of its leaves, and multiplied; hashable.

    Attributes:
      structure: of the kernel, from `jax.tree.flatten`.
      dense: `kernel -> array`, a function of a module.
      dtype: in which the layer multiplies.
      wide: of the rows: float32 or wider.
      precision: as for `jax.lax.dot_general`.
    """

    structure: Any
    dense: Callable[[Any], Array]
    dtype: Any
    wide: Any
    precision: Any

    def kernel(self, leaves: Sequence[Array]) -> Float[Array, "in out"]:
        """Returns the kernel as the layer multiplies it."""
        return self.dense(jax.tree.unflatten(self.structure, leaves)).astype(self.dtype)


class _Given(NamedTuple):
    """Which of the two operands, and results, there are: of a derivative it may be one."""

    batch: bool
    rows: bool


def joined_product(
    x: Float[Array, "*batch in"], a: Float[Array, "in r"], leaves: Sequence[Array], dense: Dense
) -> tuple[Float[Array, "*batch out"], Float[Array, "r out"]]:
    """Returns `x W` in the layer's dtype and `A^T W` in the wide one; `W` is a constant.

    Args:
      x: the layer's input, in the layer's dtype.
      a: the first factor, which is rounded to that dtype.
      leaves: of the kernel; no derivative in them.
      dense: how the kernel is made of them.

    Example:
      >>> w = jnp.eye(3)
      >>> dense = Dense(jax.tree.structure(w), lambda w: w, w.dtype, w.dtype, None)
      >>> y, rows = joined_product(jnp.ones((2, 4, 3)), jnp.ones((3, 1)), [w], dense)
      >>> y.shape, rows.shape
      ((2, 4, 3), (1, 3))
    """
    y, rows = _forward.bind(x, a, *leaves, dense=dense, given=_Given(True, True))
    return y, rows


def multiply(
    *operands: Array, dense: Dense, given: _Given, join: bool, transpose: bool
) -> list[Array]:
    """Returns the results of one pass, as one product if `join`.

    Forward it takes `x` and `A` and returns `x W` and `A^T W`. Transposed it takes the cotangents
    of these, and returns those of `x` and `A`.
    """
    number = sum(given)
    own, leaves = operands[:number], operands[number:]
    if transpose:
        # Otherwise XLA keeps the dequantised kernel of the forward pass for this one.
        leaves = lax.optimization_barrier(leaves)
    kernel = dense.kernel(leaves)
    x, rows = own[0] if given.batch else None, own[-1] if given.rows else None
    if rows is not None and not transpose:
        rows = rows.astype(dense.dtype)
    contracted = 1 if transpose else 0
    product = functools.partial(_product, kernel=kernel, axis=contracted, precision=dense.precision)
    if join and x is not None and rows is not None:
        flat = x.reshape(-1, x.shape[-1])
        below = rows.astype(dense.dtype) if transpose else rows.T
        # In the layer's dtype, as the output is: float32 rows would need a float32 output, which in
        # bfloat16 layers is written and read as well (in a step 373 MB in place of 350).
        both = product(jnp.concatenate([flat, below]), dtype=None)
        y, below = both[: len(flat)], both[len(flat) :].astype(dense.wide)
        return [y.reshape(*x.shape[:-1], -1), below.T if transpose else below]
    results = [] if x is None else [product(x, dtype=None)]
    if rows is not None and join and transpose:
        results.append(product(rows.astype(dense.dtype), dtype=None).astype(dense.wide).T)
    elif rows is not None and transpose:
        results.append(product(rows, dtype=dense.wide).T)
    elif rows is not None:
        results.append(
            jnp.einsum(
                "iy,io->yo",
                rows,
                kernel,
                precision=dense.precision,
                preferred_element_type=dense.wide,
            )
        )
    return results


def _product(rows: Array, *, kernel: Array, axis: int, precision: Any, dtype: Any) -> Array:
    contracted = (((rows.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(rows, kernel, contracted, precision, preferred_element_type=dtype)


def _define(name: str, transpose: bool) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    one, two = (
        functools.partial(multiply, join=join, transpose=transpose) for join in (True, False)
    )

    def shapes(*operands: Any, **params: Any) -> list[Any]:
        found = jax.eval_shape(functools.partial(two, **params), *operands)
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in found]

    def lower_for_tpu(ctx: Any, *operands: Any, **params: Any) -> Any:
        single = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
        way = mlir.lower_fun(one if single else two, multiple_results=True)
        return way(ctx, *operands, **params)

    def batch(operands: Any, axes: Any, **params: Any) -> tuple[list[Array], list[int]]:
        results = jax.vmap(functools.partial(two, **params), in_axes=axes)(*operands)
        return results, [0] * len(results)

    primitive.def_impl(two)
    primitive.def_abstract_eval(shapes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(two, multiple_results=True))
    mlir.register_lowering(primitive, lower_for_tpu, platform="tpu")
    return primitive


def _connect(this: Primitive, other: Primitive) -> None:
    """Gives a primitive its derivatives: it is linear in its first operands together."""

    def only(values: Sequence[Any], given: _Given, **params: Any) -> list[Any]:
        """Binds the operands that are not zero; returns None for the results of the others."""
        number = sum(given)
        places = [name for name, is_given in zip(given._fields, given, strict=True) if is_given]
        moved = [n for n, v in zip(places, values, strict=False) if type(v) is not ad.Zero]
        if not moved:
            return [None] * number
        left = _Given(*(name in moved for name in given._fields))
        kept = [v for v in values[:number] if type(v) is not ad.Zero]
        found = iter(params["bind"](*kept, *values[number:], dense=params["dense"], given=left))
        return [next(found) if name in moved else None for name in places]

    def derivative(primals: Any, tangents: Any, *, dense: Dense, given: _Given) -> Any:
        number = sum(given)
        results = this.bind(*primals, dense=dense, given=given)
        values = [*tangents[:number], *primals[number:]]
        found = only(values, given, bind=this.bind, dense=dense)
        zeros = [ad.Zero(jax.typeof(x)) for x in results]
        return results, [z if t is None else t for t, z in zip(found, zeros, strict=True)]

    def transposed(cotangents: Any, *operands: Any, dense: Dense, given: _Given) -> list[Any]:
        leaves = operands[sum(given) :]
        values = [*cotangents, *leaves]
        found = only(values, given, bind=other.bind, dense=dense)
        cast = (
            None if g is None else g.astype(x.aval.dtype)
            for g, x in zip(found, operands, strict=False)
        )
        return [*cast, *[None] * len(leaves)]

    ad.primitive_jvps[this], ad.primitive_transposes[this] = derivative, transposed


_forward, _backward = (
    _define("dora_joined_product", transpose=False),
    _define("dora_joined_product_transpose", transpose=True),
)
_connect(_forward, _backward)
_connect(_backward, _forward)
