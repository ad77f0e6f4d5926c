"""`dora-jax merge` writes the weights that PEFT computes with."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.folders import LLAMA_BASE, PEFT, PEFT_FOLDER, llama_base, peft_base, write_peft

FULL = ("attention", "llama", "llama_some")


def folded(weight, a, b, magnitude, scaling, kind):
    """Returns W' of a torch weight, in float64, from PEFT's tensors as their documentation says."""
    w, a, b = (np.asarray(x).astype(np.float64) for x in (weight, a, b))
    delta = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(
        b.shape[0], *a.shape[1:]
    )
    delta = scaling * (delta.T if kind in ("transposed", "embedding") else delta)
    v = w + delta
    if magnitude is None:
        return v
    inputs = (0,) if kind in ("transposed", "embedding") else tuple(range(1, w.ndim))
    n = np.sqrt(np.square(v).sum(inputs, keepdims=True))
    shape = [1 if i in inputs else size for i, size in enumerate(w.shape)]
    return np.asarray(magnitude).astype(np.float64).reshape(shape) * v / n


def expected_merge(base, adapter):
    """Returns the merged tensors, and the names of those that a PEFT folder changes."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged, changed = dict(base), set()
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        for part, kind in ((".lora_A.weight", "linear"), (".lora_embedding_A", "embedding")):
            if name.endswith(part):
                module = name.removesuffix(part)
                weight = base[f"{module}.weight"]
                b = tensors[key.replace("_A", "_B")]
                rank = a.shape[0]
                kind = "transposed" if kind == "linear" and config["fan_in_fan_out"] else kind
                alpha = next(
                    (
                        v
                        for k, v in config["alpha_pattern"].items()
                        if module.endswith(k.lstrip("^"))
                    ),
                    config["lora_alpha"],
                )
                scaling = alpha / (np.sqrt(rank) if config["use_rslora"] else rank)
                m = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
                merged[f"{module}.weight"] = folded(weight, a, b, m, scaling, kind)
                changed.add(f"{module}.weight")
        if "lora_" not in name and ".base_layer." not in name:
            merged[name] = a
            changed.add(name)
    return merged, changed


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n in FULL else n for n in PEFT]
)
def test_merge_gives_the_weights_that_peft_computes_with(name, tmp_path, done):
    base = peft_base(name, tmp_path / "base")
    adapter = PEFT_FOLDER / name
    expected, changed = expected_merge(base, adapter)
    report = done("merge", tmp_path / "base", adapter, tmp_path / "merged", "--json")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert set(report["merged"]) | set(report["replaced"]) == changed
    assert (tmp_path / "merged" / "config.json").exists()
    for key, x in merged.items():
        assert x.dtype == base[key].dtype
        if key in changed:
            np.testing.assert_allclose(x, expected[key], rtol=2e-6, atol=2e-7, err_msg=key)
        else:
            np.testing.assert_array_equal(x, base[key])


def test_merge_of_several_files_in_bfloat16(tmp_path, done, run):
    """The base is in three files, the result in more; the rounding loss is reported."""
    base = llama_base()
    adapter, rng = tmp_path / "adapter", np.random.default_rng(0)
    module, other = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"
    write_peft(adapter, base, {module: 4, other: 4}, rng)
    report = done(
        *("merge", LLAMA_BASE, adapter, tmp_path / "merged", "--max-file-bytes", 8000, "--json")
    )
    assert report["merged"] == sorted([f"{module}.weight", f"{other}.weight"])
    assert report["copied"] == len(base) - 2
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert (tmp_path / "merged" / "config.json").read_text() == (
        LLAMA_BASE / "config.json"
    ).read_text()
    expected, _ = expected_merge(base, adapter)
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    for name, x in merged.items():
        assert x.dtype == ml_dtypes.bfloat16
        close = dict(rtol=2**-8, atol=0) if name in report["merged"] else dict(rtol=0, atol=0)
        np.testing.assert_allclose(
            x.astype(np.float64), np.asarray(expected[name]).astype(np.float64), **close
        )
    assert 0 < report["rounded_away"][module] < 0.1
    status, out, _ = run("merge", LLAMA_BASE, adapter, tmp_path / "again")
    assert status == 0 and "rounds away up to" in out


@pytest.mark.parametrize(
    "fields, drop, message",
    [
        ({"r": 2}, None, "makes its rank 2: the two files do not belong together"),
        ({"use_dora": False}, None, "lora_magnitude_vector is there although use_dora is False"),
        ({}, "lora_magnitude_vector", "lora_magnitude_vector is missing"),
        ({}, "lora_B.weight", "lora_B.weight is missing"),
        ({"alpha_pattern": 3}, None, "alpha_pattern"),
    ],
)
def test_merge_refuses_files_that_do_not_belong_together(
    llama_adapter, tmp_path, run, fields, drop, message
):
    config = llama_adapter / "adapter_config.json"
    content = json.loads(config.read_text()) | {"rank_pattern": {}} | fields
    config.write_text(json.dumps(content))
    file = llama_adapter / "adapter_model.safetensors"
    tensors = {k: x for k, x in load_file(file).items() if drop is None or not k.endswith(drop)}
    # Only one rank, so that no other field is wrong.
    save_file({k: x for k, x in tensors.items() if ".layers.1." in k}, file)
    status, _, errors = run("merge", LLAMA_BASE, llama_adapter, tmp_path / "merged")
    assert status == 1 and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "bert",
            lambda base: base.update({"classifier.bias": np.zeros(4, np.float32)}),
            r"classifier.bias has shape \(3,\), in the base \(4,\)",
        ),
        (
            "tables",
            lambda base: base.update({"wte.weight": np.zeros((21, 8), np.float32)}),
            r"wte: the adapter has \(20,\) in and 8 out features, .* shape \(21, 8\)",
        ),
        (
            "llama",
            lambda base: base.update({"lm_head.weight": base["lm_head.weight"] + 1}),
            r"lm_head.base_layer.weight in the adapter is not lm_head.weight of the base",
        ),
    ],
)
def test_merge_refuses_another_base(name, change, message, tmp_path, run):
    base = peft_base(name, tmp_path / "base")
    change(base)
    save_file(base, tmp_path / "base" / "model.safetensors")
    args = ("merge", tmp_path / "base", PEFT_FOLDER / name, tmp_path / "merged")
    status, _, errors = run(*args)
    assert status == 1 and re.search(message, errors)
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_a_table_that_is_the_head_too(tmp_path, run):
    """PEFT leaves the head as it is, which in a merged folder would change with the table."""
    peft_base("tables", tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    args = ("merge", tmp_path / "base", PEFT_FOLDER / "tables", tmp_path / "merged")
    status, _, errors = run(*args)
    assert status == 1 and "the base's head uses the same table" in errors


def test_a_base_without_a_head_lacks_the_prefix_of_its_names(tmp_path, done):
    base = peft_base("bert", tmp_path / "base")
    bare = {key.removeprefix("bert."): x for key, x in base.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors")
    report = done("merge", tmp_path / "base", PEFT_FOLDER / "bert", tmp_path / "merged", "--json")
    assert report["merged"] and not any(name.startswith("bert.") for name in report["merged"])


def test_a_layer_that_is_not_transposed_is_merged_beside_transposed_ones(
    llama_adapter, tmp_path, done
):
    """`fan_in_fan_out` is one field for all layers; their shapes tell which are transposed."""
    file, merged = llama_adapter / "adapter_config.json", []
    config = json.loads(file.read_text())
    for name, transposed in (("one", False), ("other", True)):
        file.write_text(json.dumps({**config, "fan_in_fan_out": transposed}))
        done("merge", LLAMA_BASE, llama_adapter, tmp_path / name)
        merged.append(load_file(tmp_path / name / "model.safetensors"))
    key = "model.layers.0.mlp.up_proj.weight"
    one, other = (x[key] for x in merged)
    assert one.shape[0] != one.shape[1] and (one != llama_base()[key]).any()
    np.testing.assert_array_equal(one, other)
