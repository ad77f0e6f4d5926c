"""Primitives defined from functions of JAX's own operations, lowered by platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

if TYPE_CHECKING:
    from jaxtyping import Array


def has_mesh_in_type(x: Array) -> bool:
    """Whether the type of an array says how it lies on a mesh: explicit sharding, `shard_map`.

    There JAX's own operations know the rules of the types; a primitive would need them again.
    """
    return any(kind is not AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types)


def _bilinear(
    name: str, function: Any, result_type: Any, to_first: Any, to_second: Any, batch: Any
) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(result_type)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.defbilinear(primitive, to_first, to_second)
    batching.primitive_batchers[primitive] = batch
    return primitive


def _define(
    primitive: Primitive, function: Callable[..., Any], abstract: Callable[..., Any]
) -> None:
    """Gives a primitive the derivatives and batching of a function of JAX's own operations."""

    def jvp(primals: Any, tangents: Any) -> Any:
        return jax.jvp(function, primals, tuple(map(ad.instantiate_zeros, tangents)))

    def batch(operands: Any, axes: Any) -> Any:
        out = jax.vmap(function, in_axes=axes)(*operands)
        return out, (0, 0) if primitive.multiple_results else 0

    primitive.def_impl(function)
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    lowering = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering)
