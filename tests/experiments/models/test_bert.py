"""The encoder's own laws. Agreement with Hugging Face is in test_huggingface.py."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models.bert import BertConfig, BertEncoder, position_ids
from experiments.models.bert_classifier import BertClassifier, masked_mean
from experiments.models.config_file import ModelConfigError

BERT = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=12,
    initializer_range=0.3,  # attention far from uniform
)
ROBERTA = dataclasses.replace(BERT, model_type="roberta", type_vocab_size=1, pad_token_id=1)
CONFIGS = pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])

TOKENS = np.array([[5, 9, 30, 41, 7, 8], [5, 22, 6, 8, 33, 12]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


apply = nnx.jit(lambda model, *inputs: model(*inputs))
pool = nnx.jit(BertClassifier.features)


def padded(config):
    return np.where(MASK == 1, TOKENS, config.pad_token_id)


def stored_config(tmp_path, **changes):
    """Writes a config.json; a change to `...` leaves the field out."""
    fields = dataclasses.asdict(BERT) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return path


@CONFIGS
def test_padding_does_not_change_the_other_positions(config):
    encoder = BertEncoder(config, rngs=nnx.Rngs(0))
    alone = apply(encoder, TOKENS[1:, :4])
    batched = apply(encoder, padded(config), MASK)
    np.testing.assert_allclose(batched[1:, :4], alone, atol=1e-6)


@CONFIGS
def test_a_row_of_padding_alone_is_finite_in_value_and_gradient(config):
    model = BertClassifier(BertEncoder(config, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    tokens = np.full_like(TOKENS, config.pad_token_id)
    loss = nnx.value_and_grad(lambda model: model(tokens, np.zeros_like(MASK)).sum())
    value, grads = nnx.jit(loss)(model)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_every_position_attends_to_those_that_are_not_padding():
    layer = BertEncoder(BERT, rngs=nnx.Rngs(0)).layers[0]
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    jacobian = jax.jit(jax.jacobian(lambda x: layer(x, MASK[1:])))(x)
    reach = np.abs(jacobian[0, :, :, 0]).max(axis=(1, 3))  # (to, from)
    seen = np.broadcast_to(MASK[1] == 1, (6, 6)) | np.eye(6, dtype=bool)  # and the residual
    assert (reach[seen] > 1e-3).all()
    assert (reach[~seen] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_hidden_states_features_and_logits_have_the_compute_dtype(dtype):
    encoder = BertEncoder(BERT, dtype=dtype, rngs=nnx.Rngs(0))
    model = BertClassifier(encoder, 3, rngs=nnx.Rngs(1))
    outputs = nnx.eval_shape(
        lambda model: (
            model(TOKENS, MASK),
            model.features(TOKENS, MASK),
            model.encoder.hidden_states(TOKENS, MASK),
        ),
        model,
    )
    assert {output.dtype for output in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {parameter.dtype for parameter in parameters} == {jnp.dtype(jnp.float32)}


def test_bfloat16_stays_near_float32():
    exact, rounded = (
        apply(BertEncoder(BERT, dtype=dtype, rngs=nnx.Rngs(0)), TOKENS, MASK)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    # Hidden states are of size 1, bfloat16's spacing there is 2**-7; a few roundings add up.
    assert np.abs(exact - rounded.astype(np.float32)).max() < 0.1


def test_positions_of_roberta_follow_the_tokens_and_those_of_bert_do_not():
    tokens = np.array([[1, 5, 9, 1, 7, 1]])
    assert position_ids(tokens, ROBERTA).tolist() == [[1, 2, 3, 1, 4, 1]]
    assert position_ids(tokens, BERT).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_dropout_is_off_when_made_on_in_training_and_off_again():
    encoder = BertEncoder(BERT, rngs=nnx.Rngs(0))
    made = apply(encoder, TOKENS)
    encoder.train()
    first, second = apply(encoder, TOKENS), apply(encoder, TOKENS)
    encoder.eval()
    assert not np.allclose(made, first)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(apply(encoder, TOKENS), made)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_rate_acts_alone(rate):
    half: dict[str, Any] = {rate: 0.5}
    none = dataclasses.replace(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = BertEncoder(none, rngs=nnx.Rngs(0))
    expected = apply(encoder, TOKENS)
    encoder.train()
    np.testing.assert_array_equal(apply(encoder, TOKENS), expected)

    dropping = BertEncoder(dataclasses.replace(none, **half), rngs=nnx.Rngs(0))
    dropping.train()
    assert not np.allclose(apply(dropping, TOKENS), expected)


def test_mean_pooling_leaves_padding_out_and_cls_takes_the_first_token():
    encoder = BertEncoder(BERT, rngs=nnx.Rngs(0))
    hidden = np.asarray(apply(encoder, TOKENS, MASK))
    mean = BertClassifier(encoder, 2, rngs=nnx.Rngs(1))
    cls = BertClassifier(encoder, 2, pooling="cls", rngs=nnx.Rngs(1))
    expected = [hidden[0].mean(axis=0), hidden[1, :4].mean(axis=0)]
    np.testing.assert_allclose(pool(mean, TOKENS, MASK), expected, atol=1e-6)
    np.testing.assert_array_equal(pool(cls, TOKENS, MASK), hidden[:, 0])


def test_logits_are_the_linear_head_of_the_features():
    model = BertClassifier(BertEncoder(BERT, rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(1))
    model.classifier.bias = nnx.Param(jnp.arange(3.0))
    features = pool(model, TOKENS, MASK)
    expected = features @ model.classifier.kernel[...] + jnp.arange(3.0)
    np.testing.assert_allclose(apply(model, TOKENS, MASK), expected, atol=1e-6)
    model.encoder.eval()
    model.dropout.deterministic = False
    assert not np.allclose(apply(model, TOKENS, MASK), expected)


def test_mean_of_nothing_is_zero():
    assert masked_mean(jnp.ones((1, 3, 2)), jnp.zeros((1, 3))).tolist() == [[0.0, 0.0]]


def test_mean_of_bfloat16_is_rounded_once():
    hidden = jax.random.normal(jax.random.key(0), (4, 30, 16), jnp.bfloat16)
    mask = np.arange(30) < np.array([30, 17, 9, 3])[:, None]
    exact = [np.asarray(hidden[i, mask[i]], np.float32).mean(0) for i in range(4)]
    np.testing.assert_array_equal(masked_mean(hidden, mask), jnp.asarray(exact, jnp.bfloat16))


def test_projections_lie_at_their_documented_paths():
    two = dataclasses.replace(BERT, num_hidden_layers=2)
    model = BertClassifier(BertEncoder(two, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    paths = {
        ".".join(map(str, path))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Linear)
    }
    inside = ("attention.query", "attention.key", "attention.value", "attention.output")
    assert paths == {"classifier"} | {
        f"encoder.layers.{i}.{name}" for i in (0, 1) for name in (*inside, "intermediate", "output")
    }


def test_models_of_one_configuration_share_a_compiled_function():
    traced = []

    @nnx.jit
    def count(model):
        traced.append(model)
        return model(TOKENS)

    for seed in range(3):
        count(BertEncoder(BERT, rngs=nnx.Rngs(seed)))
    assert len(traced) == 1


@CONFIGS
def test_the_longest_sequence_is_the_last_with_a_position(config):
    encoder = BertEncoder(config, rngs=nnx.Rngs(0))
    full = np.full((1, config.max_tokens), 7)
    assert np.isfinite(apply(encoder, full)).all()
    assert position_ids(full, config).max() == config.max_position_embeddings - 1
    with pytest.raises(ValueError, match=f"positions for {config.max_tokens}: truncate"):
        encoder(np.full((1, config.max_tokens + 1), 7))


def test_inputs_of_other_shapes_are_refused_by_name():
    encoder = BertEncoder(BERT, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, seq\)"):
        encoder(TOKENS[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 6\)"):
        encoder(TOKENS, MASK[:1])
    with pytest.raises(ValueError, match=r"token_type_ids has shape \(2, 5\)"):
        encoder(TOKENS, MASK, MASK[:, :5])
    with pytest.raises(ValueError, match="pooling must be one of"):
        BertClassifier(encoder, 2, pooling="max", rngs=nnx.Rngs(0))  # type: ignore[arg-type]


def test_config_survives_json_and_optional_fields_fall_back(tmp_path):
    assert BertConfig.from_json(stored_config(tmp_path)) == BERT
    bare = stored_config(tmp_path, layer_norm_eps=..., hidden_dropout_prob=..., pad_token_id=None)
    assert BertConfig.from_json(bare) == dataclasses.replace(BERT, hidden_dropout_prob=0.1)
    roberta = stored_config(tmp_path, model_type="roberta", pad_token_id=...)
    assert BertConfig.from_json(roberta).pad_token_id == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ..., "hidden_size": ...}, "missing model_type, hidden_size"),
        ({"model_type": "deberta"}, "model_type 'deberta' is not implemented"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not implemented"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is implemented"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_attention_heads": 5}, "hidden_size 16 is not a multiple"),
        ({"vocab_size": "50"}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be a number"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob must lie in \[0, 1\)"),
        ({"model_type": "roberta", "pad_token_id": 20}, "leaves no position"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_that_cannot_be_served_is_refused_with_its_file(tmp_path, changes, message):
    path = stored_config(tmp_path, **changes)
    with pytest.raises(ModelConfigError, match=message) as caught:
        BertConfig.from_json(path)
    assert str(path) in str(caught.value)


def test_config_file_that_is_missing_or_not_json_is_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="a Hugging Face checkpoint folder holds"):
        BertConfig.from_json(path)
    path.write_text('{"model_type": "bert", ')
    with pytest.raises(ModelConfigError, match="not valid JSON"):
        BertConfig.from_json(path)
    path.write_text("[1, 2]")
    with pytest.raises(ModelConfigError, match="one JSON object"):
        BertConfig.from_json(path)
