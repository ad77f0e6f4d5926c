from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.checkpoint import load, read_adapters, save
from dora_jax.errors import CheckpointError
from tests.support.models import (
    LinenChain,
    NNXChain,
    chain_params,
    inputs,
    random_adapters,
    with_values,
)

WIDTHS = (24, 40, 17)
CONFIGS = {
    "dora": dora.DoRAConfig(rank=3),
    "lora": dora.DoRAConfig(rank=3, decompose=False),
    "magnitude": dora.DoRAConfig(rank=0),
    "pissa": dora.DoRAConfig(rank=3, init="pissa"),
    "patterns": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, use_rslora=True),
    "saved": dora.DoRAConfig(rank=3, modules_to_save=["layer_1"]),
    "bfloat16": dora.DoRAConfig(rank=3, adapter_dtype="bfloat16"),
}


def nnx_base(seed=0, dtype=jnp.float32):
    base = NNXChain(WIDTHS, param_dtype=dtype, rngs=nnx.Rngs(0))
    nnx.update(base, with_values(base, chain_params(WIDTHS, dtype, seed)))
    return base


def trained_nnx(config, **kwargs):
    model = dora.apply_dora(nnx_base(**kwargs), config, rngs=nnx.Rngs(5))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    return model


def trained_linen(config):
    module, params = LinenChain(WIDTHS), chain_params(WIDTHS)
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(5), inputs=(inputs(1, WIDTHS[0]),)
    )
    return module, params, model, random_adapters(adapters)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    save(path, trained_nnx(CONFIGS["dora"]), CONFIGS["dora"])
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_nnx_adapters_come_back_bit_for_bit(name, tmp_path):
    config, x = CONFIGS[name], inputs(5, WIDTHS[0])
    model, base = trained_nnx(config), nnx_base()
    save(tmp_path / "a", model, config)
    loaded = load(tmp_path / "a", base)
    assert_same(dora.get_adapters(loaded), dora.get_adapters(model))
    np.testing.assert_array_equal(loaded(x), model(x))


def test_adapters_load_into_a_model_that_has_others(folder):
    config, x = CONFIGS["dora"], inputs(5, WIDTHS[0])
    adapted = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(9))
    before = dora.get_adapters(adapted)
    np.testing.assert_array_equal(load(folder, adapted)(x), trained_nnx(config)(x))
    assert_same(dora.get_adapters(adapted), before)  # what was given stays as it was


@pytest.mark.parametrize("name", CONFIGS)
def test_linen_adapters_come_back_bit_for_bit(name, tmp_path):
    config, x = CONFIGS[name], inputs(5, WIDTHS[0])
    module, params, model, adapters = trained_linen(config)
    save(tmp_path / "a", model, adapters)
    expected = model.apply({"params": params, "dora": adapters}, x)
    for loaded, tree in (
        load(tmp_path / "a", module, params=params, inputs=(x,)),
        load(tmp_path / "a", model),
    ):
        assert_same(tree, adapters)
        np.testing.assert_array_equal(loaded.apply({"params": params, "dora": tree}, x), expected)


def test_one_front_end_loads_what_the_other_saved(tmp_path):
    config, x = CONFIGS["dora"], inputs(5, WIDTHS[0])
    module, params, model, adapters = trained_linen(config)
    save(tmp_path / "linen", model, adapters)
    loaded = load(tmp_path / "linen", nnx_base())
    expected = model.apply({"params": params, "dora": adapters}, x)
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-6, atol=1e-6)
    save(tmp_path / "nnx", loaded, config)
    assert_same(load(tmp_path / "nnx", module, params=params, inputs=(x,))[1], adapters)


def test_factors_that_do_not_start_at_zero_are_those_of_the_saved_model(tmp_path):
    config, x = CONFIGS["pissa"], inputs(5, WIDTHS[0])
    model = trained_nnx(config)
    # Another machine's singular vectors may have other signs.
    flipped = -model.layer_0.base_init_a[...], -model.layer_0.base_init_b[...]
    model.layer_0.base_init_a[...], model.layer_0.base_init_b[...] = flipped
    save(tmp_path / "a", model, config)
    np.testing.assert_array_equal(load(tmp_path / "a", nnx_base())(x), model(x))


def test_norms_are_those_of_the_saved_model(tmp_path):
    """Another device may sum them in another order; the adapted model is to be the same one."""
    model = trained_nnx(CONFIGS["dora"])
    norm = np.nextafter(np.asarray(model.layer_0.base_norm[...]), np.float32(np.inf))
    model.layer_0.base_norm[...] = norm
    save(tmp_path / "a", model, CONFIGS["dora"])
    np.testing.assert_array_equal(load(tmp_path / "a", nnx_base()).layer_0.base_norm[...], norm)


def test_a_folder_tells_what_it_holds(folder):
    saved = read_adapters(folder)
    assert saved.config == CONFIGS["dora"]
    assert_same(
        saved.adapters, jax.tree.map(np.asarray, dora.get_adapters(trained_nnx(saved.config)))
    )
    kernel = np.asarray(chain_params(WIDTHS)["layer_0"]["kernel"])
    np.testing.assert_allclose(
        saved.base["layer_0",].norm, np.linalg.norm(kernel, axis=0), rtol=1e-6
    )
    np.testing.assert_array_equal(saved.base["layer_0",].first_row, kernel[0])


def test_only_some_layers_are_loaded(folder):
    fresh = dora.apply_dora(nnx_base(), CONFIGS["dora"], rngs=nnx.Rngs(0))
    loaded = load(folder, nnx_base(), only=["layer_1"])
    trained = read_adapters(folder).adapters
    assert_same(dora.get_adapters(loaded)["layer_0"], dora.get_adapters(fresh)["layer_0"])
    assert_same(jax.tree.map(np.asarray, dora.get_adapters(loaded)["layer_1"]), trained["layer_1"])
    with pytest.raises(dora.errors.ConfigError, match=r"layr_1.*layer_1"):
        load(folder, nnx_base(), only=["layr_1"])
    module, params, model, _ = trained_linen(CONFIGS["dora"])
    _, tree = load(folder, module, params=params, inputs=(inputs(1, 24),), only=["layer_1"])
    assert_same(jax.tree.map(np.asarray, tree["layer_1"]), trained["layer_1"])
    assert not np.asarray(tree["layer_0"]["lora_b"]).any()
    with pytest.raises(TypeError, match="plain module"):
        load(folder, model, only=["layer_1"])


@pytest.mark.parametrize(
    "base, problem",
    [
        (nnx_base(seed=1), "the first weight of 40 of 40"),
        (nnx_base(dtype=jnp.bfloat16), "its kernel is float32, the model's bfloat16"),
    ],
)
def test_another_base_is_refused_unless_it_is_meant(folder, base, problem):
    with pytest.raises(dora.errors.AdapterError, match=f"layer_0: .*{problem}"):
        load(folder, base)
    loaded = load(folder, base, allow_base_mismatch=True)
    assert_same(jax.tree.map(np.asarray, dora.get_adapters(loaded)), read_adapters(folder).adapters)
    assert np.isfinite(np.asarray(loaded(inputs(5, WIDTHS[0])), np.float32)).all()


def test_a_base_changed_outside_its_first_row_is_another_one(folder):
    base = nnx_base()
    base.layer_1.kernel[...] = base.layer_1.kernel[...].at[7, 3].add(0.02)
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1: .*norms of 1 of 17"):
        load(folder, base)


def test_one_flipped_bit_in_the_first_row_is_another_base(folder):
    base = nnx_base()
    kernel = np.array(base.layer_0.kernel[...])
    kernel[0, 5] = np.nextafter(kernel[0, 5], np.float32(np.inf))
    base.layer_0.kernel[...] = kernel
    with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*first weight of 1 of 40"):
        load(folder, base)


def test_a_model_adapted_with_other_settings_is_refused(folder):
    for other in (dict(alpha=32.0), dict(rank=2), dict(normalize=False), dict(use_rslora=True)):
        config = dataclasses.replace(CONFIGS["dora"], **other)
        model = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(0))
        with pytest.raises(dora.errors.AdapterError, match="layer_0"):
            load(folder, model)
        with pytest.raises(dora.errors.AdapterError, match="layer_0"):
            save(folder.parent / "other", model, CONFIGS["dora"])


def test_factors_that_start_in_another_way_are_refused_on_any_base(tmp_path):
    """They act by their change: put where the change is counted from zero, they would act more."""
    config = CONFIGS["pissa"]
    save(tmp_path / "a", trained_nnx(config), config)
    model = dora.apply_dora(nnx_base(), CONFIGS["dora"], rngs=nnx.Rngs(0))
    for allow_base_mismatch in (False, True):
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*init_a"):
            load(tmp_path / "a", model, allow_base_mismatch=allow_base_mismatch)


def test_a_norm_trained_in_full_is_saved_with_its_scale(tmp_path):
    class Block(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.RMSNorm(3, rngs=nnx.Rngs(0))

    config = dora.DoRAConfig(rank=2, target_modules=["linear"], modules_to_save=["norm"])
    model = dora.apply_dora(Block(), config, rngs=nnx.Rngs(1))
    model.norm.scale[...] *= 3
    save(tmp_path / "a", model, config)
    np.testing.assert_array_equal(load(tmp_path / "a", Block()).norm.scale[...], [3, 3, 3])
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


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
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
    model.layer_1.lora_b[...] = model.layer_1.lora_b[...].at[0, 0].set(jnp.nan)
    with pytest.raises(dora.errors.AdapterError, match=r"layer_1\.lora_b is not finite"):
        save(tmp_path / "a", model, config)
    model = trained_nnx(config)
    model.layer_0.kernel[...] *= 2
    with pytest.raises(dora.errors.AdapterError, match="layer_0: the kernel changed"):
        save(tmp_path / "a", model, config)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_exchanged_only_on_request(folder, tmp_path):
    config = CONFIGS["saved"]
    model = trained_nnx(config)
    with pytest.raises(CheckpointError, match="overwrite"):
        save(folder, model, config)
    save(folder, model, config, overwrite=True)
    assert read_adapters(folder).config == config
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(CheckpointError, match="something else"):
        save(tmp_path / "mine", model, config, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


# What may be done to a saved folder; each must be an error that names a file or an array, or leave
# what is read as it was. Never another result.


def all_files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def outcome(folder, expected):
    """Returns "same" or "error"; anything else fails the test."""
    try:
        saved = read_adapters(folder)
    except dora.DoRAError as error:
        message = str(error)
        assert str(folder) in message or any(f in message for f in ("rank", "alpha", "field"))
        return "error"
    assert saved.config == expected.config
    assert_same(saved.adapters, expected.adapters)
    assert_same(
        {".".join(p): dict(b) for p, b in saved.base.items()},
        {".".join(p): dict(b) for p, b in expected.base.items()},
    )
    return "same"


def test_no_damage_to_a_file_passes_for_good(folder, tmp_path):
    expected, rng, outcomes = read_adapters(folder), np.random.default_rng(0), {}
    copy = tmp_path / "copy"
    for name in all_files(folder):
        content = (folder / name).read_bytes()
        damaged = [b"", content[: len(content) // 2], content[:-1], content + b"\0", b"\0" * 64]
        for _ in range(6):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        for new in [None, *damaged]:
            shutil.copytree(folder, copy)
            if new is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(new)
            outcomes.setdefault(str(name), []).append(outcome(copy, expected))
            shutil.rmtree(copy)
    # All that matters is covered: any change of the manifest, and of the arrays' own bytes.
    assert set(outcomes["metadata/metadata"]) == {"error"}
    data = [n for n in outcomes if "/d/" in n]
    assert data and any(outcomes[n].count("error") > 6 for n in data)


def test_a_flipped_bit_of_a_number_is_noticed(tmp_path):
    rng, config = np.random.default_rng(0), dora.DoRAConfig(rank=8)
    shapes = {"lora_a": (256, 8), "lora_b": (8, 128), "magnitude": (128,)}
    layer = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save(tmp_path / "a", config, {"layer": layer})
    file = max((tmp_path / "a" / "arrays" / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    for position in rng.integers(len(content), size=12):
        flipped = bytearray(content)
        flipped[position] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match="damaged"):
            read_adapters(tmp_path / "a")


def test_a_changed_setting_is_noticed(folder):
    file = folder / "metadata" / "metadata"
    assert '"alpha": 16.0' in file.read_text()
    file.write_text(file.read_text().replace('"alpha": 16.0', '"alpha": 17.0'))
    with pytest.raises(CheckpointError, match="does not match its own sha256"):
        load(folder, nnx_base())


def signed(content):
    """Returns a manifest with the digest it should have: what an editing tool would write."""
    content = {k: v for k, v in content.items() if k != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def rename(content):
    content["arrays"]["adapters/layer_9/lora_a"] = content["arrays"].pop("adapters/layer_0/lora_a")


def rename_layer(content):
    for name in list(content["arrays"]):
        content["arrays"][name.replace("layer_0", "layer_9")] = content["arrays"].pop(name)


def drop_magnitude(content):
    del content["arrays"]["adapters/layer_0/magnitude"]


def swap(content):
    one, other = (content["arrays"][f"{k}"] for k in ("adapters/layer_0/magnitude", NORM))
    content["arrays"]["adapters/layer_0/magnitude"], content["arrays"][NORM] = other, one


def transpose(content):
    content["arrays"]["adapters/layer_0/lora_a"]["shape"].reverse()


def retype(content):
    content["arrays"]["adapters/layer_0/lora_a"]["dtype"] = "int32"


def newer(content):
    content["format"] = "dora_jax/2"


def unknown_field(content):
    content["metadata"]["config"]["ranks"] = 3


def no_config(content):
    del content["metadata"]["config"]


NORM = "base/layer_0/norm"


@pytest.mark.parametrize(
    "edit, message",
    [
        (rename, "layer_9"),
        (rename_layer, "layer_9"),
        (drop_magnitude, r"missing layer_0\.magnitude"),
        (swap, "array adapters/layer_0/magnitude is damaged"),
        (transpose, r"array adapters/layer_0/lora_a is float32 \(24, 3\).*float32 \(3, 24\)"),
        (retype, "array adapters/layer_0/lora_a is float32"),
        (newer, "dora_jax/2.*newer"),
        (unknown_field, r"unknown fields \['ranks'\]"),
        (no_config, "no configuration"),
    ],
)
def test_an_edited_manifest_does_not_load(folder, edit, message):
    file = folder / "metadata" / "metadata"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(signed(content)))
    with pytest.raises(dora.DoRAError, match=message):
        load(folder, nnx_base())


def test_other_arrays_under_the_same_names_do_not_load(folder, tmp_path):
    """Whole files of another adapter, planted values among them, are not taken for this one's."""
    config, model = CONFIGS["dora"], trained_nnx(CONFIGS["dora"])
    model.layer_0.magnitude[...] = model.layer_0.magnitude[...].at[3].multiply(1.0001)
    save(tmp_path / "other", model, config)
    shutil.rmtree(folder / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", folder / "arrays")
    with pytest.raises(CheckpointError, match="array adapters/layer_0/magnitude is damaged"):
        load(folder, nnx_base())


def test_what_is_no_adapter_folder_is_named(tmp_path):
    for make, message in (
        (lambda p: None, "is no folder"),
        (lambda p: p.mkdir(), "metadata is missing"),
        (lambda p: (p / "adapter_config.json").write_text("{}"), "metadata is missing"),
    ):
        make(tmp_path / "a")
        with pytest.raises(CheckpointError, match=message):
            read_adapters(tmp_path / "a")
