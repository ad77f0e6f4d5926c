"""Agreement with Hugging Face's own models, whose activations are in tests/fixtures/{bert,llama}.

`python tests/fixtures/make_bert_fixtures.py` and `make_llama_fixtures.py` make the fixtures anew.
"""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from experiments.models.bert import BertEncoder
from experiments.models.bert_classifier import masked_mean
from experiments.models.huggingface import (
    CheckpointError,
    load_bert,
    load_llama,
    save_bert,
    save_llama,
)
from experiments.tasks.download import DownloadError, minilm_folder

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "bert"
MODELS = pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny"])
KERNEL = "encoder.layer.0.intermediate.dense.weight"
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


LLAMA_FIXTURES = FIXTURES.with_name("llama")
LLAMAS = pytest.mark.parametrize("name", sorted(path.name for path in LLAMA_FIXTURES.iterdir()))

apply = nnx.jit(lambda model, *inputs: model(*inputs))
hidden_states = nnx.jit(BertEncoder.hidden_states)


def bare(key):
    return key.removeprefix("bert.").removeprefix("roberta.")


def rewritten(tmp_path, name, change):
    """A copy of a fixture's folder whose tensors are `change(tensors)`, prefixes taken off."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    shutil.copy(FIXTURES / name / "config.json", folder)
    tensors = load_file(FIXTURES / name / "model.safetensors")
    save_file(change({bare(k): v for k, v in tensors.items()}), folder / "model.safetensors")
    return folder


def assert_agrees(encoder, name):
    """Every hidden state equals Hugging Face's to 1e-5, with and without padding and types."""
    expected = load_file(FIXTURES / name / "activations.safetensors")
    ids, types = expected["input_ids"], expected["token_type_ids"]
    padded, mask = expected["padded_input_ids"], expected["attention_mask"]
    inputs = {"": (ids, None, None), "_typed": (ids, None, types), "_padded": (padded, mask, types)}
    for suffix, (tokens, attended, segments) in inputs.items():
        states = np.stack(hidden_states(encoder, tokens, attended, segments))
        np.testing.assert_allclose(states, expected[f"hidden_states{suffix}"], atol=1e-5, rtol=0)


@MODELS
def test_every_hidden_state_equals_hugging_faces(name):
    assert_agrees(load_bert(FIXTURES / name), name)


@MODELS
@pytest.mark.parametrize("prefix", ["", "bert.", "roberta."])
@pytest.mark.parametrize("old", [False, True], ids=["weight", "gamma"])
def test_names_with_and_without_prefix_old_and_new_give_one_model(tmp_path, name, prefix, old):
    def rename(key):
        for new_name, old_name in OLD_NAMES.items() if old else ():
            key = key.replace(new_name, old_name)
        return prefix + key

    folder = rewritten(tmp_path, name, lambda t: {rename(k): v for k, v in t.items()})
    loaded, expected = (nnx.state(load_bert(path)) for path in (folder, FIXTURES / name))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_fixtures_hold_both_kinds_of_names_and_what_is_not_used(caplog):
    bert = load_file(FIXTURES / "bert_tiny" / "model.safetensors")
    roberta = load_file(FIXTURES / "roberta_tiny" / "model.safetensors")
    assert f"bert.{KERNEL}" in bert and "cls.predictions.bias" in bert
    assert KERNEL in roberta and "pooler.dense.weight" in roberta
    with caplog.at_level(logging.INFO, "dora_jax"):
        load_bert(FIXTURES / "bert_tiny")
    unused = {key for key in bert if "encoder." not in key and "embeddings." not in key}
    assert len(unused) > 5
    assert {record.args[0] for record in caplog.records} == unused


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_stored_float_dtype_is_cast_to_param_dtype(tmp_path, stored):
    folder = rewritten(tmp_path, "bert_tiny", lambda t: {k: v.astype(stored) for k, v in t.items()})
    tensors = load_file(folder / "model.safetensors")
    for param_dtype in (jnp.float32, jnp.bfloat16):
        encoder = load_bert(folder, param_dtype=param_dtype)
        kernel = encoder.layers[0].intermediate.kernel[...]
        assert kernel.dtype == param_dtype
        np.testing.assert_array_equal(kernel, tensors[KERNEL].T.astype(param_dtype))


def test_bfloat16_compute_gives_bfloat16_near_hugging_faces():
    expected = load_file(FIXTURES / "bert_tiny" / "activations.safetensors")
    hidden = apply(load_bert(FIXTURES / "bert_tiny", dtype=jnp.bfloat16), expected["input_ids"])
    assert hidden.dtype == jnp.bfloat16
    error = hidden.astype(np.float32) - expected["hidden_states"][-1]
    assert np.abs(error).mean() < 0.02  # hidden states are of size 1


def test_every_parameter_is_filled_and_the_model_trains():
    encoder = load_bert(FIXTURES / "bert_tiny", rngs=nnx.Rngs(dropout=0))
    tokens = np.array([[2, 7, 9, 3]])
    grads = nnx.jit(nnx.grad(lambda model: (model(tokens) ** 2).mean()))(encoder)
    reached = sum(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    # The key's bias moves all logits of a query alike, which softmax does not see.
    assert reached >= len(jax.tree.leaves(grads)) - encoder.config.num_hidden_layers
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(encoder)))
    encoder.train()
    first, second = apply(encoder, tokens), apply(encoder, tokens)
    assert not np.allclose(first, second)


def test_dropout_rate_replaces_both_rates_and_no_stream_is_needed_without():
    encoder = load_bert(FIXTURES / "bert_tiny", dropout_rate=0.0)
    tokens = np.array([[2, 7, 9, 3]])
    expected = apply(encoder, tokens)
    encoder.train()
    np.testing.assert_array_equal(apply(encoder, tokens), expected)
    dropping = load_bert(FIXTURES / "bert_tiny")
    dropping.train()
    with pytest.raises(ValueError, match="rngs"):
        apply(dropping, tokens)


def test_a_loaded_model_has_the_structure_of_a_made_one():
    loaded = load_bert(FIXTURES / "roberta_tiny", rngs=nnx.Rngs(0))
    made = nnx.eval_shape(lambda: BertEncoder(loaded.config, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(loaded) == nnx.graphdef(made)


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    def spoil(tensors):
        tensors["encoder.layer.7.output.dense.weight"] = np.zeros((2, 2), np.float32)
        tensors["embeddings.word_embeddings.weight"] = np.zeros((99, 32), np.float32)
        tensors["bert.embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"]
        tensors["encoder.layer.0.output.dense.bias"] = np.zeros(32, np.int8)
        tensors["encoder.layer.1.output.dense.bias"] = np.full(32, np.nan, np.float32)
        tensors[KERNEL] = tensors[KERNEL].T.copy()
        del tensors["encoder.layer.1.attention.self.value.bias"]
        return tensors

    folder = rewritten(tmp_path, "bert_tiny", spoil)
    with pytest.raises(CheckpointError) as caught:
        load_bert(folder)
    file, *problems = str(caught.value).splitlines()
    assert str(folder / "model.safetensors") in file
    expected = {
        "encoder.layer.7.output.dense.weight": "no parameter of the model",
        "embeddings.word_embeddings.weight": "shape (99, 32), but the model's configuration makes "
        "it (100, 32)",
        "bert.embeddings.LayerNorm.bias": "holds the same parameter",
        "encoder.layer.0.output.dense.bias": "dtype I8",
        "encoder.layer.1.output.dense.bias": "NaN or infinity",
        KERNEL: "shape (32, 64), but the model's configuration makes it (64, 32)",
        "encoder.layer.1.attention.self.value.bias": "missing",
    }
    found = dict(line.strip().split(": ", 1) for line in problems)
    # Which of two tensors for one parameter is the second one is the file's order.
    if "embeddings.LayerNorm.bias" in found:
        found["bert.embeddings.LayerNorm.bias"] = found.pop("embeddings.LayerNorm.bias")
    assert found.keys() == expected.keys()
    for key, message in expected.items():
        assert message in found[key]


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    folder = rewritten(tmp_path, "bert_tiny", dict)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_bert(folder)


def test_pickles_are_refused_and_missing_files_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_bert(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_bert(tmp_path)
    shutil.copy(FIXTURES / "bert_tiny" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_bert(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* pickle"):
        load_bert(tmp_path)


def test_a_saved_encoder_is_read_back_by_its_reader(tmp_path):
    encoder = load_bert(FIXTURES / "roberta_tiny")
    head = nnx.Linear(32, 3, rngs=nnx.Rngs(0))
    save_bert(encoder, tmp_path / "saved", source=FIXTURES / "roberta_tiny", head=head)
    save_bert(encoder, tmp_path / "saved", source=FIXTURES / "roberta_tiny", head=head)  # again
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    np.testing.assert_array_equal(tensors["classifier.weight"], head.kernel[...].T)
    read = nnx.state(load_bert(tmp_path / "saved"))
    jax.tree.map(np.testing.assert_array_equal, read, nnx.state(encoder))


def assert_logits_agree(model, name):
    """The logits equal Hugging Face's to 1e-5, with and without padding."""
    expected = load_file(LLAMA_FIXTURES / name / "activations.safetensors")
    logits = apply(model, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)
    mask = expected["attention_mask"]
    padded = apply(model, expected["padded_input_ids"], mask)[mask == 1]
    np.testing.assert_allclose(padded, expected["logits_padded"][mask == 1], atol=1e-5, rtol=0)


@LLAMAS
def test_logits_equal_hugging_faces(name):
    assert_logits_agree(load_llama(LLAMA_FIXTURES / name), name)


def test_logits_of_scanned_layers_equal_hugging_faces():
    assert_logits_agree(load_llama(LLAMA_FIXTURES / "llama3", scan_layers=True), "llama3")


@LLAMAS
@pytest.mark.parametrize("scan_layers", [False, True], ids=["numbered", "scanned"])
def test_a_saved_decoder_has_the_tensors_that_were_read(tmp_path, name, scan_layers):
    model = load_llama(
        LLAMA_FIXTURES / name, scan_layers=scan_layers, param_dtype=jnp.bfloat16, remat=True
    )
    save_llama(model, tmp_path, source=LLAMA_FIXTURES / name, max_file_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    saved, source = (
        {
            key: value.astype(np.float32)
            for file in folder.glob("model*.safetensors")
            for key, value in load_file(file).items()
        }
        for folder in (tmp_path, LLAMA_FIXTURES / name)
    )
    assert saved.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    config, original = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path, LLAMA_FIXTURES / name)
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


def test_a_merged_decoder_is_the_same_when_read_back(tmp_path):
    tokens = load_file(LLAMA_FIXTURES / "tied" / "activations.safetensors")["input_ids"]
    base = load_llama(LLAMA_FIXTURES / "tied", scan_layers=True)
    merged = trained(base)
    save_llama(merged, tmp_path, source=LLAMA_FIXTURES / "tied", max_file_bytes=30_000)
    for scan_layers in (False, True):
        read = apply(load_llama(tmp_path, scan_layers=scan_layers), tokens)
        np.testing.assert_allclose(read, apply(merged, tokens), atol=2e-6)
    assert np.abs(read - apply(base, tokens)).max() > 0.05


def test_a_decoder_saved_without_its_head_and_one_with_constants_are_read(tmp_path):
    tensors = load_file(LLAMA_FIXTURES / "tied" / "model.safetensors")
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    shutil.copy(LLAMA_FIXTURES / "tied" / "config.json", tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    assert_logits_agree(load_llama(tmp_path), "tied")


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    tensors = load_file(LLAMA_FIXTURES / "tied" / "model.safetensors")
    shutil.copy(LLAMA_FIXTURES / "tied" / "config.json", tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_logits_agree(load_llama(tmp_path), "tied")
    tensors["lm_head.weight"][5, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens"):
        load_llama(tmp_path)


def test_a_missing_head_is_named_where_it_is_not_tied(tmp_path):
    tensors = load_file(LLAMA_FIXTURES / "llama2" / "model.safetensors")
    del tensors["lm_head.weight"]
    shutil.copy(LLAMA_FIXTURES / "llama2" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load_llama(tmp_path)


def test_pretrained_minilm_equals_hugging_faces():
    try:
        folder = minilm_folder()
    except DownloadError as error:
        pytest.skip(f"the pretrained weights are neither cached nor to be had: {error}")
    expected = load_file(FIXTURES / "minilm_activations.safetensors")
    encoder = load_bert(folder)
    mask = expected["attention_mask"]
    hidden = apply(encoder, expected["input_ids"], mask, expected["token_type_ids"])
    features = hidden.shape[-1]
    assert features == 384
    np.testing.assert_allclose(hidden[..., :16], expected["hidden_slice"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        masked_mean(hidden, mask), expected["mean_pooled"], atol=1e-5, rtol=0
    )
