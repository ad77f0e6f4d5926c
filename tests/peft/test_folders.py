"""An adapter that is written as a PEFT folder is read again, whatever its settings and dtype."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.names import IDENTITY, HFModule, Interleaved, NameMap
from dora_jax.peft import PeftError, load_pretrained, read_adapters, save_pretrained
from dora_jax.peft import folder as files
from tests.peft.small_models import (
    MLP,
    UP,
    Twice,
    adapted,
    assert_trees_equal,
    drop_digest,
    edit_config,
    edit_tensors,
    fields_of,
    plain,
)
from tests.support.checkpoints import filled


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 5.5, "use_rslora": True},
        {"decompose": False},
        {"rank_pattern": {"down": 3}, "alpha_pattern": {"up": 2.5}, "dropout": 0.25},
        {"modules_to_save": ["head"]},
    ],
)
def test_the_same_adapter_comes_back(tmp_path, fields):
    model = adapted(**fields)
    save_pretrained(model, tmp_path, IDENTITY)
    tree, config = read_adapters(plain(), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    for path in (("up",), ("down",)):
        wanted = dora.DoRAConfig(
            **{"rank": 2, "norm_gradient": "detached", **fields}
        ).layer_settings(path)
        assert config.layer_settings(path) == wanted


def test_features_of_another_order_are_reordered_in_every_tensor_that_has_them(tmp_path):
    model = adapted()
    names = IDENTITY | {"up": HFModule("up", Interleaved(head_dim=4))}
    for folder, own in (("as they are", IDENTITY), ("half-rotated", names)):
        save_pretrained(model, tmp_path / folder, own)
    (_, plain_order), (_, found) = (files.read(folder) for folder in sorted(tmp_path.iterdir()))
    even_then_odd = [0, 2, 1, 3, 4, 6, 5, 7]
    for key, x in plain_order.items():
        of_outputs = UP in key and "lora_A" not in key
        np.testing.assert_array_equal(found[key], x[even_then_odd] if of_outputs else x, key)
    assert_trees_equal(
        read_adapters(plain(), tmp_path / "half-rotated", names)[0], dora.get_adapters(model)
    )


def test_a_trained_rank_above_the_smaller_side_is_read_and_saved_without_a_word(tmp_path):
    with pytest.warns(UserWarning, match="the rank is above the smaller side of the kernel: down"):
        model = adapted(model=filled(MLP), rank=3, rank_pattern={"down": 7})
    base = filled(MLP)
    with warnings.catch_warnings(action="error"):
        save_pretrained(model, tmp_path / "peft", IDENTITY)
        loaded = load_pretrained(base, tmp_path / "peft", IDENTITY)
        tree, config = read_adapters(base, tmp_path / "peft", IDENTITY)
        dora.save(tmp_path / "own", loaded, config)
        again = dora.load(tmp_path / "own", base)
        many, wide = dora.adapters.add_weighted([tree, tree], [0.5, 0.5], config)
        sum_of = dora.apply_dora(base, wide, rngs=nnx.Rngs(0))
        dora.set_adapters(sum_of, many)
        dora.save(tmp_path / "sum", sum_of, wide)
        assert dora.load(tmp_path / "sum", base).down.lora_a.shape == (8, 14)
    for other in (loaded, again):
        assert_trees_equal(dora.get_adapters(other), dora.get_adapters(model))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_adapters_are_read_and_written_without_loss(tmp_path, dtype):
    model = adapted(adapter_dtype=np.dtype(dtype).name)
    save_pretrained(model, tmp_path, IDENTITY)
    base = filled(MLP)
    tree, _ = read_adapters(base, tmp_path, IDENTITY)
    assert {x.dtype for own in tree.values() for x in own.values()} == {np.dtype(dtype)}
    assert_trees_equal(tree, dora.get_adapters(model))
    # A loaded model trains in float32, which holds the same numbers.
    wide = load_pretrained(base, tmp_path, IDENTITY)
    assert {x.dtype.name for own in dora.get_adapters(wide).values() for x in own.values()} == {
        "float32"
    }
    save_pretrained(wide, tmp_path / "again", IDENTITY, dtype=dtype)
    again, _ = read_adapters(base, tmp_path / "again", IDENTITY)
    assert_trees_equal(again, tree)


def test_a_cast_that_overflows_is_refused(tmp_path):
    model = adapted()
    tree = dora.get_adapters(model)
    tree["up"]["magnitude"] = np.full(8, 1e6, np.float32)
    with pytest.raises(PeftError, match=r"up.lora_magnitude_vector does not fit into float16"):
        save_pretrained(model, tmp_path, IDENTITY, adapters=tree, dtype=np.float16)


def test_several_adapters_lie_in_folders_inside(tmp_path):
    one, other = adapted(), adapted(rank=3)
    assert save_pretrained(one, tmp_path, IDENTITY) == tmp_path
    assert save_pretrained(other, tmp_path / "b", IDENTITY) == tmp_path / "b"
    for folder, model in ((tmp_path, one), (tmp_path / "b", other)):
        tree, _ = read_adapters(plain(), folder, IDENTITY)
        assert_trees_equal(tree, dora.get_adapters(model))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(PeftError, match=rf"folders inside .* adapters: \['{tmp_path}/b'\]"):
        read_adapters(plain(), tmp_path, IDENTITY)
    with pytest.raises(PeftError, match=r"c is not a folder"):
        read_adapters(plain(), tmp_path / "c", IDENTITY)


def test_adapters_of_one_configuration_are_switched_in_an_adapted_model(tmp_path):
    model = adapted(norm_gradient="detached")
    save_pretrained(model, tmp_path, IDENTITY)
    tree, _ = read_adapters(adapted(), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    with pytest.raises(
        dora.errors.AdapterError, match=r"up has rank 3 in the model, 2 in the file"
    ):
        read_adapters(adapted(rank=3), tmp_path, IDENTITY)
    with pytest.raises(dora.errors.AdapterError, match=r"down has an adapter in the file alone"):
        read_adapters(adapted(target_modules=["up"]), tmp_path, IDENTITY)
    with pytest.raises(dora.errors.AdapterError, match=r"adapted already.*read_adapters"):
        load_pretrained(adapted(), tmp_path, IDENTITY)


def test_peft_is_told_the_same_settings(tmp_path):
    model = adapted(rank_pattern={"down": 3}, alpha=2.5, dropout=0.25, modules_to_save=["head"])
    options = {"base_model_name_or_path": "a/b", "task_type": "CAUSAL_LM"}
    save_pretrained(model, tmp_path, IDENTITY, **options)
    fields = fields_of(tmp_path)
    assert fields["target_modules"] == ["down", "up"]
    assert {fields["r"], *fields["rank_pattern"].values()} == {2, 3}
    assert (fields["lora_alpha"], fields["lora_dropout"]) == (2.5, 0.25)
    assert fields["modules_to_save"] == ["head"]
    assert fields.items() >= {**options, "inference_mode": True, "peft_type": "LORA"}.items()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_start_apart_from_zero_are_written_by_their_change(
    tmp_path, init, use_rslora
):
    model = filled(MLP)
    model = adapted(model=model, target_modules=["up"], init=init, use_rslora=use_rslora)
    save_pretrained(model, tmp_path, IDENTITY)
    config, tensors = files.read(tmp_path)
    a, b, m = (
        tensors[f"base_model.model.up.{part}"].astype(np.float64)
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    rank = config.rank("up")
    assert a.shape[0] == rank == 4
    w = np.asarray(model.up.kernel[...], np.float64).T
    v = w + config.alpha("up") / (rank**0.5 if use_rslora else rank) * b @ a
    wanted = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    own = np.asarray(dora.merge(model).up.kernel[...])
    np.testing.assert_allclose(own.T, wanted, rtol=1e-5, atol=1e-6)


def test_a_magnitude_is_read_under_the_name_of_its_parameter_too(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path, IDENTITY)
    key = "base_model.model.up.lora_magnitude_vector"
    edit_tensors(tmp_path, lambda t: t.update({f"{key}.weight": t.pop(key)}))
    tree, _ = read_adapters(plain(), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    edit_tensors(tmp_path, lambda t: t.update({key: t[f"{key}.weight"]}))
    with pytest.raises(PeftError, match="up has two magnitudes"):
        read_adapters(plain(), tmp_path, IDENTITY)


def test_a_name_that_another_ends_in_selects_its_module_alone(tmp_path):
    model = adapted(Twice, target_modules=r"inner\.up")
    save_pretrained(model, tmp_path, IDENTITY)
    _, config = read_adapters(plain(Twice), tmp_path, IDENTITY)
    assert config.target_modules == ("inner.up",)
    save_pretrained(adapted(Twice, target_modules="up"), tmp_path, IDENTITY)
    assert fields_of(tmp_path)["target_modules"] == "up"
    _, config = read_adapters(plain(Twice), tmp_path, IDENTITY)
    assert config.target_modules == "up"


def test_what_a_model_does_without_is_left_out_only_if_named(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    names = NameMap({"up": "up", "head": "head"})
    with pytest.raises(PeftError, match=r"an adapter of down, which .*unused=\['down'\]"):
        read_adapters(plain(), tmp_path, names)
    tree, _ = read_adapters(plain(), tmp_path, names, unused=["down"])
    assert list(tree) == ["up"]


def test_fields_that_are_off_or_have_no_effect_are_read(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    tree, config = read_adapters(plain(), tmp_path, IDENTITY)
    edit_config(
        tmp_path,
        **{"kasa_config": None, "something_new": False, "revision": "main", "loftq_config": {}},
        **{"init_lora_weights": "gaussian", "peft_version": "0.21.2", "inference_mode": False},
        **{"layers_pattern": "", "layers_to_transform": []},
    )
    again, same_config = read_adapters(plain(), tmp_path, IDENTITY)
    assert same_config.to_json() == config.to_json()
    assert_trees_equal(again, tree)


def test_float64_is_not_narrowed_in_silence(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY, dtype=np.float64)
    tree, config = read_adapters(plain(), tmp_path, IDENTITY)
    assert str(tree["up"]["lora_a"].dtype) == config.adapter_dtype == "float64"
    with pytest.raises(PeftError, match=r"float64.*jax_enable_x64"):
        load_pretrained(plain(), tmp_path, IDENTITY)


def test_a_weight_saved_with_the_adapter_must_be_the_bases(tmp_path):
    base, model = filled(MLP), adapted()
    save_pretrained(model, tmp_path, IDENTITY)
    key, weight = "base_model.model.up.base_layer.weight", np.asarray(base.up.kernel[...]).T
    edit_tensors(tmp_path, lambda t: t.update({key: weight.copy()}))
    tree, _ = read_adapters(base, tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    edit_tensors(tmp_path, lambda t: t.update({key: weight + 1e-3}))
    with pytest.raises(
        PeftError, match=r"up.base_layer.weight is not the weight that the model has"
    ):
        read_adapters(base, tmp_path, IDENTITY)


def test_an_edited_file_is_read_once_its_digest_is_dropped(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    edit_config(tmp_path, lora_alpha=7)
    with pytest.raises(PeftError, match=r"digest.*load_file.*save_file"):
        read_adapters(plain(), tmp_path, IDENTITY)
    drop_digest(tmp_path)
    assert read_adapters(plain(), tmp_path, IDENTITY)[1].alpha == 7
