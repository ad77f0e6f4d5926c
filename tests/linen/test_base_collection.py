"""The record of the frozen kernels as a collection, so that it may be a program's argument."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import linen as nn

import dora_jax as dora
from tests.support import reference
from tests.support.models import inputs, linen_variables, random_adapters, same, structure
from tests.support.operations import LinenStack

WIDTH = 16


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(8, name="up")(x)))


# PiSSA keeps its first factors too; a stack of which some layers are adapted keeps a mask.
CASES = {
    "chain": (Chain(), {}),
    "PiSSA": (Chain(), {"init": "pissa"}),
    "stack": (LinenStack(), {}),
    "part of a stack": (LinenStack(), {"layers_to_transform": [0, 2]}),
}


def adapt(case):
    module, fields = CASES[case]
    x = inputs(5, WIDTH)
    params = linen_variables(module, x)["params"]
    config = dora.DoRAConfig(rank=2, **fields)
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    return model, params, random_adapters(adapters), x


@pytest.mark.rows(1)
@pytest.mark.parametrize("case", ["chain", "part of a stack"])
def test_the_collection_changes_no_bit(case):
    """Op by op: compiled, XLA computes with what it knows, and may round another way."""
    model, params, adapters, x = adapt(case)
    variables = {"params": params, "dora": adapters}
    y = model.apply({**variables, "dora_base": model.base_collection}, x)
    assert same(y, model.apply(variables, x))
    assert same(model.with_base(model.base_collection).base_collection, model.base_collection)


@pytest.mark.rows(1)
@pytest.mark.parametrize("case", CASES)
def test_compiled_with_the_collection_the_model_rounds_at_most(case):
    model, params, adapters, x = adapt(case)
    run = jax.jit(model.apply)
    variables = {"params": params, "dora": adapters}
    y = run({**variables, "dora_base": model.base_collection}, x)
    assert reference.relative_error(y, run(variables, x)) <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_program_uses(case):
    """Of another base, the kernels are found to be changed."""
    model, params, adapters, x = adapt(case)
    other = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else -leaf, model.base_collection)
    y = jax.jit(model.apply)({"params": params, "dora": adapters, "dora_base": other}, x)
    assert np.all(np.any(np.isnan(y), axis=-1))


def constants(variables, model, x) -> list[int]:
    """Returns the sizes of the arrays, other than filled ones, that a lowered call holds."""
    text = jax.jit(model.apply).lower(variables, x).as_text()
    found = re.findall(r'constant dense<["\[].*> : tensor<([\dx]*)x\w+>', text)
    return [int(np.prod([int(n) for n in shape.split("x")])) for shape in found]


@pytest.mark.parametrize("case", CASES)
def test_as_an_argument_it_leaves_no_array_in_the_program(case):
    model, params, adapters, x = adapt(case)
    variables = {"params": params, "dora": adapters}
    assert max(constants(variables, model, x)) >= 5
    assert constants({**variables, "dora_base": model.base_collection}, model, x) == []


@pytest.mark.rows(1)
@pytest.mark.parametrize("case", CASES)
def test_scales_and_merged_kernels_are_those_of_the_model(case):
    model, params, adapters, _ = adapt(case)

    @jax.jit
    def with_arguments(params, adapters, collection):
        given = model.with_base(collection)
        return (
            dora.precompute_scales(given, params, adapters),
            dora.merge(given, params, adapters),
        )

    found = with_arguments(params, adapters, model.base_collection)
    expected = (
        dora.precompute_scales(model, params, adapters),
        dora.merge(model, params, adapters),
    )
    assert structure(found) == structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert reference.relative_error(one, other) <= 2e-6


def test_a_layer_that_the_collection_lacks_is_named():
    model, params, adapters, x = adapt("chain")
    part = {"up": model.base_collection["up"]}
    with pytest.raises(
        dora.errors.AdapterError, match=r"no entry head in the collection dora_base"
    ):
        model.apply({"params": params, "dora": adapters, "dora_base": part}, x)
