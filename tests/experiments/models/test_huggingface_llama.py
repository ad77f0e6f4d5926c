"""Agreement with Hugging Face's own decoders, whose activations are in tests/fixtures/llama.

`python tests/fixtures/make_llama_fixtures.py` makes the fixtures anew.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from experiments.models.huggingface import CheckpointError, load_llama, save_llama

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "llama"
LLAMAS = pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))

apply = nnx.jit(lambda model, *inputs: model(*inputs))


def assert_logits_agree(model, name):
    """The logits equal Hugging Face's to 1e-5, with and without padding."""
    expected = load_file(FIXTURES / name / "activations.safetensors")
    mask = expected["attention_mask"]
    logits = apply(model, expected["input_ids"], np.ones_like(mask))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)
    padded = apply(model, expected["padded_input_ids"], mask)[mask == 1]
    np.testing.assert_allclose(padded, expected["logits_padded"][mask == 1], atol=1e-5, rtol=0)


@pytest.mark.rows(3)
@LLAMAS
def test_logits_equal_hugging_faces(name):
    assert_logits_agree(load_llama(FIXTURES / name), name)


def test_logits_of_scanned_layers_equal_hugging_faces():
    assert_logits_agree(load_llama(FIXTURES / "llama3", scan_layers=True), "llama3")


@pytest.mark.rows(4)
@LLAMAS
@pytest.mark.parametrize("scan_layers", [False, True], ids=["numbered", "scanned"])
def test_a_saved_decoder_has_the_tensors_that_were_read(tmp_path, name, scan_layers):
    model = load_llama(
        FIXTURES / name, scan_layers=scan_layers, param_dtype=jnp.bfloat16, remat=True
    )
    save_llama(model, tmp_path, source=FIXTURES / name, max_file_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    saved, source = (
        {
            key: value.astype(np.float32)
            for file in folder.glob("model*.safetensors")
            for key, value in load_file(file).items()
        }
        for folder in (tmp_path, FIXTURES / name)
    )
    assert saved.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    config, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURES / name)
    )
    assert config == original | {"dtype": "bfloat16"}


def trained(model):
    """The model with adapters as if trained, merged."""
    config = dora.DoRAConfig(rank=2, target_modules=["q_proj", "down_proj"])
    model = dora.apply_dora(model, config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), dora.get_adapters(model))
    dora.set_adapters(model, tree)
    return dora.merge(model)


@pytest.mark.full
def test_a_merged_decoder_is_the_same_when_read_back(tmp_path):
    tokens = load_file(FIXTURES / "tied" / "activations.safetensors")["input_ids"]
    base = load_llama(FIXTURES / "tied", scan_layers=True)
    merged = trained(base)
    save_llama(merged, tmp_path, source=FIXTURES / "tied", max_file_bytes=30_000)
    for scan_layers in (False, True):
        read = apply(load_llama(tmp_path, scan_layers=scan_layers), tokens)
        np.testing.assert_allclose(read, apply(merged, tokens), atol=2e-6)
    assert np.abs(read - apply(base, tokens)).max() > 0.05


def test_a_decoder_saved_without_its_head_and_one_with_constants_are_read(tmp_path):
    tensors = load_file(FIXTURES / "tied" / "model.safetensors")
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    shutil.copy(FIXTURES / "tied" / "config.json", tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    assert_logits_agree(load_llama(tmp_path), "tied")


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    tensors = load_file(FIXTURES / "tied" / "model.safetensors")
    shutil.copy(FIXTURES / "tied" / "config.json", tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_logits_agree(load_llama(tmp_path), "tied")
    tensors["lm_head.weight"][5, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens"):
        load_llama(tmp_path)


def test_a_missing_head_is_named_where_it_is_not_tied(tmp_path):
    tensors = load_file(FIXTURES / "llama2" / "model.safetensors")
    del tensors["lm_head.weight"]
    shutil.copy(FIXTURES / "llama2" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load_llama(tmp_path)
