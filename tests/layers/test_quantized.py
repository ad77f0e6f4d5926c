"""A quantised layer computes what one with the dequantised kernel does, adapted or not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import dora_jax as dora
from dora_jax.decomposition import QuantizedKernel, dense
from dora_jax.layers.quantized_box import QuantizedBox
from tests.support.layers.errors import config
from tests.support.layers.laws import close, numbers
from tests.support.layers.models import model
from tests.support.layers.rows import Row
from tests.support.layers.table import SINGLE
from tests.support.models import same
from tests.support.quick import quick_jit

FORMATS = [
    dora.Quantization("nf4", block=2, double=True),
    dora.Quantization("int8"),
    dora.Quantization("int4", block=2),
    dora.Quantization("fp8"),
]
# Every layer of one kernel, in the formats in turn, in a stack where that can be.
CASES = [
    (row, FORMATS[i // 2 % 4], "scan" if i // 2 % 4 == 1 else "plain")
    for i, row in enumerate(SINGLE)
]
DEFAULT = ("Dense / Linear (linen)", "Embed (nnx)")


def is_quantized(x):
    return isinstance(x, QuantizedBox | QuantizedKernel)


def dequantised(params: Any) -> Any:
    def one(x: Any) -> Any:
        return dense(x.value if isinstance(x, QuantizedBox) else x) if is_quantized(x) else x

    return jax.tree.map(one, params, is_leaf=is_quantized)


def parts(row: Row, quantization: Any, transforms: Sequence[str]) -> Any:
    """Returns a row's model, quantised parameters, the dequantised ones, adapters and inputs."""
    params, adapters, xs = numbers(row, jnp.float32, transforms)
    layers = model(row, jnp.float32, jnp.float32, transforms)
    quantized = layers.quantize(quantization, params, xs)
    assert any(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized)))
    return layers, quantized, dequantised(quantized), adapters, xs


def loss(adapted, xs, adapters):
    return sum(jnp.mean(jnp.sin(y)) for y in jax.tree.leaves(adapted.apply(adapters, xs)))


@pytest.mark.parametrize(
    ("row", "quantization", "transform"),
    [
        pytest.param(*case, marks=() if str(case[0]) in DEFAULT else pytest.mark.full)
        for case in CASES
    ],
    ids=str,
)
def test_a_quantised_layer_is_the_dequantised_one(row, quantization, transform):
    layers, quantized, whole, adapters, xs = parts(row, quantization, (transform,))
    ours, plain = (layers.adapt(config(row), params, xs) for params in (quantized, whole))
    start = jax.jit(ours.apply)(ours.adapters, xs)
    base = jax.jit(functools.partial(layers.base, quantized))(xs)
    # XLA compiles small products in two scans differently, of unquantised layers too.
    assert same(start, base) if transform == "plain" else close(start, base, 1e-6)
    found, expected = (
        quick_jit(jax.value_and_grad(functools.partial(loss, adapted, xs)))(adapters)
        for adapted in (ours, plain)
    )
    assert close(found, expected, 1e-6)
    assert close(ours.merge(adapters), plain.merge(adapters), 1e-6)
