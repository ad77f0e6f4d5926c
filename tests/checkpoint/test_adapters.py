"""Adapters saved and loaded: bit for bit, into their own base, with their own settings."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.checkpoint import load, read_adapters, save
from dora_jax.errors import CheckpointError
from tests.checkpoint.chains import (
    CONFIGS,
    WIDTHS,
    assert_same,
    nnx_base,
    on_host,
    run_nnx,
    trained_linen,
    trained_nnx,
)
from tests.support.models import chain_params, inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_nnx_adapters_come_back_bit_for_bit(name, tmp_path):
    """All variables are equal, the records of the base among them, and so the outputs are."""
    config, base = CONFIGS[name], nnx_base()
    model = trained_nnx(config)
    save(tmp_path / "a", model, config)
    with warnings.catch_warnings(action="error"):
        graphdef, state = nnx.split(load(tmp_path / "a", base))
    expected_graphdef, expected = nnx.split(model)
    assert graphdef == expected_graphdef
    assert_same(nnx.to_pure_dict(state), nnx.to_pure_dict(expected))
    assert not dora.model.is_adapted(base)


def test_adapters_load_into_a_model_that_has_others(folder):
    config, x = CONFIGS["dora"], inputs(5, WIDTHS[0])
    adapted = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(9))
    before = on_host(dora.get_adapters(adapted))
    loaded = load(folder, adapted)
    np.testing.assert_array_equal(run_nnx(loaded, x), run_nnx(trained_nnx(config), x))
    assert_same(on_host(dora.get_adapters(adapted)), before)  # the given model is not changed


@pytest.mark.parametrize("name", CONFIGS)
def test_linen_adapters_come_back_bit_for_bit(name, tmp_path):
    config, x = CONFIGS[name], inputs(5, WIDTHS[0])
    module, params, model, adapters = trained_linen(config)
    save(tmp_path / "a", model, adapters)
    for loaded, tree in (
        load(tmp_path / "a", module, params=params, inputs=(x,)),
        load(tmp_path / "a", model),
    ):
        assert_same(tree, adapters)
        assert loaded.config == config
        assert_same(loaded.base_collection, model.base_collection)


def test_one_front_end_loads_what_the_other_saved(tmp_path):
    config, x = CONFIGS["dora"], inputs(5, WIDTHS[0])
    module, params, model, adapters = trained_linen(config)
    save(tmp_path / "linen", model, adapters)
    loaded = load(tmp_path / "linen", nnx_base())
    expected = jax.jit(model.apply)({"params": params, "dora": adapters}, x)
    np.testing.assert_allclose(run_nnx(loaded, x), expected, rtol=1e-6, atol=1e-6)
    save(tmp_path / "nnx", loaded, config)
    assert_same(load(tmp_path / "nnx", module, params=params, inputs=(x,))[1], adapters)


def test_factors_that_do_not_start_at_zero_are_those_of_the_saved_model(tmp_path):
    """Another machine's singular vectors may have other signs."""
    config, x = CONFIGS["pissa"], inputs(5, WIDTHS[0])
    model = trained_nnx(config)
    model.layer_0.base_init_a[...] = -np.asarray(model.layer_0.base_init_a[...])
    save(tmp_path / "a", model, config)
    loaded = load(tmp_path / "a", nnx_base())
    np.testing.assert_array_equal(run_nnx(loaded, x), run_nnx(model, x))
    assert not np.array_equal(run_nnx(trained_nnx(config), x), run_nnx(model, x))


def test_norms_are_those_of_the_saved_model(tmp_path):
    """Another device may sum them in another order; the adapted model is to be the same one."""
    model = trained_nnx(CONFIGS["dora"])
    norm = np.nextafter(np.asarray(model.layer_0.base_norm[...]), np.float32(np.inf))
    model.layer_0.base_norm[...] = norm
    save(tmp_path / "a", model, CONFIGS["dora"])
    np.testing.assert_array_equal(load(tmp_path / "a", nnx_base()).layer_0.base_norm[...], norm)


def test_factors_keep_their_own_start_on_another_base(tmp_path):
    config = CONFIGS["pissa"]
    model = trained_nnx(config)
    save(tmp_path / "a", model, config)
    loaded = load(tmp_path / "a", nnx_base(seed=1), allow_base_mismatch=True)
    for name in ("base_init_a", "base_init_b"):
        own = getattr(model.layer_0, name)[...]
        np.testing.assert_array_equal(getattr(loaded.layer_0, name)[...], own)


def test_a_folder_is_read_without_a_model(folder):
    saved, model = read_adapters(folder), trained_nnx(CONFIGS["dora"])
    assert saved.config == CONFIGS["dora"]
    assert_same(saved.adapters, on_host(dora.get_adapters(model)))
    kernel = np.asarray(chain_params(WIDTHS)["layer_0"]["kernel"])
    record = saved.base["layer_0",]
    np.testing.assert_allclose(record.norm, np.linalg.norm(kernel, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(record.first_row, kernel[0])
    assert saved.axes["layer_0",] == dora.decomposition.KernelAxes((), (0,), (1,))


def test_only_some_layers_are_loaded(folder):
    fresh = dora.apply_dora(nnx_base(), CONFIGS["dora"], rngs=nnx.Rngs(0))
    loaded = load(folder, nnx_base(), only=["layer_1"])
    trained = read_adapters(folder).adapters
    assert_same(dora.get_adapters(loaded)["layer_0"], dora.get_adapters(fresh)["layer_0"])
    assert_same(on_host(dora.get_adapters(loaded)["layer_1"]), trained["layer_1"])
    with pytest.raises(dora.errors.ConfigError, match=r"layr_1.*layer_1"):
        load(folder, nnx_base(), only=["layr_1"])
    module, params, model, _ = trained_linen(CONFIGS["dora"])
    _, tree = load(folder, module, params=params, inputs=(inputs(1, WIDTHS[0]),), only=["layer_1"])
    assert_same(on_host(tree["layer_1"]), trained["layer_1"])
    assert not np.asarray(tree["layer_0"]["lora_b"]).any()
    with pytest.raises(TypeError, match="plain module"):
        load(folder, model, only=["layer_1"])


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(seed=1), "the first weight of 16 of 16"),
        (dict(dtype=jnp.bfloat16), "its kernel is float32, the model's bfloat16"),
    ],
)
def test_another_base_is_refused_unless_it_is_meant(folder, options, problem):
    base = nnx_base(**options)
    with pytest.raises(dora.errors.AdapterError, match=f"layer_0: .*{problem}"):
        load(folder, base)
    loaded = load(folder, base, allow_base_mismatch=True)
    assert_same(on_host(dora.get_adapters(loaded)), read_adapters(folder).adapters)
    assert np.isfinite(np.asarray(run_nnx(loaded, inputs(5, WIDTHS[0])), np.float32)).all()


def test_a_base_changed_outside_its_first_row_is_another_one(folder):
    base = nnx_base()
    kernel = np.array(base.layer_1.kernel[...])
    kernel[7, 3] += 0.02
    base.layer_1.kernel[...] = kernel
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1: .*norms of 1 of 16"):
        load(folder, base)


def test_one_flipped_bit_in_the_first_row_is_another_base(folder):
    base = nnx_base()
    kernel = np.array(base.layer_0.kernel[...])
    kernel[0, 5] = np.nextafter(kernel[0, 5], np.float32(np.inf))
    base.layer_0.kernel[...] = kernel
    with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*first weight of 1 of 16"):
        load(folder, base)


def test_a_model_adapted_with_other_settings_is_refused(folder):
    for other in (dict(alpha=32.0), dict(rank=2), dict(normalize=False), dict(use_rslora=True)):
        config = dataclasses.replace(CONFIGS["dora"], **other)
        # Abstract arrays are enough to be refused.
        model = nnx.eval_shape(
            lambda config=config: dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(0))
        )
        with pytest.raises(dora.errors.AdapterError, match="layer_0"):
            load(folder, model)
        with pytest.raises(dora.errors.AdapterError, match="layer_0"):
            save(folder.parent / "other", trained_nnx(CONFIGS["dora"]), config)


def test_factors_that_start_in_another_way_are_refused_on_any_base(tmp_path):
    """Only their change counts. A model that counts from zero would change too much."""
    config = CONFIGS["pissa"]
    save(tmp_path / "a", trained_nnx(config), config)
    model = dora.apply_dora(nnx_base(), CONFIGS["dora"], rngs=nnx.Rngs(0))
    for allow_base_mismatch in (False, True):
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*init_a"):
            load(tmp_path / "a", model, allow_base_mismatch=allow_base_mismatch)


def test_a_norm_trained_in_full_is_saved_with_its_scale(tmp_path):
    class Block(nnx.Module):
        def __init__(self):
            ones = nnx.initializers.ones  # drawing a kernel would take a while to compile
            self.linear = nnx.Linear(16, 16, kernel_init=ones, rngs=nnx.Rngs(0))
            self.norm = nnx.RMSNorm(16, rngs=nnx.Rngs(0))

    config = dora.DoRAConfig(rank=3, target_modules=["linear"], modules_to_save=["norm"])
    model = dora.apply_dora(Block(), config, rngs=nnx.Rngs(1))
    model.norm.scale[...] = np.full(16, 3, np.float32)
    save(tmp_path / "a", model, config)
    np.testing.assert_array_equal(load(tmp_path / "a", Block()).norm.scale[...], np.full(16, 3))
    save(tmp_path / "b", config, dora.get_adapters(model))


def test_adapters_without_their_model_load_with_a_warning(tmp_path):
    config = CONFIGS["dora"]
    _, _, model, adapters = trained_linen(config)
    save(tmp_path / "a", config, adapters)
    with pytest.warns(UserWarning, match="without the fingerprint of their base"):
        _, tree = load(tmp_path / "a", model)
    assert_same(tree, adapters)
    _, _, model, adapters = trained_linen(CONFIGS["pissa"])
    with pytest.raises(dora.errors.AdapterError, match="pissa"):
        save(tmp_path / "b", CONFIGS["pissa"], adapters)


def test_a_refused_save_leaves_nothing(tmp_path):
    config = CONFIGS["dora"]
    model = trained_nnx(config)
    with pytest.raises(dora.errors.AdapterError, match="precompute_scales"):
        save(tmp_path / "a", dora.precompute_scales(model), config)
    _, params, linen_model, adapters = trained_linen(config)
    with pytest.raises(dora.errors.AdapterError, match="precompute_scales"):
        save(tmp_path / "a", linen_model, dora.precompute_scales(linen_model, params, adapters))
    without = {**adapters, "layer_0": {k: adapters["layer_0"][k] for k in ("lora_a", "lora_b")}}
    for given in (config, linen_model):
        with pytest.raises(dora.errors.AdapterError, match="magnitude"):
            save(tmp_path / "a", given, without)
    lora_b = np.array(model.layer_1.lora_b[...])
    lora_b[0, 0] = np.nan
    model.layer_1.lora_b[...] = lora_b
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1\.lora_b is not finite"):
        save(tmp_path / "a", model, config)
    model = trained_nnx(config)
    model.layer_0.kernel[...] *= 2
    with pytest.raises(dora.errors.AdapterError, match="layer_0: the kernel changed"):
        save(tmp_path / "a", model, config)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request(folder, tmp_path):
    config = CONFIGS["saved"]
    model = trained_nnx(config)
    with pytest.raises(CheckpointError, match="overwrite"):
        save(folder, model, config)
    save(folder, model, config, overwrite=True)
    assert read_adapters(folder).config == config
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(CheckpointError, match="holds other files"):
        save(tmp_path / "mine", model, config, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_names_with_slashes_and_tildes_come_back(tmp_path):
    """A slash joins the names of a path in the manifest; here it is part of them."""

    class Named(nnx.Module):
        def __init__(self):
            ones = nnx.initializers.ones
            a, b, c = (nnx.Linear(16, 16, kernel_init=ones, rngs=nnx.Rngs(0)) for _ in range(3))
            self.d = nnx.Dict({"x/y": a, "x": nnx.Dict({"y": b, "y~1/": c})})

    config = dora.DoRAConfig(rank=3, target_modules=["x/y", "y~1/"])
    model = dora.apply_dora(Named(), config, rngs=nnx.Rngs(1))
    model.d["x/y"].magnitude[...] = np.arange(16, dtype=np.float32)
    save(tmp_path / "a", model, config)
    loaded = load(tmp_path / "a", Named())
    assert_same(on_host(dora.get_adapters(loaded)), on_host(dora.get_adapters(model)))
    state = {"a/b": np.ones(2), "a": {"b": np.zeros(3), "~1": np.ones(1)}}
    with dora.Checkpoints(tmp_path / "run", config) as checkpoints:
        checkpoints.save(1, model, state)
        assert_same(checkpoints.restore(model, state).state, state)
