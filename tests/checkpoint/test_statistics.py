"""Batch statistics come back with the modules that were trained in full, or are refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.checkpoint import read_adapters
from dora_jax.errors import AdapterError
from dora_jax.names import IDENTITY
from dora_jax.peft import PeftError, save_pretrained
from tests.support.models import linen_variables, random_adapters

CONFIG = dora.DoRAConfig(rank=2, target_modules=["up"], modules_to_save=["norm"])
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


class NNXModel(nnx.Module):
    """One norm is trained in full, the other one's statistics move alone."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.frozen_norm = nnx.BatchNorm(3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.frozen_norm(self.up(x)))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True, name="frozen_norm")(
            linen.Dense(3, name="up")(x)
        )
        return linen.BatchNorm(use_running_average=True, name="norm")(x)


def nnx_base():
    model = nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), nnx.state(model)))
    model.eval()
    return model


def moved(tree):
    """Returns statistics as after training."""
    return jax.tree.map(lambda x: x + jnp.arange(1.0, 1 + x.size), tree)


@pytest.fixture(scope="module")
def trained():
    model = dora.apply_dora(nnx_base(), CONFIG, rngs=nnx.Rngs(1))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    nnx.update(model, moved(nnx.state(model, nnx.BatchStat)))
    return model


def statistics(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def equal(one, other):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), one, other))


def test_statistics_of_an_nnx_model_are_loaded(trained, tmp_path):
    dora.save(tmp_path / "a", trained, CONFIG)
    with dora.Checkpoints(tmp_path / "run", CONFIG) as checkpoints:
        checkpoints.save(1, trained)
        checkpoints.wait()
        other = dora.apply_dora(nnx_base(), CONFIG, rngs=nnx.Rngs(1))
        checkpoints.restore(other)
    base = nnx_base()
    for model in (other, dora.load(tmp_path / "a", base), dora.load(tmp_path / "run/1", base)):
        assert equal(statistics(model), statistics(trained))
    assert equal(statistics(base), statistics(nnx_base()))
    part = dora.load(tmp_path / "a", base, only=["up"])
    assert equal(statistics(part), statistics(base))
    assert equal(read_adapters(tmp_path / "a").statistics, statistics(trained))


def test_adapters_without_their_statistics_are_refused(trained, tmp_path):
    dora.save(tmp_path / "a", CONFIG, dora.get_adapters(trained))
    with pytest.raises(AdapterError, match=r"^norm was trained in full, .* without its batch"):
        dora.load(tmp_path / "a", nnx_base(), allow_base_mismatch=True)
    dora.load(tmp_path / "a", nnx_base(), only=["up"], allow_base_mismatch=True)


def test_statistics_that_are_not_finite_are_not_saved(trained, tmp_path):
    broken = nnx.clone(trained)
    broken.norm.mean[...] = jnp.full(3, jnp.nan)
    with pytest.raises(AdapterError, match=r"^norm\.mean is not finite"):
        dora.save(tmp_path / "a", broken, CONFIG)


def test_statistics_of_a_linen_model_are_saved_or_refused(tmp_path):
    module = LinenModel()
    variables = linen_variables(module, X)
    params, collection = variables["params"], moved(variables["batch_stats"])
    call = dora.linen.ExampleCall((X,), variables={"batch_stats": collection})
    model, adapters = dora.apply_dora(
        module, CONFIG, params=params, rng=jax.random.key(1), inputs=call
    )
    with pytest.raises(AdapterError, match=r"^norm is trained in full, .*statistics=variables"):
        dora.save(tmp_path / "a", model, adapters)
    with pytest.raises(PeftError, match=r"^norm has running statistics"):
        save_pretrained(model, tmp_path / "peft", IDENTITY, adapters=adapters)
    with dora.Checkpoints(tmp_path / "run", model) as checkpoints:
        with pytest.raises(AdapterError, match=r"^norm is trained in full, .*into the state"):
            checkpoints.save(1, adapters)
        checkpoints.save(1, adapters, {"batch_stats": collection})
        checkpoints.wait()
        restored = checkpoints.restore(adapters, {"batch_stats": variables["batch_stats"]})
    assert equal(restored.state["batch_stats"], collection)
    with pytest.raises(AdapterError, match=r"^norm was trained in full"):
        dora.load(tmp_path / "run/1", module, params=params, inputs=call)
    dora.save(tmp_path / "a", model, adapters, statistics=collection)
    with pytest.warns(UserWarning, match=r"batch statistics of frozen_norm, norm: apply"):
        dora.load(tmp_path / "a", module, params=params, inputs=call)
    assert equal(read_adapters(tmp_path / "a").statistics, collection)
