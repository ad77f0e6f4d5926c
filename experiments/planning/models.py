"""Decoders whose training can be planned by name."""

from __future__ import annotations

import dataclasses

from experiments.benchmarks.cases import LLAMA_7B, SMOLLM2_135M
from experiments.models.llama_config import LlamaConfig

MODELS: dict[str, LlamaConfig] = {
    "llama-7b": LLAMA_7B,
    "llama-13b": dataclasses.replace(
        LLAMA_7B,
        hidden_size=5120,
        num_hidden_layers=40,
        num_attention_heads=40,
        intermediate_size=13824,
    ),
    "llama2-70b": dataclasses.replace(
        LLAMA_7B,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
    ),
    "llama3-8b": dataclasses.replace(
        LLAMA_7B,
        vocab_size=128256,
        num_key_value_heads=8,
        intermediate_size=14336,
        rope_theta=5e5,
    ),
    "smollm2-135m": SMOLLM2_135M,
}
"""LLaMA (arXiv 2302.13971), LLaMA 2 (2307.09288), LLaMA 3 (2407.21783), SmolLM2 (2502.02737)."""
