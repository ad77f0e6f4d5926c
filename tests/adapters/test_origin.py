"""Adapters of another alpha are refused by name, or converted so that they compute the same."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.adapters import add_weighted, interpolate, origin, rescale, stack_adapters
from dora_jax.checkpoint import read_adapters
from dora_jax.errors import AdapterError
from dora_jax.names import IDENTITY
from dora_jax.peft import read_adapters as read_peft
from dora_jax.peft import save_pretrained
from tests.support.models import (
    LinenChain,
    NNXChain,
    chain_params,
    inputs,
    random_adapters,
    with_values,
)
from tests.support.quick import quick_jit

WIDTHS = (4, 5, 3)
X = inputs(2, 4)
ONE, OTHER = (dora.DoRAConfig(rank=2, alpha=alpha) for alpha in (4.0, 32.0))
REFUSED = r"^layer_0: the adapters have scaling 16.0, where 2.0 is needed"


def nnx_base():
    base = nnx.eval_shape(lambda: NNXChain(WIDTHS, rngs=nnx.Rngs(0)))
    nnx.update(base, with_values(base, chain_params(WIDTHS)))
    return base


def trained(config):
    model = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(1))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    return model


def linen_run(config):
    return dora.apply_dora(
        LinenChain(WIDTHS), config, params=chain_params(WIDTHS), rng=jax.random.key(1), inputs=(X,)
    )


@quick_jit
def call(state):
    return nnx.merge(nnx.graphdef(trained(ONE)), state)(X)


def test_nnx_adapters_of_another_alpha_are_refused():
    one, other = trained(ONE), trained(OTHER)
    before = dora.get_adapters(one)
    for use in (
        lambda: dora.set_adapters(one, dora.get_adapters(other)),
        lambda: dora.set_adapters(
            one, dora.adapters.cast_adapters(dora.get_adapters(other), jnp.float32)
        ),
        lambda: dora.apply_mixed(
            one, stack_adapters([dora.get_adapters(other)] * 2), jnp.zeros(2, int), X
        ),
    ):
        with pytest.raises(AdapterError, match=REFUSED):
            use()
    for combine in (
        lambda *trees: stack_adapters(trees),
        lambda *trees: interpolate(trees, [0.5, 0.5]),
    ):
        with pytest.raises(AdapterError, match=r"layer_0: the adapters have scaling"):
            combine(dora.get_adapters(other), before)
    with pytest.raises(AdapterError, match=REFUSED):
        add_weighted([dora.get_adapters(other)], [1.0], ONE)
    dora.set_adapters(one, dora.disabled_adapters(other))  # zero in any scaling
    dora.set_adapters(one, before)


def test_linen_adapters_of_another_alpha_are_refused():
    params = chain_params(WIDTHS)
    (model, _), (_, other) = linen_run(ONE), linen_run(OTHER)
    for use in (
        lambda: model.apply({"params": params, "dora": other}, X),
        lambda: dora.merge(model, params, other),
        lambda: dora.precompute_scales(model, params, other),
        lambda: dora.apply_mixed(
            model, {"params": params, "dora": stack_adapters([other])}, jnp.zeros(2, int), X
        ),
    ):
        with pytest.raises(AdapterError, match=REFUSED):
            use()


def test_adapters_of_files_are_refused_by_a_model_of_another_alpha(tmp_path):
    one, other = trained(ONE), trained(OTHER)
    dora.save(tmp_path / "own", other, OTHER)
    save_pretrained(other, tmp_path / "peft", IDENTITY)
    for tree in (
        read_adapters(tmp_path / "own").adapters,
        read_peft(nnx_base(), tmp_path / "peft", IDENTITY)[0],
    ):
        with pytest.raises(AdapterError, match=REFUSED):
            dora.set_adapters(one, tree)
    with pytest.raises(AdapterError, match="layer_0: the model has scaling"):
        dora.load(tmp_path / "own", one)


def test_rescaled_adapters_compute_what_they_did():
    one, other = trained(ONE), trained(OTHER)
    expected = quick_jit(lambda: other(X))()
    dora.set_adapters(one, rescale(dora.get_adapters(other), OTHER, ONE))
    np.testing.assert_allclose(quick_jit(lambda: one(X))(), expected, rtol=1e-5, atol=1e-6)
    for config, problem in [
        (dora.DoRAConfig(rank=3), "rank 2, the model has 3"),
        (dora.DoRAConfig(rank=2, eps=1e-3), "eps"),
        (dora.DoRAConfig(rank=2, init="olora"), "only the change"),
    ]:
        with pytest.raises(AdapterError, match=problem):
            rescale(dora.get_adapters(other), OTHER, config)


def test_arrays_are_remembered_while_they_live():
    gc.collect()
    before = len(origin._origins)
    tree = dora.get_adapters(trained(OTHER))
    assert len(origin._origins) > before
    del tree
    gc.collect()
    assert len(origin._origins) == before
