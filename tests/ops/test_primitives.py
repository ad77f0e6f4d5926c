"""Primitives defined from a function: they follow JAX's rules except for those that are given."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from dora_jax.ops import apply_scale, down_projection, up_projection
from dora_jax.ops.primitives import define_primitive, transpose_in_first
from tests.laws.test_compiled import equations


def function(x, y, *, factor=1):
    return jnp.sin(factor * x * y), x + jnp.sum(y)


def rows(x, y):
    return x @ y


with_no_rules = define_primitive("test_pair", function, multiple_results=True)

with_rules = define_primitive(
    "test_rows",
    rows,
    bilinear=(transpose_in_first(rows), lambda g, x, y: x.T @ g),
    on_cpu=lambda x, y: jnp.einsum("bi,io->bo", x, y) + 0 * jnp.cos(x[:, :1]),
)

TRANSFORMS = {
    "value": lambda f: f,
    "vmap": jax.vmap,
    "vmap of one operand": lambda f: jax.vmap(f, (None, 1)),
    "forward mode": lambda f: lambda x, y: jax.jvp(f, (x, y), (y, x)),
    "reverse mode": lambda f: lambda x, y: jax.vjp(f, x, y)[1](f(y, x)),
    "second derivative": lambda f: jax.jacfwd(jax.jacrev(f)),
}


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def primitives_in(f, *args) -> set[str]:
    return {str(equation.primitive) for equation in equations(jax.make_jaxpr(f)(*args))}


@pytest.mark.rows(6)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["op by op", "compiled"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_without_rules_it_transforms_as_its_function_does(transform, run):
    found, expected = (
        run(transform(lambda x, y, f=f: tuple(f(x, y, factor=3))))(*draw((4, 4), (4, 4)))
        for f in (with_no_rules, function)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_its_results_have_the_shapes_and_dtypes_of_its_function(dtype):
    x, y = jax.ShapeDtypeStruct((3, 4), dtype), jax.ShapeDtypeStruct((4,), jnp.float32)
    found, expected = (jax.eval_shape(f, x, y) for f in (with_no_rules, function))
    assert tuple(found) == expected


def test_a_bilinear_one_has_derivatives_of_every_order_by_the_given_transposes():
    check_grads(with_rules, draw((5, 4), (4, 3)), order=3, modes=("fwd", "rev"))


def test_the_derived_transpose_is_that_of_jax():
    x, y, g = draw((5, 4), (4, 3), (5, 3))

    def last_product(f):
        program = jax.make_jaxpr(lambda y, g: jax.vjp(lambda x: f(x, y), x)[1](g))(y, g)
        last = list(equations(program))[-1]
        return str(last.primitive), last.params["dimension_numbers"]

    assert last_product(with_rules) == last_product(rows)
    assert last_product(rows)[0] == "dot_general"


@pytest.mark.parametrize("axes", [None, (0, None), (None, 2)], ids=["alone", "vmap", "of y"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_programs_for_a_cpu_use_the_function_for_a_cpu(platform, axes):
    x, y = draw((5, 4), (4, 3))
    run = with_rules
    if axes is not None:
        run = jax.vmap(with_rules, axes)
        x, y = (
            v if i is None else jnp.stack([v] * 2, i) for v, i in zip((x, y), axes, strict=True)
        )
    program = jax.jit(run).trace(x, y)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert ("cosine" in text) == (platform == "cpu")


def loss(x, a, b, d):
    return jnp.sum(apply_scale(up_projection(down_projection(x, a), b), d))


def test_plain_operations_run_where_types_say_how_arrays_are_sharded():
    """Under explicit sharding and `shard_map`: a primitive would have no sharding rule."""
    args = draw((4, 5), (5, 2), (2, 3), (3,))
    gradient = jax.value_and_grad(loss, (0, 1, 2, 3))
    expected = jax.jit(gradient)(*args)
    ours = {name for name in primitives_in(gradient, *args) if name.startswith("dora_")}
    assert len(ours) == 4

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    specs = (PartitionSpec("data"), *[PartitionSpec()] * 3)
    placed = [
        jax.device_put(arg, NamedSharding(mesh, spec))
        for arg, spec in zip(args, specs, strict=True)
    ]
    manual = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "data"),
        mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    for found, arrays in ((gradient, placed), (jax.value_and_grad(manual, (0, 1, 2, 3)), args)):
        assert not ours & primitives_in(found, *arrays)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            jax.jit(found)(*arrays),
            expected,
        )
