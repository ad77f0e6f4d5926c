"""`dora-jax convert` keeps every bit, and says which base an adapter is of."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.checkpoint import load, read_adapters, save
from dora_jax.names import IDENTITY
from dora_jax.peft import save_pretrained
from tests.cli.folders import (
    CONFIG,
    FIXTURES,
    LLAMA_BASE,
    PEFT_FOLDER,
    chain,
    peft_base,
    trained,
    write_peft,
)
from tests.support.checkpoints import filled


def test_convert_there_and_back_keeps_every_bit(llama_adapter, tmp_path, done):
    done("convert", llama_adapter, tmp_path / "orbax", "--names", "llama", "--base", LLAMA_BASE)
    saved = read_adapters(tmp_path / "orbax")
    q = saved.adapters["layers"]["1"]["self_attn"]["q_proj"]
    tensors = load_file(llama_adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj."
    np.testing.assert_array_equal(q["lora_a"], tensors[f"{prefix}lora_A.weight"].T)
    np.testing.assert_array_equal(q["magnitude"], tensors[f"{prefix}lora_magnitude_vector"])
    assert saved.config.layer_settings(("layers", "0", "mlp", "up_proj")).rank == 2
    assert len(saved.base) == 2
    done("convert", tmp_path / "orbax", tmp_path / "back", "--names", "llama", "--base", LLAMA_BASE)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x)
    one, other = (
        done("merge", LLAMA_BASE, adapter, tmp_path / f"merged_{i}", *names, "--json")
        for i, (adapter, names) in enumerate(
            ((llama_adapter, ()), (tmp_path / "orbax", ("--names", "llama")))
        )
    )
    assert one["merged"] == other["merged"]
    for name, x in load_file(tmp_path / "merged_0" / "model.safetensors").items():
        np.testing.assert_array_equal(
            load_file(tmp_path / "merged_1" / "model.safetensors")[name].view(np.uint16),
            x.view(np.uint16),
        )


BERT_NAMES = ("bert", "--flax-prefix", "encoder", "--hf-prefix", "bert")


@pytest.mark.rows(1)
@pytest.mark.parametrize(
    ("name", "names", "with_base"),
    [
        ("llama_lora", ("llama",), False),
        ("bert", (*BERT_NAMES, "--extra-names", "classifier=classifier"), True),
        ("convolutions", ("identity",), True),
        pytest.param("llama", ("llama",), True, marks=pytest.mark.full),
        pytest.param("llama_some", ("llama",), True, marks=pytest.mark.full),
        pytest.param("attention", ("identity",), True, marks=pytest.mark.full),
    ],
)
def test_what_peft_wrote_converts_there_and_back(name, names, with_base, tmp_path, done):
    adapter = PEFT_FOLDER / name
    peft_base(name, tmp_path / "base")
    base = ("--base", tmp_path / "base") if with_base else ()
    done("convert", adapter, tmp_path / "orbax", *base, "--names", *names)
    done("convert", tmp_path / "orbax", tmp_path / "back", *base, "--names", *names)
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")
    )
    assert other.keys() == {key for key in one if ".base_layer." not in key}
    for key, x in other.items():
        np.testing.assert_array_equal(x, one[key])
    for folder in (adapter, tmp_path / "back"):
        done("merge", tmp_path / "base", folder, tmp_path / f"merged_{folder.name}")
    one, other = (load_file(tmp_path / f"merged_{n}" / "model.safetensors") for n in (name, "back"))
    for key, x in one.items():
        np.testing.assert_array_equal(x, other[key])


def test_an_adapter_that_a_model_was_trained_with_converts_as_the_library_writes_it(tmp_path, done):
    """The command, which has no model, writes what `dora_jax.peft` writes with one."""
    pissa = dora.DoRAConfig(rank=2, init="pissa", use_rslora=True, target_modules=["layer_0"])
    models = {
        config: trained(config)
        for config in (
            CONFIG,
            dora.DoRAConfig(rank=3, decompose=False, exclude_modules=["layer_1"]),
            dora.DoRAConfig(rank=2, modules_to_save=["layer_1"]),
        )
    }
    models[pissa] = dora.apply_dora(filled(chain), pissa, rngs=nnx.Rngs(0))
    for number, (config, model) in enumerate(models.items()):
        one, other = tmp_path / f"one{number}", tmp_path / f"other{number}"
        save(tmp_path / f"saved{number}", model, config)
        save_pretrained(model, one, IDENTITY)
        done("convert", tmp_path / f"saved{number}", other, "--names", "identity")
        config_file = "adapter_config.json"
        assert (one / config_file).read_text() == (other / config_file).read_text()
        done("diff", one, other)


class Stack(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(6, 5, rngs=rngs)))
        self.layers = nnx.Dict(self_attn=nnx.Dict(q_proj=make(rngs)))


def test_stacked_layers_convert_by_the_name_map(tmp_path, done, run):
    config = dora.DoRAConfig(rank=2, target_modules=["q_proj"])
    model = trained(config, Stack)
    save(tmp_path / "a", model, config)
    done("convert", tmp_path / "a", tmp_path / "p", "--names", "llama")
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    lora_b = np.asarray(model.layers.self_attn.q_proj.lora_b[...])
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight"
        np.testing.assert_array_equal(tensors[name], lora_b[i].T)
    assert len(done("inspect", tmp_path / "a", "--json")["layers"]) == 1
    status, _, errors = run("convert", tmp_path / "a", tmp_path / "q", "--names", "identity")
    assert status == 1 and "has 1 stack axes, the name map 0" in errors
    # Without the model nothing says which axes are stack axes.
    save(tmp_path / "bare", config, dora.get_adapters(model))
    for args in (
        ("convert", tmp_path / "bare", tmp_path / "q", "--names", "llama"),
        ("inspect", tmp_path / "bare"),
        ("diff", tmp_path / "bare", tmp_path / "a"),
    ):
        status, _, errors = run(*args)
        assert status and "layers.self_attn.q_proj: the adapters were saved without" in errors
        assert "save(path, model" in errors


def test_another_base_is_refused_unless_it_is_meant(llama_adapter, tmp_path, run, done):
    done("convert", llama_adapter, tmp_path / "orbax", "--names", "llama", "--base", LLAMA_BASE)
    other = tmp_path / "other"
    shutil.copytree(LLAMA_BASE, other)
    for file in other.glob("*.safetensors"):
        save_file({k: x * np.asarray(1.5, x.dtype) for k, x in load_file(file).items()}, file)
    merge = ("merge", other, tmp_path / "orbax", tmp_path / "merged", "--names", "llama")
    status, out, errors = run(*merge)
    assert status == 1 and not out and errors.count("\n") == 1
    assert "up_proj: the adapter was trained for another base" in errors
    assert "pass --allow-base-mismatch" in errors
    assert not (tmp_path / "merged").exists()
    done(*merge, "--allow-base-mismatch")
    status, _, errors = run(
        "convert", tmp_path / "orbax", tmp_path / "p", *merge[-2:], "--base", other
    )
    assert status == 1 and "another base" in errors
    status, _, errors = run("merge", FIXTURES / "bert" / "bert_tiny", llama_adapter, tmp_path / "m")
    assert status == 1 and "no tensor model.layers" in errors
    assert not (tmp_path / "m").exists()


def test_a_converted_adapter_loads_into_a_model_without_a_warning(tmp_path, done):
    base = filled(chain)
    tensors = {
        f"layer_{i}.weight": np.asarray(getattr(base, f"layer_{i}").kernel[...]).T for i in (0, 1)
    }
    write_peft(tmp_path / "peft", tensors, {"layer_0": 2, "layer_1": 3}, np.random.default_rng(0))
    (tmp_path / "base").mkdir()
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()},
        tmp_path / "base" / "model.safetensors",
    )
    args = ("convert", tmp_path / "peft", tmp_path / "orbax", "--names", "identity")
    done(*args, "--base", tmp_path / "base")
    loaded = load(tmp_path / "orbax", base)
    assert loaded.layer_1.lora_a.shape == (40, 3)


class Table(nnx.Module):
    def __init__(self, rngs):
        self.wte = nnx.Embed(6, 6, rngs=rngs)


def test_a_square_table_is_told_from_a_dense_layer_by_its_name(tmp_path, done):
    config = dora.DoRAConfig(rank=2, target_modules=["wte"])
    model = trained(config, Table)
    save(tmp_path / "a", model, config)
    (tmp_path / "base").mkdir()
    table = np.asarray(model.wte.embedding[...])
    save_file({"wte.weight": table}, tmp_path / "base" / "model.safetensors")
    base = ("--base", tmp_path / "base")
    done("convert", tmp_path / "a", tmp_path / "p", "--names", "identity", *base)
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.wte.lora_embedding_A"], np.asarray(model.wte.lora_a[...]).T
    )
