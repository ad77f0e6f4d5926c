"""Every layer type, in both front ends, computes DoRA by its definition in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dora_jax.decomposition import KernelAxes
from tests.support.layers.errors import DTYPES, config, errors
from tests.support.layers.laws import PLAIN, assert_within, close, numbers
from tests.support.layers.models import TRANSFORMS, model
from tests.support.layers.rows import einsum
from tests.support.layers.table import COMPOSED, ONE_ROW, SINGLE, VARIANTS
from tests.support.models import random_adapters, same
from tests.support.properties import for_all
from tests.support.quick import quick_jit


# The detached gradient in a scan or in bfloat16, and the other transforms: `make test-full`. Layers
# come in pairs, Linen's and NNX's: one of a pair is float32, the other bfloat16 and not in a scan.
@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, "float32" if i % 4 in (0, 3) else "bfloat16") for i, row in enumerate(SINGLE)],
    ids=str,
)
def test_every_layer_agrees_with_its_definition_plainly_or_in_a_scan(row, dtype):
    transforms = ("plain", "scan") if dtype == "float32" else PLAIN
    detached = PLAIN if dtype == "float32" else ()
    assert_within(errors(row, DTYPES[dtype], transforms, detached), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", SINGLE, ids=str)
def test_every_layer_agrees_with_its_definition_under_every_transform(row, dtype):
    assert_within(errors(row, DTYPES[dtype], TRANSFORMS), dtype)


@pytest.mark.rows(1)
@pytest.mark.parametrize("row", COMPOSED, ids=str)
def test_layers_made_of_layers_agree_with_their_definition(row):
    assert_within(errors(row, jnp.float32, PLAIN), "float32")


@pytest.mark.full
@pytest.mark.parametrize("row", VARIANTS, ids=str)
def test_every_form_of_a_layer_agrees_with_its_definition(row):
    assert_within(errors(row, jnp.float32, PLAIN), "float32")


@pytest.mark.parametrize("row", ONE_ROW, ids=str)
def test_a_table_of_one_row_agrees_with_its_definition(row):
    found = errors(row, jnp.float32, PLAIN)
    assert_within({t: error._replace(exact_gradient=0.0) for t, error in found.items()}, "float32")


@st.composite
def einsum_rows(draw):
    """Draws an Einsum layer: its equation with any order of axes, sizes, rank and front end."""
    count = {"batch": (0, 2), "stack": (0, 1), "inputs": (1, 2), "outputs": (1, 2)}
    letters = iter("abcdefg")
    groups = {k: [next(letters) for _ in range(draw(st.integers(*n)))] for k, n in count.items()}
    batch, stack, inputs, outputs = groups.values()
    size = {c: draw(st.integers(2, 4)) for group in groups.values() for c in group}
    x, w, y = (
        "".join(draw(st.permutations(term)))
        for term in (batch + stack + inputs, stack + inputs + outputs, batch + stack + outputs)
    )
    kernel_axes = KernelAxes(
        *(tuple(w.index(c) for c in group) for group in (stack, inputs, outputs))
    )
    dots = "..." if draw(st.booleans()) else ""
    bias = (1,) * bool(dots) + tuple(size[c] if c in w else 1 for c in y)
    rows = einsum(
        f"{dots}{x},{w}->{dots}{y}",
        (2,) * bool(dots) + tuple(size[c] for c in x),
        tuple(size[c] for c in w),
        kernel_axes,
        draw(st.sampled_from([bias, None])),
    )
    rank = draw(st.integers(1, min(np.prod([size[c] for c in g]) for g in (inputs, outputs))))
    return draw(st.sampled_from(rows)), int(rank)


@for_all(
    einsum_rows(),
    st.floats(0.1, 16),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.booleans(),
    few=2,
    many=15,
)
def test_any_contraction_keeps_its_laws(row_and_rank, alpha, dtype, detached):
    row, rank = row_and_rank
    params, _, xs = numbers(row, dtype)
    chosen = config(row, rank=rank, alpha=alpha, norm_gradient="detached" if detached else "exact")
    layers = model(row, dtype, dtype, PLAIN)
    adapted = layers.adapt(chosen, params, xs)
    trained = random_adapters(adapted.adapters)
    apply, base, merge = (quick_jit(f) for f in (adapted.apply, layers.base, adapted.merge))
    before = base(params, xs)
    start = apply(adapted.adapters, xs)
    if (
        "bias" in row.params
    ):  # compiled, a product of a few numbers and its bias may be rounded once
        assert close(start, before, 1e-6 if dtype == jnp.float32 else 1e-2)
    else:
        assert same(start, before)
    assert same(merge(adapted.adapters), params)
    bound = 1e-5 if dtype == jnp.float32 else 4e-2
    assert close(apply(trained, xs), base(merge(trained), xs), bound)
    gradient = quick_jit(
        jax.grad(lambda a: jnp.sum(adapted.apply(a, xs)["plain"].astype(jnp.float32) ** 2))
    )(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0)
