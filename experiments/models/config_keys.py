"""Which keys of a Hugging Face `config.json` change what a model computes, and which do not.

A key that is not known may change the outputs, so that one that holds a value is refused. The keys
are those of transformers 4.57, of its older versions, and of frequent other writers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_NAMES = """
    architectures auto_map model_type transformers_version dtype torch_dtype name_or_path
    custom_pipelines license language library_name model_name name version revision loss_type
    sbert_ce_default_activation_function
"""
_OUTPUTS = """
    num_labels id2label label2id problem_type classifier_dropout finetuning_task
    task_specific_params tokenizer_class prefix output_attentions output_hidden_states
    output_past return_dict use_return_dict output_scores return_dict_in_generate
    cross_attention_hidden_size tie_encoder_decoder pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type directionality summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj sentence_transformers
"""
_GENERATION = """
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty use_cache cache_implementation
    generation_config chat_template assistant_token_id
"""
# How training or memory goes, or how the same numbers are computed.
_TRAINING = """
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    resid_dropout embd_dropout attention_probs_dropout_prob hidden_dropout_prob
    gradient_checkpointing use_gradient_checkpointing chunk_size_feed_forward pretraining_tp
    torchscript use_bfloat16 tf_legacy_loss attn_implementation use_flash_attention
    use_flash_attention_2 use_flash_attn flash_attention use_flash_attn_2 fp16 bf16 fp32
    unsloth_fixed unsloth_version is_llama_config model_max_length max_sequence_length seq_length
    max_seq_len max_position_embeddings vocab_type transformers.js_config tokenizer_model_max_length
"""
HARMLESS = frozenset((_NAMES + _OUTPUTS + _GENERATION + _TRAINING).split())
"""Keys that do not change the hidden states or logits of the models here."""
_HARMLESS_FORMS = re.compile(r"_.*|.*_token(_ids?)?|.*_token_index")


def unread_keys(stored: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Returns the keys of a `config.json` that are not known and hold a value.

    Null, false and what is empty switch nothing on.

    Example:
        >>> unread_keys({"bos_token_id": 1, "logit_scale": 2.0, "parallel": False}, ())
        ['logit_scale']
    """
    return sorted(
        key
        for key, value in stored.items()
        if key not in known
        and key not in HARMLESS
        and not _HARMLESS_FORMS.fullmatch(key)
        and not (value is None or value is False or value in ("", [], {}))
    )


def own_classes(stored: Mapping[str, Any]) -> list[str]:
    """Returns the model classes of its own that a checkpoint brings along (`auto_map`).

    They may compute anything: attention in both directions, for embeddings of texts.

    Example:
        >>> own_classes({"auto_map": {"AutoConfig": "c.Config", "AutoModel": "m.Encoder"}})
        ['m.Encoder']
    """
    mapped = stored.get("auto_map")
    if not isinstance(mapped, dict):
        return []
    return [str(value) for key, value in mapped.items() if key.startswith("AutoModel")]
