"""Parameters that qwix quantised are read by its attributes, with the same codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import dora_jax as dora


@flax.struct.dataclass
class QArray:
    """The attributes of qwix's (0.1.8): `(qvalue - zero_point) * scale`."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class WithAux:
    """qwix's record around a quantised parameter."""

    array: Any


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-7, 8, (8, 6))
    scales = rng.uniform(0.1, 0.2, (2, 6)).astype(np.float32)
    zero = rng.integers(-3, 4, (2, 6)).astype(np.int8)
    return codes, scales, zero


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "with a zero point"])
def test_a_layer_that_qwix_quantised_is_adapted_on_its_codes(zero_point):
    codes, scales, zero = drawn()
    array = QArray(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scales), zero if zero_point else None, jnp.int4
    )
    params = dora.from_qwix({"kernel": WithAux(array), "bias": jnp.ones(6)})
    assert params["kernel"].value.codes.dtype == jnp.int4
    module, x = linen.Dense(6), jax.random.normal(jax.random.key(0), (3, 8))
    model, adapters = dora.apply_dora(
        module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
    )
    shift = np.repeat(zero, 4, axis=0) if zero_point else 0
    kernel = (codes - shift) * np.repeat(scales.astype(np.float64), 4, axis=0)
    found = model.apply({"params": params, "dora": adapters}, x)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ kernel + 1, atol=1e-5)
    merged = dora.merge(model, params=params, adapters=adapters)
    np.testing.assert_allclose(merged["kernel"], kernel, atol=1e-6)


def test_codes_and_blocks_that_are_not_known_are_refused_by_name():
    codes, scales, _ = drawn()
    array = QArray(jnp.asarray(codes, jnp.int8), jnp.asarray(scales), None, "int3")
    with pytest.raises(dora.errors.LayoutError, match=r"^up\.kernel is quantised to int3"):
        dora.from_qwix({"up": {"kernel": array}})
    both = dataclasses.replace(array, qtype=jnp.int8, scale=jnp.ones((4, 2)))
    with pytest.raises(dora.errors.LayoutError, match=r"^up\.kernel has scales \(4, 2\)"):
        dora.from_qwix({"up": {"kernel": both}})
