"""Name maps of the architectures that are known."""

from __future__ import annotations

from dora_jax.names.name_map import NameMap
from dora_jax.names.placeholders import ANY_PATH

IDENTITY = NameMap({ANY_PATH: ANY_PATH})
"""For models whose paths are those of Hugging Face, such as the Flax classes of Transformers."""

BERT = NameMap(
    {
        "embeddings.word_embeddings": "embeddings.word_embeddings",
        "embeddings.position_embeddings": "embeddings.position_embeddings",
        "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
        "embeddings.layer_norm": "embeddings.LayerNorm",
        "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
        "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
        "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
        "layers.{i}.attention.output": "encoder.layer.{i}.attention.output.dense",
        "layers.{i}.attention.layer_norm": "encoder.layer.{i}.attention.output.LayerNorm",
        "layers.{i}.intermediate": "encoder.layer.{i}.intermediate.dense",
        "layers.{i}.output": "encoder.layer.{i}.output.dense",
        "layers.{i}.layer_norm": "encoder.layer.{i}.output.LayerNorm",
    }
)
"""For `BertModel` (without its pooler); under a head, `BERT.inside("encoder", "bert")`."""
ROBERTA = BERT
"""For `RobertaModel`; under a head, `ROBERTA.inside("encoder", "roberta")`."""

_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)

LLAMA = NameMap(
    {
        "embed_tokens": "model.embed_tokens",
        **{f"layers.{{i}}.{name}": f"model.layers.{{i}}.{name}" for name in _LAYER},
        "norm": "model.norm",
        "lm_head": "lm_head",
    }
)
"""For `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""

NAME_MAPS = {
    "identity": IDENTITY,
    "bert": BERT,
    "roberta": ROBERTA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
