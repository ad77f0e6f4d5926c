"""Defines JAX primitives from plain JAX functions.

A primitive may be lowered in its own way on each platform, and may have its own transpose, while
forward mode, reverse mode and `vmap` all work. `jax.custom_vjp` offers less: it has no forward
mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

if TYPE_CHECKING:
    from jaxtyping import Array

Rule = Callable[..., Any]


def define_primitive(
    name: str,
    reference: Callable[..., Any],
    *,
    multiple_results: bool = False,
    bilinear: tuple[Rule, Rule] | None = None,
    transpose: Rule | None = None,
    batch: Rule | None = None,
    on_cpu: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a function that computes `reference` as one primitive.

    JAX derives from `reference` the shapes of the results, and each rule that is not given.

    Under `jax.shard_map` or explicit sharding the returned function calls `reference` itself: our
    primitives have no sharding rule.

    Args:
      name: of the primitive.
      reference: a function of arrays, made of JAX operations. Its keyword arguments are hashable.
      multiple_results: whether `reference` returns a tuple of arrays.
      bilinear: for a `reference` that is linear in each of its two operands: the transposes in the
        first and in the second. Each is called with the cotangent and both operands.
      transpose: for a `reference` that is linear in some operands together: the transpose rule, as
        in `jax.interpreters.ad.primitive_transposes`.
      batch: the rule for `vmap`, as in `jax.interpreters.batching.primitive_batchers`.
      on_cpu: computes the same as `reference`, and replaces it in programs compiled for a CPU, also
        under `vmap`.

    Example:
      >>> double = define_primitive("double", lambda x: 2 * x)
      >>> jax.grad(double)(3.0)
      Array(2., dtype=float32, weak_type=True)
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(reference)
    primitive.def_abstract_eval(_shape_rule(reference))
    if bilinear:
        ad.defbilinear(primitive, *bilinear)
    else:
        ad.primitive_jvps[primitive] = _derivative_rule(reference)
    if transpose:
        ad.primitive_transposes[primitive] = transpose
    derived = _batching_rule(name, reference, on_cpu, multiple_results)
    batching.primitive_batchers[primitive] = batch or derived
    for function, platform in ((reference, None), (on_cpu, "cpu")):
        if function:
            lowering = mlir.lower_fun(function, multiple_results=multiple_results)
            mlir.register_lowering(primitive, lowering, platform=platform)

    def call(*operands: Array, **params: Any) -> Any:
        run = reference if has_mesh_in_type(*operands) else primitive.bind
        return run(*operands, **params)

    return call


def transpose_in_first(reference: Callable[..., Array]) -> Rule:
    """Returns the transpose that JAX derives for the first operand of a bilinear function."""

    def rule(g: Array, x: Any, other: Array, **params: Any) -> Array:
        first = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        (result,) = jax.linear_transpose(lambda x: reference(x, other, **params), first)(g)
        return result

    return rule


def has_mesh_in_type(*arrays: Array) -> bool:
    """Whether the type of an array says how it is sharded: explicit sharding or `shard_map`."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return any(kind is not AxisType.Auto for mesh in meshes for kind in mesh.axis_types)


def _shape_rule(reference: Callable[..., Any]) -> Rule:
    @functools.cache  # JAX keeps the shapes that it found by the identity of the jitted function
    def jitted(**params: Any) -> Any:
        return jax.jit(functools.partial(reference, **params))

    def rule(*operands: Any, **params: Any) -> Any:
        shapes = jitted(**params).eval_shape(*operands)
        return jax.tree.map(lambda s: jax.core.ShapedArray(s.shape, s.dtype), shapes)

    return rule


def _derivative_rule(reference: Callable[..., Any]) -> Rule:
    def rule(primals: Any, tangents: Any, **params: Any) -> Any:
        function = functools.partial(reference, **params)
        return jax.jvp(function, primals, tuple(map(ad.instantiate_zeros, tangents)))

    return rule


def _batching_rule(
    name: str,
    reference: Callable[..., Any],
    on_cpu: Callable[..., Any] | None,
    multiple_results: bool,
) -> Rule:
    """Returns the rule of JAX's own operations; what is computed on a CPU stays a function apart.

    Otherwise `vmap` would put the order of the reference in the place of that for a CPU.
    """

    @functools.cache  # one primitive for each choice of axes
    def over(axes: tuple[int | None, ...]) -> Callable[..., Any]:
        def batched(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*operands: Array, **params: Any) -> Any:
                return jax.vmap(functools.partial(function, **params), axes)(*operands)

            return run

        if on_cpu is None:
            return batched(reference)
        return define_primitive(
            name, batched(reference), multiple_results=multiple_results, on_cpu=batched(on_cpu)
        )

    def rule(operands: Any, axes: Any, **params: Any) -> Any:
        out = over(tuple(axes))(*operands, **params)
        return out, (0,) * len(out) if multiple_results else 0

    return rule
