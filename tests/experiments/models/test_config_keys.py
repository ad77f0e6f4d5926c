"""Every key of a config.json is read, known to change nothing, or refused with its value."""

from __future__ import annotations

import json

import pytest

from experiments.models.bert_config import BertConfig
from experiments.models.config_file import ModelConfigError
from experiments.models.llama_config import LlamaConfig

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
BERT = {
    **SIZES,
    "model_type": "bert",
    "hidden_act": "gelu",
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
}
DECODERS = ["llama", "mistral", "qwen2", "qwen3"]


def read(tmp_path, stored):
    path = tmp_path / "config.json"
    path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
    kind = BertConfig if "type_vocab_size" in stored else LlamaConfig
    return kind.from_json(path)


def decoder(model_type="llama", **changes):
    heads = {"num_key_value_heads": 2}
    return {k: v for k, v in {**SIZES, **heads, "model_type": model_type, **changes}.items()}


def refused(tmp_path, stored):
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, stored)
    assert str(tmp_path / "config.json") in str(caught.value)
    return str(caught.value)


# The keys of published models that are no fields of the configurations.
PUBLISHED = {
    "Llama-3.1-8B": decoder(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        hidden_act="silu",
        initializer_range=0.02,
        max_position_embeddings=131072,
        mlp_bias=False,
        pretraining_tp=2,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        transformers_version="4.43.0.dev0",
        use_cache=True,
    ),
    "SmolLM2": decoder(
        is_llama_config=True,
        rope_interleaved=False,
        pretraining_tp=1,
        **{"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "a checkpoint of unsloth": decoder(
        unsloth_fixed=True, unsloth_version="2024.9", _name_or_path="unsloth/x", pad_token_id=0
    ),
    "deepseek-coder": decoder(rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000),
    "vicuna": decoder(max_sequence_length=2048, use_flash_attention=True, temperature=0.9),
    "Mistral-7B": decoder("mistral", sliding_window=4096, attention_bias=True, mlp_bias=True),
    "Qwen2.5": decoder(
        "qwen2",
        max_window_layers=21,
        sliding_window=32768,
        use_sliding_window=False,
        use_mrope=False,
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=0.1,
    ),
    "Qwen3": decoder("qwen3", layer_types=["full_attention"] * 2, max_window_layers=28),
    "of transformers 5": decoder(
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        dtype="bfloat16",
        is_decoder=False,
    ),
    "multilingual BERT": BERT
    | {
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "a classifier": BERT
    | {
        "_num_labels": 9,
        "finetuning_task": "ner",
        "id2label": {"0": "O"},
        "label2id": {"O": 0},
        "problem_type": "single_label_classification",
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        "gradient_checkpointing": False,
        "pruned_heads": {},
        "classifier_dropout": 0.1,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(tmp_path, name):
    config = read(tmp_path, PUBLISHED[name])
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        assert getattr(config, field) == PUBLISHED[name][field]


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal is False; only True is implemented"),
        ({"logit_scale": 0.25}, "logit_scale is 0.25, which is not known"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ({"quantization": {"bits": 4}}, "quantization is {'bits': 4}"),
        (
            {"auto_map": {"AutoModel": "modeling.Encoder"}},
            "auto_map has 'modeling.Encoder', code of the checkpoint's own",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "default"},
            },
            "rope_parameters and rope_scaling disagree: no scaling and RopeScaling(",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta and rope_parameters.rope_theta disagree: 10000.0 and 500000.0",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e4},
                    "sliding_attention": {"rope_theta": 5e5},
                }
            },
            "rope_parameters.full_attention.rope_theta and rope_parameters.sliding_attention",
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2}}, "delete one"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 32}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"factor": 2, "mscale": 1.0}}, "rope_scaling.mscale is 1.0"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.factor is 2, but its rope_type"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 2.0,
                    "original_max_position_embeddings": None,
                }
            },
            "original_max_position_embeddings must be a positive number",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["chunked_attention"] * 2}, "kinds ['chunked_attention']"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ],
)
def test_a_key_that_changes_what_is_computed_is_refused(tmp_path, model_type, changes, message):
    assert message in refused(tmp_path, decoder(model_type, sliding_window=None, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": True}, "is_causal is True; only False"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
        ({"adapters": {"a": 1}}, "adapters is {'a': 1}, which is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ],
)
def test_a_key_that_changes_an_encoder_is_refused(tmp_path, changes, message):
    assert message in refused(tmp_path, BERT | changes)


@pytest.mark.parametrize("model_type", ["mistral3", "bloom", ["bert"], None, 3, "bert" * 1000])
@pytest.mark.parametrize("fields", [{"type_vocab_size": 2}, {}])
def test_the_model_type_is_checked_first(tmp_path, model_type, fields):
    message = refused(tmp_path, {"model_type": model_type, **fields})
    assert "model_type" in message and "is not implemented" in message and len(message) < 600


@pytest.mark.parametrize("name", [*SIZES, "type_vocab_size"])
def test_a_required_field_that_is_null_is_missing(tmp_path, name):
    assert f"missing {name}" in refused(tmp_path, BERT | {name: None})


def test_scalings_by_kind_that_agree_are_read(tmp_path):
    kinds = {kind: {"rope_theta": 5e5} for kind in ("full_attention", "sliding_attention")}
    assert read(tmp_path, decoder(rope_parameters=kinds)).rope_theta == 5e5


@pytest.mark.parametrize("model_type", DECODERS)
def test_biases_are_those_that_transformers_has(tmp_path, model_type):
    config = read(tmp_path, decoder(model_type, attention_bias=True, mlp_bias=True))
    expected = {
        "llama": (True, True, True),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (True, True, False),
    }
    assert (config.qkv_bias, config.attention_bias, config.mlp_bias) == expected[model_type]


NUMBERS = ["NaN", "Infinity", "-1", "1e999", "true", "9" * 4000, "9" * 5000, '"1"', "[]", "{}"]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: value[:8])
@pytest.mark.parametrize(
    ("stored", "field"),
    [(BERT, "layer_norm_eps"), (BERT, "hidden_size"), (BERT, "hidden_dropout_prob")]
    + [(BERT, "hidden_act"), (BERT, "pad_token_id"), (BERT, "initializer_range")]
    + [(decoder(), name) for name in ("rms_norm_eps", "rope_theta", "vocab_size", "head_dim")]
    + [(decoder(), name) for name in ("rope_scaling", "tie_word_embeddings", "num_hidden_layers")]
    + [(decoder("qwen2"), name) for name in ("layer_types", "use_sliding_window")],
)
def test_a_value_of_another_kind_is_an_error_that_names_the_field(tmp_path, stored, field, value):
    text = json.dumps(stored | {field: "VALUE"}).replace('"VALUE"', value)
    allowed = {("pad_token_id", "-1"), ("rope_scaling", "{}"), ("layer_types", "{}")}
    allowed |= {("tie_word_embeddings", "true"), ("use_sliding_window", "true")}
    allowed |= {("use_sliding_window", "[]"), ("use_sliding_window", "{}")}
    if (field, value) not in allowed:
        message = refused(tmp_path, text)
        assert len(value) == 5000 or field in message
        assert len(message) < 600


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "[" * 6_000_000, "\x00", "\ud800"]
)
def test_a_text_without_end_is_an_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        LlamaConfig.from_json(path)
