"""PEFT adapter folders: what is written and read, what is refused, what damage is noticed."""

from __future__ import annotations

import json
import pathlib
import pickle
import re
import shutil

import pytest

pytest.importorskip("safetensors")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.names import IDENTITY, LLAMA, NameMap
from dora_jax.peft import PeftError, load_pretrained, read_adapters, save_pretrained
from dora_jax.peft import folder as files
from tests.support.peft_models import FIXTURES, TWINS, build, reference

UP = "base_model.model.up."


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.down(nnx.relu(self.up(x)))))


class Stack(nnx.Module):
    """Three layers in a stack, as a scan has them."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return MLP(rngs)

        self.layers = layers(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)


class Unstacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([MLP(rngs) for _ in range(3)])
        self.head = nnx.Linear(4, 3, rngs=rngs)


STACKED = NameMap(
    {f"layers.{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down", "head")} | {"head": "head"}
)


def adapted(make=MLP, **fields):
    """Returns a model with an adapter as training would leave it."""
    config = dora.DoRAConfig(**{"rank": 2, "target_modules": ["up", "down"], **fields})
    model = dora.apply_dora(make(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    random = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda x: (np.asarray(x) + random.uniform(0.1, 0.3, x.shape)).astype(x.dtype),
        dora.get_adapters(model),
    )
    dora.set_adapters(model, tree)
    return model


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other
    )


def index(tree, i):
    """Returns one slice of every array of a tree."""
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def edit(folder, **fields):
    """Changes fields of a folder's adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def retensor(folder, change):
    """Changes a folder's tensors in place, and drops the digest, which PEFT does not write."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def without_digest(folder):
    retensor(folder, lambda tensors: None)


# What is written and read.


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
    tree, config = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    for path in (("up",), ("down",)):
        wanted = dora.DoRAConfig(
            **{"rank": 2, "norm_gradient": "detached", **fields}
        ).layer_settings(path)
        assert config.layer_settings(path) == wanted


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_adapters_are_read_and_written_without_loss(tmp_path, dtype):
    model = adapted(adapter_dtype=np.dtype(dtype).name)
    save_pretrained(model, tmp_path, IDENTITY)
    base = MLP(nnx.Rngs(0))
    tree, _ = read_adapters(base, tmp_path, IDENTITY)
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(dtype)}
    assert_trees_equal(tree, dora.get_adapters(model))
    # In float32, in which it is trained, nothing is lost either.
    wide = load_pretrained(base, tmp_path, IDENTITY)
    save_pretrained(wide, tmp_path / "again", IDENTITY, dtype=dtype)
    again, _ = read_adapters(base, tmp_path / "again", IDENTITY)
    assert_trees_equal(again, tree)


def test_a_cast_that_overflows_is_refused(tmp_path):
    model = adapted()
    model.up.magnitude[...] = jnp.full(8, 1e6)
    with pytest.raises(PeftError, match=r"up.lora_magnitude_vector does not fit into float16"):
        save_pretrained(model, tmp_path, IDENTITY, dtype=np.float16)


def test_several_adapters_lie_in_folders_of_their_names(tmp_path):
    one, other = adapted(), adapted(rank=3)
    assert save_pretrained(one, tmp_path, IDENTITY) == tmp_path
    assert save_pretrained(other, tmp_path / "b", IDENTITY) == tmp_path / "b"
    base = MLP(nnx.Rngs(0))
    for folder, model in ((tmp_path, one), (tmp_path / "b", other)):
        tree, _ = read_adapters(base, folder, IDENTITY)
        assert_trees_equal(tree, dora.get_adapters(model))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(PeftError, match=rf"folders inside .* adapters: \['{tmp_path}/b'\]"):
        read_adapters(base, tmp_path, IDENTITY)
    with pytest.raises(PeftError, match=r"c is not a folder"):
        read_adapters(base, tmp_path / "c", IDENTITY)


def test_adapters_of_one_configuration_are_switched_in_an_adapted_model(tmp_path):
    model = adapted(norm_gradient="detached")
    save_pretrained(model, tmp_path, IDENTITY)
    other = adapted()
    tree, _ = read_adapters(other, tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    with pytest.raises(
        dora.errors.AdapterError, match=r"up has rank 3 in the model, 2 in the file"
    ):
        read_adapters(adapted(rank=3), tmp_path, IDENTITY)
    with pytest.raises(dora.errors.AdapterError, match=r"down has an adapter in the file alone"):
        read_adapters(adapted(target_modules=["up"]), tmp_path, IDENTITY)


def test_peft_is_told_the_same_settings(tmp_path):
    model = adapted(rank_pattern={"down": 3}, alpha=2.5, dropout=0.25, modules_to_save=["head"])
    options = {"base_model_name_or_path": "a/b", "task_type": "CAUSAL_LM"}
    save_pretrained(model, tmp_path, IDENTITY, **options)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
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
    model = adapted(init=init, use_rslora=use_rslora)
    save_pretrained(model, tmp_path, IDENTITY)
    config, tensors = files.read(tmp_path)
    merged = dora.merge(model)
    for name in ("up", "down"):
        a, b, m = (
            tensors[f"base_model.model.{name}.{part}"].astype(np.float64)
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        rank = config.rank(name)
        assert a.shape[0] == rank == 4
        w = np.asarray(getattr(model, name).kernel[...], np.float64).T
        v = w + config.alpha(name) / (rank**0.5 if use_rslora else rank) * b @ a
        wanted = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
        own = np.asarray(getattr(merged, name).kernel[...])
        np.testing.assert_allclose(own.T, wanted, rtol=1e-5, atol=1e-6)


def test_a_magnitude_is_read_under_the_name_of_its_parameter_too(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path, IDENTITY)
    key = "base_model.model.up.lora_magnitude_vector"
    retensor(tmp_path, lambda t: t.update({f"{key}.weight": t.pop(key)}))
    tree, _ = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    retensor(tmp_path, lambda t: t.update({key: t[f"{key}.weight"]}))
    with pytest.raises(PeftError, match="up has two magnitudes"):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)


def test_a_stack_and_numbered_layers_have_the_same_files(tmp_path):
    stacked = adapted(Stack)
    save_pretrained(stacked, tmp_path, STACKED)
    tree, _ = read_adapters(Unstacked(nnx.Rngs(0)), tmp_path, STACKED)
    own = dora.get_adapters(stacked)["layers"]
    for i in range(3):
        assert_trees_equal(tree["layers"][str(i)], index(own, i))
    again, _ = read_adapters(Stack(nnx.Rngs(0)), tmp_path, STACKED)
    assert_trees_equal(again["layers"], own)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.Dense(8, name="up")(x))
        return nn.Dense(5, name="down")(y), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = {"params": True}
        scanned = nn.scan(LinenMLP, variable_axes={"params": 0}, split_rngs=split, length=3)
        return scanned(name="layers")(x, None)[0]


class LinenUnstacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = LinenMLP(name=f"layers_{i}")(x)
        return x


def test_linen_models_scanned_and_not_have_the_same_files(tmp_path):
    names = NameMap({f"layers.{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down")})
    numbered = NameMap({f"layers_{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down")})
    x = jnp.ones((2, 5))
    params = jax.jit(LinenStack().init)(jax.random.key(0), x)["params"]
    config = dora.DoRAConfig(rank=2)
    model, tree = dora.apply_dora(
        LinenStack(), config, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    tree = jax.tree.map(lambda a: np.asarray(a) + np.float32(0.1), tree)
    save_pretrained(model, tmp_path, names, adapters=tree)
    slices = {f"layers_{i}": index(params["layers"], i) for i in range(3)}
    other, other_tree = load_pretrained(
        LinenUnstacked(), tmp_path, numbered, params=slices, inputs=(x,)
    )
    for i in range(3):
        assert_trees_equal(other_tree[f"layers_{i}"], index(tree["layers"], i))
    y = jax.jit(model.apply)({"params": params, "dora": tree}, x)
    other_y = jax.jit(other.apply)({"params": slices, "dora": other_tree}, x)
    np.testing.assert_allclose(other_y, y, rtol=1e-5)
    again, _ = read_adapters(model, tmp_path, names, params=params)
    assert_trees_equal(again, tree)
    with pytest.raises(PeftError, match=r"layers.* holds a precomputed scale"):
        save_pretrained(
            model, tmp_path, names, adapters=dora.precompute_scales(model, params, tree)
        )


def test_a_part_of_a_stack_is_read_as_layers_to_transform(tmp_path):
    model = adapted(Stack, layers_to_transform=[0, 2])
    save_pretrained(model, tmp_path, STACKED)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == 4
    again = load_pretrained(Stack(nnx.Rngs(0)), tmp_path, STACKED)
    for name in ("up", "down"):
        layer, own = getattr(again.layers, name), getattr(model.layers, name)
        np.testing.assert_array_equal(layer.base_mask[...], [True, False, True])
        for parameter in ("lora_a", "lora_b", "magnitude"):
            values = [np.asarray(getattr(x, parameter)[...])[[0, 2]] for x in (layer, own)]
            np.testing.assert_array_equal(*values)
    # Numbered layers need no such setting to hold any others.
    drop = [f"base_model.model.layers.2.up.{p}" for p in ("lora_A.weight", "lora_B.weight")]
    drop.append("base_model.model.layers.2.up.lora_magnitude_vector")
    retensor(tmp_path, lambda t: [t.pop(key) for key in drop])
    names = [f"layers.{i}.{n}" for i, n in ((0, "up"), (0, "down"), (2, "down"))]
    edit(tmp_path, target_modules=names)
    _, config = read_adapters(Unstacked(nnx.Rngs(0)), tmp_path, STACKED)
    assert sorted(config.target_modules) == sorted(names)
    with pytest.raises(PeftError, match=r"other layers of one stack.*not stacked"):
        read_adapters(Stack(nnx.Rngs(0)), tmp_path, STACKED)


def test_layers_of_a_stack_with_several_ranks_need_numbered_layers(tmp_path):
    model = adapted(Unstacked, rank_pattern={"1.up": 3}, target_modules=["layers.*up"][0])
    save_pretrained(model, tmp_path, STACKED)
    _, config = read_adapters(Unstacked(nnx.Rngs(0)), tmp_path, STACKED)
    assert config.layer_settings(("layers", "1", "up")).rank == 3
    with pytest.raises(PeftError, match=r"layers.up is a stack .*\(2, 16.0\), \(3, 16.0\)"):
        read_adapters(Stack(nnx.Rngs(0)), tmp_path, STACKED)


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.inner = MLP(rngs)


def test_a_name_that_another_ends_in_selects_its_module_alone(tmp_path):
    model = adapted(Twice, target_modules=r"inner\.up")
    save_pretrained(model, tmp_path, IDENTITY)
    _, config = read_adapters(Twice(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert config.target_modules == ("inner.up",)
    save_pretrained(adapted(Twice, target_modules="up"), tmp_path, IDENTITY)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "up"
    _, config = read_adapters(Twice(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert config.target_modules == "up"


def test_what_a_model_does_without_is_left_out_only_if_named(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    names = NameMap({"up": "up", "head": "head"})
    with pytest.raises(PeftError, match=r"an adapter of down, which .*unused=\['down'\]"):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, names)
    tree, _ = read_adapters(MLP(nnx.Rngs(0)), tmp_path, names, unused=["down"])
    assert list(tree) == ["up"]


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "replaced weights of the base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not known"),
        ({"bias": "lora_only"}, "bias='lora_only': trained biases are not read"),
        ({"lora_bias": True}, "lora_bias is set: a bias in lora_B"),
        ({"trainable_token_indices": [1]}, "trained rows of the embedding"),
        ({"layer_replication": [[0, 2]]}, "another depth"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"something_new": 3}, "something_new=3 in adapter_config.json is not known"),
        ({"r": 0}, "r in adapter_config.json has an invalid value, 0"),
        ({"r": 3}, "makes its rank 3"),
        ({"r": None}, "has no r"),
        ({"lora_alpha": "4"}, "lora_alpha in adapter_config.json has an invalid value"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"use_dora": 1}, "use_dora"),
        ({"use_dora": False}, "lora_magnitude_vector is there although use_dora is False"),
        ({"target_modules": "(up"}, "'(up' is not a regular expression"),
        ({"target_modules": ["up"]}, "which target_modules does not select"),
        ({"target_modules": ["up", "down", "head"]}, "the file holds no adapter of it"),
        ({"exclude_modules": ["up"]}, "which target_modules does not select"),
        ({"rank_pattern": {"up": -1}}, "rank_pattern"),
        ({"modules_to_save": ["head"]}, "head.bias is missing"),
    ],
)
def test_a_config_that_is_not_the_adapters_is_refused(tmp_path, fields, message):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    edit(tmp_path, **fields)
    without_digest(tmp_path)
    with pytest.raises(PeftError, match=re.escape(message)):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)


def test_fields_that_are_off_or_say_nothing_are_read(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    tree, config = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    edit(
        tmp_path,
        **{"kasa_config": None, "something_new": False, "revision": "main", "loftq_config": {}},
        **{"init_lora_weights": "gaussian", "peft_version": "0.21.2", "inference_mode": False},
        **{"layers_pattern": "", "layers_to_transform": []},
    )
    again, same_config = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert same_config.to_json() == config.to_json()
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": False}, "down has normalize=False; PEFT always divides by the norm"),
        ({"magnitude_trainable": False}, "down has magnitude_trainable=False"),
        ({"rank_pattern": {"up": 0}}, "up has rank 0; PEFT has no magnitude without lora_A"),
    ],
)
def test_settings_that_peft_lacks_are_not_written(tmp_path, fields, message):
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(adapted(**fields), tmp_path, IDENTITY)
    assert not any(tmp_path.iterdir())


def test_a_precomputed_model_and_one_without_an_adapter_are_not_written(tmp_path):
    with pytest.raises(PeftError, match="holds a precomputed scale"):
        save_pretrained(dora.precompute_scales(adapted()), tmp_path, IDENTITY)
    with pytest.raises(dora.errors.AdapterError, match="no adapter"):
        save_pretrained(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    only_saved = adapted(target_modules=[], modules_to_save=["head"])
    with pytest.raises(PeftError, match="no layer is adapted"):
        save_pretrained(only_saved, tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (lambda rngs: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=rngs), "feature_group_count=2"),
        (lambda rngs: nnx.Conv(4, 4, 3, kernel_dilation=2, rngs=rngs), "kernel_dilation=2"),
        (lambda rngs: nnx.ConvTranspose(4, 4, 3, rngs=rngs), "transposed convolutions"),
    ],
)
def test_convolutions_that_peft_adapts_otherwise_are_refused(tmp_path, conv, message):
    model = nnx.Sequential(conv(nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, target_modules=["0"])
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(dora.apply_dora(model, config, rngs=nnx.Rngs(0)), tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv(4, 3, feature_group_count=2), "feature_group_count=2"),
        (nn.Conv(4, 3, kernel_dilation=2), "kernel_dilation=2"),
        (nn.ConvTranspose(4, (3,)), "transposed convolutions"),
    ],
)
def test_linen_convolutions_that_peft_adapts_otherwise_are_refused(tmp_path, conv, message):
    module, x = nn.Sequential([conv]), jnp.ones((1, 5, 4))
    params = module.init(jax.random.key(0), x)["params"]
    config = dora.DoRAConfig(rank=2, target_modules=["layers_0"])
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(model, tmp_path, IDENTITY, adapters=adapters)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(9, 4, rngs=rngs)

    def __call__(self, ids):
        return self.embed_tokens.attend(self.embed_tokens(ids))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 4, name="embed_tokens")
        return table.attend(table(ids))


def test_a_table_that_is_the_head_too_is_refused(tmp_path):
    # Here the head sees the adapter, in PEFT it does not.
    with pytest.raises(PeftError, match="head that is tied to the table"):
        save_pretrained(adapted(Tied, target_modules=["embed_tokens"]), tmp_path, LLAMA)
    # A Linen model's parameters are not at hand: it may have a head of its own.
    module, ids = LinenTied(), jnp.ones(2, int)
    params = module.init(jax.random.key(0), ids)["params"]
    config = dora.DoRAConfig(rank=2, target_modules=["embed_tokens"])
    model, tree = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(0), inputs=(ids,)
    )
    with pytest.warns(UserWarning, match="embed_tokens: PEFT adapts the lookup alone"):
        save_pretrained(model, tmp_path, LLAMA, adapters=tree)


def test_a_layer_that_is_the_whole_model_is_refused(tmp_path):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(PeftError, match="put it into a module"):
        save_pretrained(model, tmp_path, IDENTITY)


def test_running_statistics_are_refused(tmp_path):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    config = dora.DoRAConfig(rank=2, modules_to_save=["layers.1"])
    model = dora.apply_dora(model, config, rngs=rngs)
    with pytest.raises(PeftError, match=r"layers.1 has running statistics"):
        save_pretrained(model, tmp_path, IDENTITY)


def test_kernels_of_which_torch_joins_unknown_axes_are_refused(tmp_path):
    rngs = nnx.Rngs(0)
    heads = nnx.LinearGeneral(3, (2, 2), rngs=rngs)
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), heads)
    config = dora.DoRAConfig(rank=2, modules_to_save=["layers.1"])
    with pytest.raises(PeftError, match=r"layers.1 is in modules_to_save with a kernel of 3 axes"):
        save_pretrained(dora.apply_dora(model, config, rngs=rngs), tmp_path, IDENTITY)


def test_float64_is_not_narrowed_in_silence(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY, dtype=np.float64)
    tree, config = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert str(tree["up"]["lora_a"].dtype) == config.adapter_dtype == "float64"
    with pytest.raises(PeftError, match=r"float64.*jax_enable_x64"):
        load_pretrained(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)


def test_a_weight_saved_with_the_adapter_must_be_the_bases(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path, IDENTITY)
    key, weight = "base_model.model.up.base_layer.weight", np.asarray(model.up.kernel[...]).T
    retensor(tmp_path, lambda t: t.update({key: weight.copy()}))
    tree, _ = read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(model))
    retensor(tmp_path, lambda t: t.update({key: weight + 1e-3}))
    with pytest.raises(
        PeftError, match=r"up.base_layer.weight is not the weight that the model has"
    ):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)


# Damage.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(up_=t.pop(UP + "lora_A.weight")), "does not start with"),
        (lambda t: t.pop(UP + "lora_magnitude_vector"), "lora_magnitude_vector is missing"),
        (lambda t: t.pop(UP + "lora_A.weight"), "up.lora_A.weight is missing"),
        (lambda t: t.pop(UP + "lora_B.weight"), "up.lora_B.weight is missing"),
        (
            lambda t: t.update(
                {
                    UP + "lora_embedding_A": t.pop(UP + "lora_A.weight"),
                    UP + "lora_embedding_B": t.pop(UP + "lora_B.weight"),
                }
            ),
            "up.lora_A.weight is missing, although the layer is linear here",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)], "no adapter of it"),
        (
            lambda t: t.update({UP + "lora_C": t[UP + "lora_A.weight"]}),
            "up.lora_C is not one of the tensors that are read",
        ),
        (
            lambda t: t.update({UP + "other": t[UP + "lora_A.weight"]}),
            "up.other is neither part of an adapter",
        ),
        (
            lambda t: t.update({UP + "lora_A.weight": t[UP + "lora_A.weight"][:, :4].copy()}),
            "lora_A.weight has shape (2, 4), the model needs (2, 5)",
        ),
        (
            lambda t: t.update({UP + "lora_A.weight": t[UP + "lora_A.weight"].T.copy()}),
            "lora_A.weight has shape (5, 2), but r",
        ),
        (
            lambda t: t.update({UP + "lora_B.weight": t[UP + "lora_B.weight"].T.copy()}),
            "lora_B.weight has shape (2, 8), but r",
        ),
        (
            lambda t: t.update(
                {
                    UP + "lora_B.weight": t[UP + "lora_B.weight"][:7].copy(),
                    UP + "lora_magnitude_vector": np.ones(7, np.float32),
                }
            ),
            "lora_B.weight has shape (7, 2), the model needs (8, 2)",
        ),
        (
            lambda t: t.update({UP + "lora_magnitude_vector": np.ones(7, np.float32)}),
            "lora_magnitude_vector has 7 features, lora_B has 8",
        ),
        (
            lambda t: t.update({UP + "lora_magnitude_vector": np.ones((1, 8), np.float32)}),
            "has shape (1, 8), the model needs (8,)",
        ),
        (lambda t: t[UP + "lora_B.weight"].fill(np.nan), "lora_B.weight holds NaN or infinity"),
        (
            lambda t: t[UP + "lora_B.weight"][:1].fill(-np.inf),
            "lora_B.weight holds NaN or infinity",
        ),
        (lambda t: t.update({UP + "lora_A.weight": np.ones((2, 5), np.int8)}), "is of I8"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(tmp_path, change, message):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    retensor(tmp_path, change)
    with pytest.raises(PeftError, match=re.escape(message)):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_or_missing_file_is_refused(tmp_path, file):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    base, data = MLP(nnx.Rngs(0)), (tmp_path / file).read_bytes()
    for length in np.linspace(0, len(data) - 1, 20, dtype=int):
        (tmp_path / file).write_bytes(data[:length])
        with pytest.raises(PeftError, match=re.escape(file)):
            read_adapters(base, tmp_path, IDENTITY)
    (tmp_path / file).unlink()
    with pytest.raises(PeftError, match=re.escape(file)):
        read_adapters(base, tmp_path, IDENTITY)


def test_a_pickle_is_refused_and_not_opened(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "opened",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PeftError, match=r"adapter_model.bin is a pickle, which can run any code"):
        read_adapters(MLP(nnx.Rngs(0)), tmp_path, IDENTITY)
    assert not (tmp_path / "opened").exists()


def parsed(folder):
    """Returns the fields of the config and the metadata and tensors' header of a folder."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads((folder / "adapter_config.json").read_text()), header


def flips(folder):
    """Flips one bit at 200 places of the config and the header, one after another."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    config = len((folder / "adapter_config.json").read_bytes())
    random = np.random.default_rng(0)
    for place in np.linspace(0, config + header - 1, 200, dtype=int):
        name = "adapter_config.json" if place < config else "adapter_model.safetensors"
        original = (folder / name).read_bytes()
        damaged = bytearray(original)
        damaged[place if place < config else place - config] ^= 1 << int(random.integers(8))
        (folder / name).write_bytes(damaged)
        yield
        (folder / name).write_bytes(original)


def test_a_flipped_bit_is_an_error_or_changes_nothing_that_counts(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    base, (fields, header) = MLP(nnx.Rngs(0)), parsed(tmp_path)
    tree, config = read_adapters(base, tmp_path, IDENTITY)
    errors = 0
    for _ in flips(tmp_path):
        try:
            other_tree, other_config = read_adapters(base, tmp_path, IDENTITY)
        except dora.DoRAError:
            errors += 1
            continue
        assert other_config == config
        assert_trees_equal(other_tree, tree)
        other_fields, other_header = parsed(tmp_path)
        changed = {k for k in fields | other_fields if fields.get(k) != other_fields.get(k)}
        # White space; an ignored field; a field that was at its default; the metadata.
        assert all(fields.get(k) in (None, False, True, {}) for k in changed), changed
        assert {k: v for k, v in header.items() if k != "__metadata__"} == {
            k: v for k, v in other_header.items() if k != "__metadata__"
        }
    assert errors > 150, errors


def test_a_bit_flipped_in_a_number_is_noticed(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    base, file = MLP(nnx.Rngs(0)), tmp_path / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(PeftError, match=r"digest.*load_file.*save_file"):
        read_adapters(base, tmp_path, IDENTITY)
    without_digest(tmp_path)  # as the message says
    read_adapters(base, tmp_path, IDENTITY)


def test_pefts_files_have_no_digest_so_that_a_digit_may_change_unseen(tmp_path):
    shutil.copytree(FIXTURES / "attention", tmp_path, dirs_exist_ok=True)
    twin = TWINS["attention"]
    built = build(twin, reference("attention", "base."), reference("attention", "input."))
    tree, config = built.read(tmp_path)
    unseen = set()
    for _ in flips(tmp_path):
        try:
            other_tree, other = built.read(tmp_path)
        except dora.DoRAError:
            continue
        assert_trees_equal(other_tree, tree)
        one, other = config.to_dict(), other.to_dict()
        unseen |= {name for name in one if one[name] != other[name]}
    assert unseen <= {"alpha", "dropout"}
