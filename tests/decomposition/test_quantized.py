"""Quantised kernels on arrays: the formats against NumPy, and what they lose."""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dora_jax.decomposition import (
    KernelAxes,
    Quantization,
    dense,
    first_row,
    quantize_kernel,
)
from dora_jax.decomposition.quantized import NF4
from dora_jax.errors import ConfigError

DENSE = KernelAxes((), (0,), (1,))
# A kernel's shape, its axes, and the axis along which a block lies.
SHAPES = [
    ((130, 5), DENSE, 0),  # the last block is short
    ((2, 3, 70, 4), KernelAxes((0,), (1, 2), (3,)), 2),
    ((5, 64), KernelAxes((), (1,), (0,)), 1),
]


def quantized(shape, format, axes=DENSE, **settings):
    kernel = 0.02 * jax.random.normal(jax.random.key(0), shape)
    return np.asarray(kernel), quantize_kernel(kernel, Quantization(format, **settings), axes)


def by_numpy(kernel, format, axis, block):
    """Each block on its own: divided by its largest number, to the nearest code."""
    moved = np.moveaxis(kernel, axis, -1).astype(np.float32)
    result = np.empty_like(moved)
    for start in range(0, moved.shape[-1], block):
        part = moved[..., start : start + block]
        largest = np.abs(part).max(-1, keepdims=True)
        if format == "nf4":
            table = np.array(NF4, np.float32)
            nearest = np.abs((part / largest)[..., None] - table).argmin(-1)
            own = table[nearest] * largest
        elif format == "fp8":
            scale = largest / np.float32(448)
            own = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        else:
            scale = largest / np.float32({"int4": 7, "int8": 127}[format])
            own = np.round(part / scale) * scale
        result[..., start : start + block] = own
    return np.moveaxis(result, -1, axis)


def test_the_nf4_table_is_of_normal_quantiles():
    """Eight quantiles above 0 and seven below, and 0 itself, divided by the largest (QLoRA)."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    table = np.sort([*above, *below, 0.0]) / max(above)
    np.testing.assert_allclose(NF4, table, rtol=0, atol=2e-7)


@pytest.mark.rows(4)
@pytest.mark.parametrize("shape, axes, axis", SHAPES)
@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "fp8"])
def test_each_format_is_numpys(format, shape, axes, axis):
    kernel, found = quantized(shape, format, axes, block=64)
    expected = by_numpy(kernel, format, axis, 64)
    assert found.shape == shape and found.codes.shape == shape
    np.testing.assert_allclose(dense(found), expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    "format, double, rms, bits",
    [("nf4", True, 0.092, 4.13), ("nf4", False, 0.092, 4.5), ("int8", False, 0.0085, 8.04)],
)
def test_what_a_format_loses_and_holds(format, double, rms, bits):
    kernel, found = quantized((1024, 512), format, double=double)
    lost = np.linalg.norm(dense(found) - kernel) / np.linalg.norm(kernel)
    assert abs(lost - rms) <= 0.001
    assert found.bits <= bits


def test_a_zero_column_stays_zero_and_a_part_is_that_of_the_whole():
    kernel = 0.02 * jax.random.normal(jax.random.key(1), (2, 70, 6))
    kernel = kernel.at[1, :, 3].set(0)
    axes = KernelAxes((0,), (1,), (2,))
    found = quantize_kernel(kernel, Quantization("nf4", double=True), axes)
    whole = dense(found)
    assert not np.any(whole[1, :, 3]) and np.all(np.any(whole[0] != 0, 0))
    np.testing.assert_array_equal(dense(jax.tree.map(lambda x: x[1], found)), whole[1])
    np.testing.assert_array_equal(first_row(found, axes), whole[:, 0])


def test_a_dequantised_kernel_has_the_kernels_dtype_and_is_the_same_in_every_program():
    _, found = quantized((96, 7), "nf4", double=True)
    half = quantize_kernel(jnp.ones((4, 2), jnp.bfloat16), "int8", DENSE)
    assert half.dtype == dense(half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(dense)(found), dense(found))


@pytest.mark.parametrize("format, block", [("nf5", None), ("uint4", None), ("nf4", 0)])
def test_an_unknown_format_is_named(format, block):
    with pytest.raises(ConfigError, match="nf4, int4, int8, fp8" if block is None else "block"):
        Quantization(format, block)
