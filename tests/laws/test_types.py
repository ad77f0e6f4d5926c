"""The signatures tell a type checker which arguments each front end takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
CALLS = """
import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora

config = dora.DoRAConfig(rank=2)
key, x = jax.random.key(0), jnp.ones((2, 4))
module, layer = linen.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
params = module.init(key, x)["params"]

model, adapters = dora.apply_dora(module, config, params=params, rng=key, inputs=(x,))
dora.apply_dora(module, config, params=params, inputs=(x,))  # error
dora.apply_dora(module, config, rngs=nnx.Rngs(1))  # error
adapted = dora.apply_dora(layer, config, rngs=nnx.Rngs(1))
dora.apply_dora(layer, config, rngz=nnx.Rngs(1))  # error
dora.apply_dora(layer, config)  # error
adapted.in_features
adapted.in_feature  # error

merged = dora.merge(model, params, adapters)
merged["kernel"]
dora.merge(params, adapters, model)  # error
dora.merge(model, params)  # error
dora.merge(adapted).out_features
dora.merge(adapted, params, adapters)  # error

dora.precompute_scales(adapted).kernel
dora.precompute_scales(model, params, adapters)
dora.precompute_scales(adapted, params, adapters)  # error
dora.check_base(model, params)
dora.check_base(model)  # error

dora.load("folder", layer, rngs=nnx.Rngs(1))
dora.load("folder", layer, rngz=1)  # error
"""


@pytest.mark.full
def test_a_type_checker_finds_what_is_wrong_and_no_more(tmp_path):
    mypy = pytest.importorskip("mypy.api")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    options = ["--config-file", str(PROJECT / "pyproject.toml"), "--no-error-summary"]
    printed, _, _ = mypy.run([*options, str(file)])
    found = {int(n) for n in re.findall(rf"^{re.escape(str(file))}:(\d+): error", printed, re.M)}
    lines = enumerate(CALLS.splitlines(), start=1)
    assert found == {n for n, line in lines if line.endswith("# error")}, printed
