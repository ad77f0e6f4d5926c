"""What XLA makes of a training step: nothing in it is as large as a kernel, but the kernel.

`n^2 = ||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T A^T A B)` needs neither `W0 + s A B` nor its
gradient. The shapes below are unique, so that an array of a kernel's shape can be nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

import dora_jax as dora
from tests.support.models import FRONT_ENDS, adapted_chain, inputs, linen_variables
from tests.support.quick import compiled_anew
from tests.support.selection import table

# Above 2^20 weights: the exact ways form a smaller kernel whole.
WIDTHS = (1024, 1184, 1056)
KERNELS = {(1024, 1184), (1184, 1056)}
# Of each layer in a scan.
WIDTH = 1056
BATCH = 7

# `%name = f32[96,160]{1,0} dot(...)`, also in a tuple: every result of an instruction.
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<result>\(.*?\)|\S+) (?P<operation>[\w-]+)\("
)
SHAPE = re.compile(r"\w+\[(?P<shape>[\d,]*)\]")


def operations_yielding(shapes, step, arguments) -> set[str]:
    """Returns the operations that XLA makes with a result of one of the shapes, or a transpose."""
    wanted = {tuple(sorted(shape)) for shape in shapes}
    found = set()
    for line in compiled(step, arguments).as_text().splitlines():
        if match := INSTRUCTION.match(line):
            results = [
                tuple(int(size) for size in shape.split(",") if size)
                for shape in SHAPE.findall(match["result"])
            ]
            if any(tuple(sorted(result)) in wanted for result in results):
                found.add(match["operation"])
    return found


def equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def primitives_yielding(shapes, jaxpr: ClosedJaxpr) -> set[str]:
    wanted = {tuple(sorted(shape)) for shape in shapes}
    return {
        str(equation.primitive)
        for equation in equations(jaxpr)
        for result in equation.outvars
        if tuple(sorted(result.aval.shape)) in wanted
    }


def compiled(step, arguments):
    with compiled_anew():
        return jax.jit(step).lower(*arguments).compile()


def training_step(apply):
    """Returns a step of loss, gradient and optimiser, and the optimiser's first state."""
    tx = dora.dora_optimizer(1e-3)

    def step(params, adapters, state, x):
        def loss(adapters):
            return jnp.mean(jnp.square(apply(params, adapters, x).astype(jnp.float32)))

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return step, tx.init


def chain_step(front_end, dtype, norm_gradient):
    config = dora.DoRAConfig(rank=4, norm_gradient=norm_gradient)
    chain = adapted_chain(front_end, config, WIDTHS, param_dtype=dtype)
    step, init = training_step(chain.apply)
    arguments = (
        chain.params,
        chain.adapters,
        init(chain.adapters),
        inputs(BATCH, WIDTHS[0], dtype),
    )
    return step, arguments


def materialised_step():
    """A step that forms `W0 + s A B`, as a DoRA written without care does."""
    chain = adapted_chain("linen", dora.DoRAConfig(rank=4), WIDTHS)

    def apply(params, adapters, x):
        for name, layer in params.items():
            adapter = adapters[name]
            direction = layer["kernel"] + 4.0 * adapter["lora_a"] @ adapter["lora_b"]
            norm = jnp.linalg.norm(direction, axis=0)
            x = jnp.tanh(x @ direction * (adapter["magnitude"] / norm) + layer["bias"])
        return x

    step, init = training_step(apply)
    return step, (chain.params, chain.adapters, init(chain.adapters), inputs(BATCH, WIDTHS[0]))


@pytest.mark.rows(1)
@pytest.mark.parametrize(
    ("front_end", "norm_gradient"),
    table(
        FRONT_ENDS,
        ["exact", "detached"],
        default=lambda *cell: cell in (("linen", "exact"), ("nnx", "detached")),
    ),
)
def test_nothing_in_the_compiled_step_is_as_large_as_a_kernel(front_end, norm_gradient):
    step, arguments = chain_step(front_end, jnp.float32, norm_gradient)
    # The loops over columns of V, which run where a norm is short, carry the kernel itself.
    plumbing = {"parameter", "tuple", "get-tuple-element", "while"}
    assert operations_yielding(KERNELS, step, arguments) <= plumbing


@pytest.mark.rows(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_nothing_in_the_traced_step_is_as_large_as_a_kernel(front_end, dtype):
    """For bfloat16 too, of which XLA on a CPU makes a copy in float32, with adapters or without."""
    step, arguments = chain_step(front_end, dtype, "exact")
    assert primitives_yielding(KERNELS, jax.make_jaxpr(step)(*arguments)) == set()


def test_a_step_that_materialises_is_found_out():
    step, arguments = materialised_step()
    assert {"dot", "add"} <= operations_yielding(KERNELS, step, arguments)
    found = primitives_yielding(KERNELS, jax.make_jaxpr(step)(*arguments))
    assert {"dot_general", "add"} <= found


class Scanned(nn.Module):
    """Three layers in a rematerialised scan."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(WIDTH, name="up")(x)), None

        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="blocks")(x, None)[0]


def test_a_scan_keeps_no_gradient_of_its_stacked_kernels():
    module, x = Scanned(), inputs(BATCH, WIDTH)
    params = linen_variables(module, x)["params"]
    model, adapters = dora.apply_dora(
        module, dora.DoRAConfig(rank=4), params=params, rng=jax.random.key(1), inputs=(x,)
    )
    step, init = training_step(lambda p, a, x: model.apply({"params": p, "dora": a}, x))
    arguments = (params, adapters, init(adapters), x)
    jaxpr = jax.make_jaxpr(step)(*arguments)
    assert primitives_yielding({(3, WIDTH, WIDTH), (WIDTH, WIDTH)}, jaxpr) == set()
    # The loop carries the stack and slices it; nothing computes an array of its size.
    plumbing = {"parameter", "get-tuple-element", "tuple", "while", "copy"}
    assert operations_yielding({(3, WIDTH, WIDTH)}, step, arguments) <= plumbing
    loops = {"tuple", "get-tuple-element", "while"}  # over columns of V, where a norm is short
    slicing = {"parameter", "dynamic-slice", "bitcast", "reshape", "fusion"} | loops
    assert operations_yielding({(WIDTH, WIDTH), (1, WIDTH, WIDTH)}, step, arguments) <= slicing


@pytest.mark.full
def test_the_temporaries_of_a_step_are_smaller_than_one_kernel():
    kernel_bytes = 4 * WIDTHS[0] * WIDTHS[1]
    ours = compiled(*chain_step("linen", jnp.float32, "exact")).memory_analysis()
    materialised = compiled(*materialised_step()).memory_analysis()
    assert ours.temp_size_in_bytes < kernel_bytes < materialised.temp_size_in_bytes
