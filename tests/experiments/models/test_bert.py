"""The encoder's own laws. Agreement with Hugging Face is in test_huggingface.py."""

from __future__ import annotations

import dataclasses
import functools
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
from tests.experiments.tiny_models import BERT, filled

ROBERTA = dataclasses.replace(BERT, model_type="roberta", type_vocab_size=1, pad_token_id=1)
CONFIGS = pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])

TOKENS = np.array([[5, 9, 30, 41, 7, 8], [5, 22, 6, 8, 33, 12]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


apply = nnx.jit(lambda model, *inputs: model(*inputs))
pool = nnx.jit(BertClassifier.features)


def encoder_of(config, **options):
    return filled(lambda: BertEncoder(config, **options, rngs=nnx.Rngs(0)))


@functools.cache
def made(config, **options):
    """An encoder that the tests share; none may change it."""
    return encoder_of(config, **options)


def classifier_of(num_classes, **options):
    def make():
        encoder = BertEncoder(BERT, rngs=nnx.Rngs(0))
        return BertClassifier(encoder, num_classes, **options, rngs=nnx.Rngs(0))

    return filled(make)


def padded(config):
    return np.where(MASK == 1, TOKENS, config.pad_token_id)


def stored_config(tmp_path, **changes):
    """Writes a config.json; a change to `...` leaves the field out."""
    fields = dataclasses.asdict(BERT) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return path


@pytest.mark.rows(1)
@CONFIGS
def test_padding_does_not_change_the_other_positions(config):
    alone = apply(made(config), TOKENS[1:, :4])
    batched = apply(made(config), padded(config), MASK)
    np.testing.assert_allclose(batched[1:, :4], alone, atol=2e-6)


def test_a_row_of_padding_alone_is_finite_in_value_and_gradient():
    tokens = np.full_like(TOKENS, BERT.pad_token_id)
    loss = nnx.value_and_grad(lambda model: model(tokens, np.zeros_like(MASK)).sum())
    value, grads = nnx.jit(loss)(classifier_of(2))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_every_position_attends_to_those_that_are_not_padding():
    layer = made(BERT).layers[0]
    x = np.random.default_rng(1).normal(size=(6, 16))
    changed = np.where(np.eye(6)[:, :, None], -x, x)  # in row i, position i
    y = apply(layer, np.concatenate([x[None], changed]).astype(np.float32), MASK[1:].repeat(7, 0))
    reach = np.abs(y[1:] - y[0]).max(-1).T  # (to, from)
    seen = np.broadcast_to(MASK[1] == 1, (6, 6)) | np.eye(6, dtype=bool)  # and the residual
    assert (reach[seen] > 1e-3).all()
    assert (reach[~seen] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_hidden_states_features_and_logits_have_the_compute_dtype(dtype):
    def make():
        encoder = BertEncoder(BERT, dtype=dtype, rngs=nnx.Rngs(0))
        return BertClassifier(encoder, 3, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(make)
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


@pytest.mark.full
def test_bfloat16_stays_near_float32():
    exact = apply(made(BERT), padded(BERT), MASK)
    rounded = apply(made(BERT, dtype=jnp.bfloat16), padded(BERT), MASK)
    assert rounded.dtype == jnp.bfloat16
    # Hidden states are of size 1, bfloat16's spacing there is 2**-7; a few roundings add up.
    assert np.abs(exact - rounded.astype(np.float32)).max() < 0.1


def test_positions_of_roberta_follow_the_tokens_and_those_of_bert_do_not():
    tokens = np.array([[1, 5, 9, 1, 7, 1]])
    assert position_ids(tokens, ROBERTA).tolist() == [[1, 2, 3, 1, 4, 1]]
    assert position_ids(tokens, BERT).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.rows(1)
@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_rate_acts_alone_and_in_training_only(rate):
    rates: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = encoder_of(dataclasses.replace(BERT, **rates | {rate: 0.5}))
    before = apply(encoder, padded(BERT), MASK)
    np.testing.assert_array_equal(before, apply(made(BERT), padded(BERT), MASK))
    encoder.train()
    first, second = (apply(encoder, padded(BERT), MASK) for _ in range(2))
    encoder.eval()
    assert not np.allclose(before, first)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(apply(encoder, padded(BERT), MASK), before)


def test_mean_pooling_leaves_padding_out_and_cls_takes_the_first_token():
    mean, cls = (classifier_of(2, pooling=pooling) for pooling in ("mean", "cls"))
    hidden = np.asarray(apply(mean.encoder, padded(BERT), MASK))
    expected = [hidden[0].mean(axis=0), hidden[1, :4].mean(axis=0)]
    np.testing.assert_allclose(pool(mean, padded(BERT), MASK), expected, atol=1e-6)
    np.testing.assert_allclose(pool(cls, padded(BERT), MASK), hidden[:, 0], atol=1e-6)


def test_logits_are_the_linear_head_of_the_features():
    model = classifier_of(2)
    head = model.classifier
    expected = pool(model, padded(BERT), MASK) @ np.asarray(head.kernel[...]) + head.bias[...]
    np.testing.assert_allclose(apply(model, padded(BERT), MASK), expected, atol=1e-5)
    model.dropout.deterministic = False
    assert not np.allclose(apply(model, padded(BERT), MASK), expected)


def test_mean_of_nothing_is_zero():
    assert masked_mean(jnp.ones((1, 3, 2)), jnp.zeros((1, 3))).tolist() == [[0.0, 0.0]]


def test_mean_of_bfloat16_is_rounded_once():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(4, 30, 16)), jnp.bfloat16)
    mask = np.arange(30) < np.array([30, 17, 9, 3])[:, None]
    wide = np.asarray(hidden, np.float32)
    exact = [wide[i, mask[i]].mean(0) for i in range(4)]
    np.testing.assert_array_equal(masked_mean(hidden, mask), jnp.asarray(exact, jnp.bfloat16))


def test_projections_lie_at_their_documented_paths():
    two = dataclasses.replace(BERT, num_hidden_layers=2)
    model = nnx.eval_shape(
        lambda: BertClassifier(BertEncoder(two, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    )
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
        return model.embeddings.layer_norm.scale[0]

    for _ in range(3):
        count(encoder_of(BERT))
    assert len(traced) == 1


@CONFIGS
def test_the_longest_sequence_is_the_last_with_a_position(config):
    full = np.full((1, config.max_tokens), 7)
    assert position_ids(full, config).max() == config.max_position_embeddings - 1
    encoder = nnx.eval_shape(lambda: BertEncoder(config, rngs=nnx.Rngs(0)))
    nnx.eval_shape(lambda encoder: encoder(full), encoder)
    with pytest.raises(ValueError, match=f"positions for {config.max_tokens}: truncate"):
        encoder(np.full((1, config.max_tokens + 1), 7))


def test_inputs_of_other_shapes_are_refused_by_name():
    encoder = made(BERT)
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
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be a positive number"),
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
