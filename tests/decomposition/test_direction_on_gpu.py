"""Short columns in a program for a GPU: kernels of our own in the place of conditionals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dora_jax.decomposition import KernelAxes
from dora_jax.decomposition.direction import SMALL_SQUARE, relative_square
from dora_jax.decomposition.direction_on_gpu import (
    rows_on_gpu,
    square_and_rows_on_gpu,
    transpose_on_gpu,
)
from dora_jax.decomposition.product import Factors, KernelProduct
from dora_jax.ops import short_columns

SCALING = 0.5


def draw(stack=()):
    """Kernels of 6 x 5, and factors of rank 2 that leave 1e-3 of column 3."""
    random = np.random.default_rng(0)
    w, a, b = (random.standard_normal((*stack, *s)) for s in ((3, 2, 5), (3, 2, 2), (2, 5)))
    b[..., 3] = 0.0
    a[..., 0], b[..., 0, 3] = w[..., 3], -(1 - 1e-3) / SCALING
    arrays = tuple(np.float32(x) for x in (w, a, b))
    w, a, b = (x.astype(np.float64) for x in arrays)
    v = w + SCALING * np.einsum("...abr,...ro->...abo", a, b)
    norm = np.sqrt(np.sum(w**2, axis=(-3, -2)))
    return arrays, v, norm


@pytest.fixture
def interpreted(monkeypatch):
    for name in ("columns_anew", "transpose_anew"):
        anew = functools.partial(getattr(short_columns, name), interpret=True)
        monkeypatch.setattr(short_columns, name, anew)


@pytest.mark.parametrize("stack", [pytest.param((), marks=pytest.mark.full), (2,)])
def test_square_rows_and_transpose_come_from_the_direction(stack, interpreted):
    (kernel, a, b), v, norm = draw(stack)
    axes = KernelAxes(
        tuple(range(len(stack))), *(tuple(len(stack) + i for i in g) for g in ((0, 1), (2,)))
    )
    product = KernelProduct(axes, jnp.float32)
    base = np.float32(norm**2)
    is_short = np.sum(v**2, axis=(-3, -2)) / norm**2 < SMALL_SQUARE
    assert is_short.any(axis=-1).all()
    rows = np.einsum("...abr,...abo->...ro", a.astype(np.float64), v)
    wrong = -np.ones_like(base), -np.ones_like(rows, np.float32)
    square, found = square_and_rows_on_gpu(product, SCALING, kernel)(
        is_short, wrong, kernel, a, b, base
    )
    exact = np.sum(v**2, axis=(-3, -2)) / norm**2
    np.testing.assert_allclose(np.asarray(square)[is_short], exact[is_short], rtol=1e-3)
    np.testing.assert_allclose(found, rows, atol=1e-5)
    given = {"product": product, "scaling": SCALING}
    found = rows_on_gpu(a, kernel, **given)(is_short, wrong[1], a, kernel, a, b)
    np.testing.assert_allclose(found, rows, atol=1e-5)
    y = np.float32(np.random.default_rng(1).standard_normal(rows.shape))
    total = transpose_on_gpu(y, kernel, **given)(is_short, -np.ones_like(a), y, kernel, a, b)
    np.testing.assert_allclose(total, np.einsum("...abo,...ro->...abr", v, y), atol=1e-5)


@pytest.mark.parametrize(
    "axes", [KernelAxes((), (1,), (0,)), KernelAxes((1,), (0,), (2,)), KernelAxes((), (0, 2), (1,))]
)
def test_a_kernel_that_is_no_matrix_in_memory_keeps_its_conditional(axes):
    product = KernelProduct(axes, jnp.float32)
    assert square_and_rows_on_gpu(product, 1.0, jnp.ones(())) is None
    assert rows_on_gpu(None, None, product=product, scaling=1.0) is None
    assert transpose_on_gpu(None, None, product=product, scaling=1.0) is None


def test_a_program_for_one_gpu_waits_for_no_condition(monkeypatch):
    (kernel, a, b), _, norm = draw()
    product = KernelProduct(KernelAxes((), (0, 1), (2,)), jnp.float32)

    def loss(a, b):
        square = relative_square(kernel, Factors(a, b), jnp.float32(norm), SCALING, product)
        return jnp.sum(jnp.log(square))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(a, b)
    try:
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this release lowers for a GPU only where there is one: {error}")
    assert program.count("xla.gpu.triton") == 2
    assert "stablehlo.case" not in program and "stablehlo.if" not in program
