"""Agreement with Hugging Face's own encoders, whose activations are in tests/fixtures/bert.

`python tests/fixtures/make_bert_fixtures.py` makes the fixtures anew.
"""

from __future__ import annotations

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

from experiments.models.bert import BertEncoder
from experiments.models.bert_classifier import masked_mean
from experiments.models.huggingface import CheckpointError, load_bert, save_bert

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "bert"
MODELS = pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny"])
KERNEL = "encoder.layer.0.intermediate.dense.weight"
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


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


@pytest.mark.rows(1)
@MODELS
def test_every_hidden_state_equals_hugging_faces(name):
    """To 1e-5, with and without padding and token types."""
    encoder = load_bert(FIXTURES / name)
    expected = load_file(FIXTURES / name / "activations.safetensors")
    ids, types = expected["input_ids"], expected["token_type_ids"]
    padded, mask = expected["padded_input_ids"], expected["attention_mask"]
    inputs = {
        "": (ids, np.ones_like(mask), np.zeros_like(types)),
        "_typed": (ids, np.ones_like(mask), types),
        "_padded": (padded, mask, types),
    }
    for suffix, arrays in inputs.items():
        states = np.stack(hidden_states(encoder, *arrays))
        np.testing.assert_allclose(states, expected[f"hidden_states{suffix}"], atol=1e-5, rtol=0)


def test_without_a_mask_and_types_nothing_is_padding_and_every_type_is_0():
    encoder = load_bert(FIXTURES / "bert_tiny")
    expected = load_file(FIXTURES / "bert_tiny" / "activations.safetensors")
    last = apply(encoder, expected["input_ids"])
    np.testing.assert_allclose(last, expected["hidden_states"][-1], atol=1e-5, rtol=0)


@pytest.mark.rows(2)
@MODELS
@pytest.mark.parametrize(
    ("prefix", "old"),
    [("", True), ("bert.", False), ("roberta.", True)],
    ids=["gamma", "bert.weight", "roberta.gamma"],
)
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


@pytest.mark.rows(1)
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_stored_float_dtype_is_cast_to_param_dtype(tmp_path, stored):
    folder = rewritten(tmp_path, "bert_tiny", lambda t: {k: v.astype(stored) for k, v in t.items()})
    tensors = load_file(folder / "model.safetensors")
    for param_dtype in (jnp.float32, jnp.bfloat16):
        encoder = load_bert(folder, param_dtype=param_dtype)
        kernel = encoder.layers[0].intermediate.kernel[...]
        assert kernel.dtype == param_dtype
        np.testing.assert_array_equal(kernel, tensors[KERNEL].T.astype(param_dtype))


@pytest.mark.full
def test_bfloat16_compute_gives_bfloat16_near_hugging_faces():
    expected = load_file(FIXTURES / "bert_tiny" / "activations.safetensors")
    hidden = apply(load_bert(FIXTURES / "bert_tiny", dtype=jnp.bfloat16), expected["input_ids"])
    assert hidden.dtype == jnp.bfloat16
    error = hidden.astype(np.float32) - expected["hidden_states"][-1]
    assert np.abs(error).mean() < 0.02  # hidden states are of size 1


@pytest.mark.full
def test_every_parameter_is_filled_and_the_model_trains():
    encoder = load_bert(FIXTURES / "bert_tiny")
    ids = load_file(FIXTURES / "bert_tiny" / "activations.safetensors")["input_ids"]
    grads = nnx.jit(nnx.grad(lambda model: (model(ids) ** 2).mean()))(encoder)
    reached = sum(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    # The key's bias moves all logits of a query alike, which softmax does not see.
    assert reached >= len(jax.tree.leaves(grads)) - encoder.config.num_hidden_layers
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(encoder)))


def test_dropout_needs_a_stream_and_its_rate_replaces_both_rates():
    ids = load_file(FIXTURES / "bert_tiny" / "activations.safetensors")["input_ids"]
    plain, without = (load_bert(FIXTURES / "bert_tiny", dropout_rate=rate) for rate in (None, 0.0))
    expected = apply(plain, ids)
    without.train()
    np.testing.assert_allclose(apply(without, ids), expected, atol=1e-6)
    plain.train()
    with pytest.raises(ValueError, match="rngs"):
        nnx.eval_shape(lambda model: model(ids), plain)
    stream = nnx.Rngs(dropout=jax.random.key(0, impl="unsafe_rbg"))  # its programs compile fastest
    dropping = load_bert(FIXTURES / "bert_tiny", rngs=stream)
    dropping.train()
    assert not np.allclose(apply(dropping, ids), apply(dropping, ids))


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


def test_pretrained_minilm_equals_hugging_faces(minilm):
    expected = load_file(FIXTURES / "minilm_activations.safetensors")
    mask = expected["attention_mask"]
    hidden = apply(load_bert(minilm), expected["input_ids"], mask, expected["token_type_ids"])
    assert hidden.shape[-1] == 384
    np.testing.assert_allclose(hidden[..., :16], expected["hidden_slice"], atol=1e-5, rtol=0)
    mean = masked_mean(hidden, mask)
    np.testing.assert_allclose(mean, expected["mean_pooled"], atol=1e-5, rtol=0)
