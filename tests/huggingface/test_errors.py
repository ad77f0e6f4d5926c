"""Checkpoint folders that are damaged, or are not those of the model: all is named at once."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dora_jax.huggingface import CheckpointError, TensorRules, load_checkpoint
from dora_jax.huggingface.files import open_folder
from dora_jax.names import NameMap, NameMapError
from tests.support.checkpoints import (
    NAMES,
    VOCAB,
    WIDTH,
    abstract,
    problems_of,
    tensors,
    write,
)


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    stored = tensors()
    del stored["h.1.up.bias"]
    stored["h.3.up.bias"] = np.zeros(WIDTH, np.float32)
    stored["wte.weight"] = np.zeros((VOCAB + 1, WIDTH), np.float32)
    stored["h.0.up.bias"] = np.zeros(WIDTH, np.int8)
    stored["h.2.up.weight"][1, 2] = np.inf
    stored["h.2.norm.weight"][0] = np.nan
    for stacked in (False, True):
        for files in (1, 3):
            shutil.rmtree(tmp_path, ignore_errors=True)
            found = problems_of(write(tmp_path, stored, files), abstract(stacked))
            wanted = {
                "h.1.up.bias": "missing",
                "h.3.up.bias": "no parameter of the model",
                "wte.weight": "shape (11, 8), but the model's configuration makes it (10, 8)",
                "h.0.up.bias": "dtype I8",
                "h.2.up.weight": "NaN or infinity as float32",
                "h.2.norm.weight": "NaN or infinity",
            }
            assert found.keys() == wanted.keys()
            for name, message in wanted.items():
                assert message in found[name]


def test_what_a_narrower_dtype_cannot_hold_is_named(tmp_path):
    stored = tensors()
    stored["h.1.up.bias"][3] = 1e6
    found = problems_of(write(tmp_path, stored), abstract(param_dtype=jnp.float16))
    assert list(found) == ["h.1.up.bias"] and "as float16" in found["h.1.up.bias"]


def test_a_truncated_or_missing_file_of_several_is_named_with_all_else(tmp_path):
    stored = tensors()
    stored["h.9.up.bias"] = np.zeros(3, np.float32)
    write(tmp_path, stored, 4)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    found = problems_of(tmp_path)
    assert "truncated or damaged" in found[first.name] and "It has 3 of" in found[first.name]
    assert "missing" in found[second.name]
    assert "no parameter" in found["h.9.up.bias"] and len(found) == 3


def test_a_file_that_is_cut_after_its_header_was_read_is_named(tmp_path):

    write(tmp_path, tensors())
    stored = open_folder(tmp_path).tensors
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        for tensor in stored.values():
            tensor.read()


def test_a_file_of_no_bytes_is_damaged(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        open_folder(tmp_path)


def test_integers_are_read_and_unknown_dtypes_refused(tmp_path):
    stored = {"ids": np.arange(5), "flags": np.array([True, False])}
    tensors = open_folder(write(tmp_path, stored)).tensors
    for name, value in stored.items():
        np.testing.assert_array_equal(tensors[name].read(), value)
    unknown = dataclasses.replace(tensors["ids"], dtype="F4")
    with pytest.raises(CheckpointError, match=r"ids in .* has dtype F4, which cannot be read"):
        unknown.read()


def test_an_index_that_lies_is_refused(tmp_path):
    index = write(tmp_path, tensors(), 2) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = {**content["weight_map"], "wte.weight": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": moved}))
    assert "not in model-00002" in problems_of(tmp_path)["wte.weight"]
    outside = {"weight_map": {**content["weight_map"], "wte.weight": "../secret.safetensors"}}
    for text in ("{", "[]", "{}", '{"weight_map": {}}', json.dumps(outside)):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            load_checkpoint(tmp_path, abstract(), NAMES)


def test_a_tensor_in_two_files_is_named(tmp_path):
    write(tmp_path, tensors(), 2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    assert "Delete one of them" in problems_of(tmp_path)["wte.weight"]


def test_renamed_unused_and_tied_tensors(tmp_path, caplog):
    stored = {f"model.{key}": value for key, value in tensors().items()}
    stored["model.pooler.weight"] = np.zeros(3, np.int8)
    stored["model.lm_head.weight"] = stored["model.wte.weight"][:2].copy()
    folder = write(tmp_path, stored)
    rules = TensorRules(lambda key: key.removeprefix("model."), {r"pooler\..*": "the pooler"})
    with caplog.at_level(logging.INFO, "dora_jax"):
        load_checkpoint(folder, abstract(), NAMES, rules=rules)
    assert [record.args for record in caplog.records] == [("model.pooler.weight", "the pooler")]
    assert len(problems_of(folder, rules=TensorRules(rules.rename))) == 1
    stored["lm_head.weight"] = stored["model.lm_head.weight"]
    assert "holds the same parameter" in "".join(
        problems_of(write(tmp_path, stored), rules=rules).values()
    )


def test_a_tied_tensor_may_be_missing_or_equal_and_nothing_else(tmp_path):
    stored = tensors()
    rules = TensorRules(tied={"h.2.norm.weight": "h.0.norm.weight", "out.weight": "wte.weight"})
    del stored["h.2.norm.weight"]
    model = load_checkpoint(write(tmp_path, stored), abstract(), NAMES, rules=rules)
    np.testing.assert_array_equal(model.layers[2].norm.scale[...], stored["h.0.norm.weight"])
    stored["out.weight"] = stored["wte.weight"].copy()
    load_checkpoint(write(tmp_path, stored), abstract(), NAMES, rules=rules)
    stored["out.weight"][1, 1] += 1
    found = problems_of(write(tmp_path, stored), rules=rules)
    assert list(found) == ["out.weight"] and "differs from wte.weight" in found["out.weight"]


def test_a_module_that_the_map_lacks_is_named(tmp_path):
    with pytest.raises(NameMapError, match="head"):
        load_checkpoint(write(tmp_path, tensors()), abstract(), NameMap({"embed": "wte"}))
