"""A function for `init`: what it is given, what becomes of what it returns, what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from tests.checkpoint.chains import (
    WIDTHS,
    assert_same,
    nnx_base,
    run_nnx,
    trained_linen,
    trained_nnx,
)
from tests.checkpoint.runs import run_module
from tests.decomposition.test_initializers import KERNELS, RANK, start
from tests.support.models import inputs, same


def first_vectors(path, kernel, rank, key):
    """PiSSA, written anew."""
    u, s, vt = np.linalg.svd(np.asarray(kernel), full_matrices=False)
    root = np.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def product(adapter, axes):
    letters, stack, inner, outer = axes.letters()
    a, b = (np.asarray(adapter[name], np.float64) for name in ("lora_a", "lora_b"))
    return np.einsum(f"{stack}{inner}y,{stack}y{outer}->{letters}", a, b)


@pytest.mark.rows(2)
@pytest.mark.parametrize("name", KERNELS)
def test_a_function_that_computes_pissa_starts_as_pissa_in_every_layout(name):
    own, kept, _ = start(first_vectors, name, alpha=RANK)
    named, _, _ = start("pissa", name, alpha=RANK)
    axes, _ = KERNELS[name]
    np.testing.assert_allclose(product(own, axes), product(named, axes), atol=1e-4)
    assert same(kept.init_a, own["lora_a"]) and same(kept.init_b, own["lora_b"])
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in named.items()}


def test_a_function_gets_the_path_the_rank_of_the_layer_and_a_key_of_its_own():
    seen = {}

    def init(path, kernel, rank, key):
        seen[path] = (kernel.shape, rank, tuple(jax.random.key_data(key).tolist()))
        return jnp.ones((kernel.shape[0], rank)), jnp.ones((rank, kernel.shape[1]))

    trained_linen(dora.DoRAConfig(rank=2, rank_pattern={"layer_1": 1}, init=init))
    shapes = {path: (shape, rank) for path, (shape, rank, _) in seen.items()}
    assert shapes == {("layer_0",): ((16, 16), 2), ("layer_1",): ((16, 16), 1)}
    assert len({key for *_, key in seen.values()}) == 2


def test_factors_of_other_shapes_are_refused_by_name():
    with pytest.raises(dora.errors.ConfigError, match=r"layer.*\(24, 3\).*\(24, 4\)"):
        start(lambda path, kernel, rank, key: first_vectors(path, kernel, rank - 1, key))


def test_json_says_that_a_function_made_the_start_and_is_not_enough_to_make_it_again():
    config = dora.DoRAConfig(rank=RANK, init=first_vectors)
    again = dora.DoRAConfig.from_json(config.to_json())
    assert again.init == "custom" and again.changes_product
    assert again != config and dataclasses.replace(again, init=first_vectors) == config
    with pytest.raises(dora.errors.ConfigError, match=r"custom.*give it again"):
        start("custom")


def test_adapters_whose_start_a_function_made_are_loaded_without_it(tmp_path):
    config, x = dora.DoRAConfig(rank=2, init=first_vectors), inputs(5, WIDTHS[0])
    model = trained_nnx(config)
    dora.save(tmp_path / "a", model, config)
    loaded = dora.load(tmp_path / "a", nnx_base())
    np.testing.assert_array_equal(run_nnx(loaded, x), run_nnx(model, x))
    with pytest.raises(dora.errors.AdapterError, match=r"only leaves .* a function"):
        dora.load(tmp_path / "a", nnx_base(), only=["layer_0"])
    some = dora.load(tmp_path / "a", model, only=["layer_0"])
    assert same(dora.get_adapters(some), dora.get_adapters(model))
    with pytest.raises(dora.errors.AdapterError, match="init='custom'"):
        dora.save(tmp_path / "b", config, dora.get_adapters(model))


@pytest.mark.full
def test_linen_adapters_whose_start_a_function_made_are_loaded_without_it(tmp_path):
    config, x = dora.DoRAConfig(rank=2, init=first_vectors), inputs(5, WIDTHS[0])
    module, params, model, adapters = trained_linen(config)
    dora.save(tmp_path / "a", model, adapters)
    loaded, tree = dora.load(tmp_path / "a", module, params=params, inputs=(x,))
    assert_same(tree, jax.tree.map(np.asarray, adapters))
    expected = model.apply({"params": params, "dora": adapters}, x)
    assert same(loaded.apply({"params": params, "dora": tree}, x), expected)


def test_an_abstract_model_is_adapted_without_calling_the_function():
    def init(*_):
        raise AssertionError("there is no kernel to see")

    base = nnx.eval_shape(lambda: nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, init=init)
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1), inputs=(jnp.ones((1, 5)),))
    assert (model.lora_a.shape, model.lora_b.shape) == ((5, 2), (2, 4))


@pytest.mark.full
def test_on_a_mesh_the_factors_of_a_function_lie_as_the_kernel_does():
    found = json.loads(run_module("tests.decomposition.own_starts_on_a_mesh", devices=4))
    for kind, (error, as_the_kernel) in found.items():
        assert error < 1e-5 and as_the_kernel, kind
