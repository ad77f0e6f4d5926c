"""Folders of other writers, and of models that are larger than ours."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.names import IDENTITY, NameMap
from dora_jax.peft import PeftError, read_adapters, save_pretrained
from tests.fuzz.mutations import LFS_POINTER
from tests.peft.small_models import (
    adapted,
    assert_trees_equal,
    drop_digest,
    edit_config,
    edit_tensors,
    plain,
)

FILE = "adapter_model.safetensors"
model, trained = functools.cache(plain), functools.cache(adapted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder as PEFT writes it, without a digest."""
    folder = tmp_path_factory.mktemp("peft") / "whole"
    save_pretrained(trained(), folder, IDENTITY)
    drop_digest(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize(
    "fields",
    [
        {"merge_weights": True, "enable_lora": None},
        {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
        {"use_qa_lora": False, "use_merged_linear": False, "swift_type": "LORA"},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
        {"unsloth_version": "2025.1", "torch_dtype": "float16", "transformers_version": "4.50.0"},
    ],
)
def test_fields_of_other_writers_that_change_nothing_pass(folder, fields):
    edit_config(folder, **fields)
    tree, config = read_adapters(model(), folder, IDENTITY)
    assert_trees_equal(tree, dora.get_adapters(trained()))
    assert (config.rank, config.alpha, config.target_modules) == (2, 16.0, ("down", "up"))


ENDLESS = "(([a-z0-9._]+)+)+!"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_lora": [True, False, True]}, "enable_lora=[True, False, True]"),
        ({"use_qa_lora": True}, "use_qa_lora=True"),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights=['gaussian']"),
        ({"target_modules": ENDLESS}, "which target_modules does not select"),
        ({"exclude_modules": "(" * 5000}, "exclude_modules in adapter_config.json"),
        ({"exclude_modules": ENDLESS}, ""),
        ({"rank_pattern": {ENDLESS: 2}}, ""),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern in adapter_config.json: '('"),
        ({"layers_to_transform": [0], "layers_pattern": ENDLESS}, ""),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern in"),
        ({"modules_to_save": [ENDLESS]}, ""),
        ({"modules_to_save": ["("]}, "modules_to_save in adapter_config.json"),
        ({"modules_to_save": "x" * 100_000}, "modules_to_save in adapter_config.json"),
        ({"rank_pattern": {f"{i}." * 1000: 2 for i in range(100)}}, "rank_pattern in adapter"),
        ({"r": 10**400}, "r in adapter_config.json"),
        ({"lora_alpha": 10**400}, "lora_alpha in adapter_config.json"),
    ],
)
def test_hostile_fields_end_and_are_named(folder, fields, message):
    """Those that match nothing change nothing, as in PEFT."""
    edit_config(folder, **fields)
    if message:
        with pytest.raises(PeftError, match=re.escape(message)):
            read_adapters(model(), folder, IDENTITY)
    else:
        tree, _ = read_adapters(model(), folder, IDENTITY)
        assert_trees_equal(tree, dora.get_adapters(trained()))


class Classifier(nnx.Module):
    """An encoder inside a model with a head, as Hugging Face's classifiers are."""

    def __init__(self, rngs):
        self.bert = nnx.Dict(up=nnx.Linear(5, 8, rngs=rngs), down=nnx.Linear(8, 4, rngs=rngs))
        self.classifier = nnx.Linear(4, 3, rngs=rngs)


def test_an_adapter_of_a_model_with_a_head_names_the_prefix_that_the_map_lacks(tmp_path):
    classifier = adapted(Classifier, modules_to_save=["classifier"])
    save_pretrained(classifier, tmp_path, IDENTITY)
    with pytest.raises(PeftError) as caught:
        read_adapters(model(), tmp_path, IDENTITY)
    message = str(caught.value)
    assert "bert.down" in message and "names.inside('', 'bert')" in message
    assert "unused" not in message
    inside = NameMap({"up": "up", "down": "down"}).inside("", "bert")
    with pytest.raises(
        PeftError, match=r"classifier.* is of classifier, .*unused=\['classifier'\]"
    ):
        read_adapters(model(), tmp_path, inside)
    tree, _ = read_adapters(model(), tmp_path, inside, unused=["classifier"])
    kept = load_file(tmp_path / FILE)["base_model.model.bert.up.lora_A.weight"]
    np.testing.assert_array_equal(tree["up"]["lora_a"], kept.T)
    with pytest.raises(PeftError, match="inside bert: correct the name map"):
        folder = tmp_path / "bare"
        save_pretrained(trained(), folder, IDENTITY)
        read_adapters(plain(Classifier), folder, IDENTITY)


def test_files_of_git_lfs_and_mlx_are_named_as_what_they_are(whole, tmp_path):
    def copy(name):
        return shutil.copytree(whole, tmp_path / name)

    for file in (FILE, "adapter_config.json"):
        pointer = copy(f"pointer {file}")
        (pointer / file).write_text(LFS_POINTER)
        with pytest.raises(PeftError, match=rf"{file} is a git-LFS pointer.*git lfs pull"):
            read_adapters(model(), pointer, IDENTITY)
    mlx = copy("mlx")
    save_file(load_file(mlx / FILE), mlx / FILE, metadata={"format": "mlx"})
    with pytest.raises(PeftError, match=f"{FILE} is a file of MLX"):
        read_adapters(model(), mlx, IDENTITY)
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 16}
    (mlx / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(PeftError, match=r"adapter_config.json is of an adapter of MLX"):
        read_adapters(model(), mlx, IDENTITY)


def test_the_name_of_a_tensor_has_an_end(folder):
    long = "base_model.model." + "up." * 100_000 + "lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({long: np.ones((2, 5), np.float32)}))
    with pytest.raises(PeftError, match=f"{FILE} is damaged .the name of a tensor has 3"):
        read_adapters(model(), folder, IDENTITY)
