"""Adapters of a quantised base load onto that base, and onto no other."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora


def test_adapters_of_a_quantised_base_load_onto_it_alone(tmp_path):
    plain = nnx.Linear(96, 8, rngs=nnx.Rngs(0))
    base = dora.quantize(plain, dora.Quantization("nf4", double=True))
    config = dora.DoRAConfig(rank=2)
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    model.lora_b.set_value(jax.random.normal(jax.random.key(2), model.lora_b.shape))
    dora.save(tmp_path / "adapter", model, config)
    x = np.ones((3, 96), np.float32)
    loaded = dora.load(
        tmp_path / "adapter", dora.quantize(plain, dora.Quantization("nf4", double=True))
    )
    np.testing.assert_array_equal(loaded(x), model(x))
    for other in (plain, dora.quantize(plain, "int8")):
        with pytest.raises(dora.errors.AdapterError, match="trained for another base"):
            dora.load(tmp_path / "adapter", other)
